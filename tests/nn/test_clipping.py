"""The steps and zero points of quantization after training, against brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import r2kernels as r2
from r2kernels.files.uniform import Grid
from r2kernels.nn.clipping import BINS, Histogram, affine_of, nearest, step_of, weight_qparams
from r2kernels.reference.parameters import levels

pytestmark = pytest.mark.usefixtures("one_thread")


def sample(kind, n=4000, seed=0):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {
        "normal": x,
        "outlier": torch.cat([x, torch.tensor([15.0], dtype=torch.float64)]),
        "skewed": x.abs().pow(1.5) - 0.3,
        "positive": x.abs(),
        "negative": -x.abs(),
        "cubed": x.pow(3),
    }[kind]


def symmetric_error(x, step, bits, signed):
    return (x - r2.reference.lsq(x, step, bits, signed=signed)).square().sum().item()


def affine_error(x, step, zero, bits):
    return (x - step * (x / step).round().clamp(-zero, 2**bits - 1 - zero)).square().sum().item()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "outlier", "skewed", "positive", "cubed"])
def test_symmetric_clipping_against_brute_force(kind, bits):
    x = sample(kind)
    histogram = Histogram(1)
    histogram.add(x[None])
    for signed in (True, False) if kind == "positive" else (True,):
        found = step_of(histogram, bits, signed, "mse")
        above = levels(bits, signed)[1]
        best = min(
            symmetric_error(x, s, bits, signed)
            for s in torch.linspace(2e-3, 1, 500, dtype=torch.float64) * (x.abs().max() / above).item()
        )
        assert symmetric_error(x, found[0], bits, signed) <= 1.02 * best
        assert symmetric_error(x, found[0], bits, signed) <= symmetric_error(
            x, step_of(histogram, bits, signed, "minmax")[0], bits, signed
        )


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "skewed", "positive", "negative"])
def test_asymmetric_clipping_against_brute_force(kind, bits):
    x, n = sample(kind), 2**bits - 1
    histogram = Histogram(1)
    histogram.add(x[None])
    step, zero = (v[0] for v in affine_of(histogram, bits, "mse"))
    assert zero == zero.round() and 0 <= zero <= n
    low, high, best = x.min().clamp(max=0).item(), x.max().clamp(min=0).item(), math.inf
    for a in torch.linspace(0.1, 1, 19).tolist():
        for b in torch.linspace(0.1, 1, 19).tolist():
            s = (b * high - a * low) / n
            best = min(best, affine_error(x, s, min(max(round(-a * low / s), 0), n), bits))
    assert affine_error(x, step, zero, bits) <= 1.03 * best


@given(
    st.lists(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20), min_size=1, max_size=6), st.booleans()
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_a_histogram_that_widens(batches, zeros_first):
    """Batch by batch or at once: the same sums, and bins as fine as half of those at once."""
    batches = [torch.zeros(1, 3)] * zeros_first + [torch.tensor([batch]) for batch in batches]
    parts, whole = Histogram(1), Histogram(1)
    for batch in batches:
        parts.add(batch)
    x = torch.cat(batches, 1)
    whole.add(x)
    assert (parts.low, parts.high, parts.count.sum()) == (x.min(), x.max(), x.numel())
    assert_close(parts.sum.sum(), x.double().sum())
    assert_close(parts.square[0], x.double().square().sum())
    assert whole.top <= parts.top * (1 + 1e-9) and parts.top <= 2 * max(whole.top.item(), 1e-300)
    edges = torch.linspace(-1, 1, BINS + 1).double() * parts.top
    inside = (parts.sum >= edges[:-1] * parts.count - 1e-6) & (parts.sum <= edges[1:] * parts.count + 1e-6)
    assert inside.all()


def test_min_max_ranges():
    w = torch.tensor([[-1.0, 0.5, 0.25], [3.0, -0.3, 0.0], [0.0, 0.0, 0.0]])
    step, zero = weight_qparams(w, 3, 0, "minmax", True)
    assert_close(step, torch.tensor([0.25, 1.0, 1.0])) and zero is None
    step, zero = weight_qparams(w, 3, 0, "minmax", False)
    assert_close(step, torch.tensor([1.5 / 7, 3.3 / 7, 1.0]))
    assert zero.tolist() == [5, 1, 0]
    coded = nearest(w, Grid(3, 0), step, zero)
    assert (coded.decoded() == 0).equal(w == 0)  # exact zeros stay
    assert weight_qparams(w, 3, None, "minmax", True)[0].item() == 1.0
    assert weight_qparams(w / 0, 3, 0, "mse", True) is None
