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
def test_a_histogram_of_batches(batches, zeros_first):
    """In any order or at once: the same bits, and every number in its bin."""
    batches = [torch.zeros(1, 3)] * zeros_first + [torch.tensor([batch]) for batch in batches]
    x = torch.cat(batches, 1)
    parts, turned, whole = Histogram(1), Histogram(1), Histogram(1)
    for batch, last in zip(batches, reversed(batches), strict=True):
        parts.add(batch)
        turned.add(last)
    whole.add(x)
    for histogram in (parts, turned):
        assert all(torch.equal(vars(histogram)[name], value) for name, value in vars(whole).items())
    assert (whole.low, whole.high, whole.strange) == (x.min(), x.max(), 0)
    top = 2.0 ** math.frexp(x.abs().max())[1]
    counts, _ = torch.histogram(x.double(), 2 * BINS, range=(-top, top))
    if x.any():
        assert torch.equal(whole.count[0].double(), counts)
    assert whole.count.sum() == x.numel()


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1e30, 1e300])
def test_a_histogram_of_any_scale(size):
    """Rows do not disturb each other; what is not finite is counted and in no bin."""
    histogram = Histogram(3)
    histogram.add(torch.tensor([[size, -size], [0.0, math.nan], [math.inf, 1.0]], dtype=torch.float64))
    assert histogram.strange.tolist() == [0, 1, 1] and histogram.count.sum(1).tolist() == [2, 2, 2]
    assert histogram.high.tolist() == [size, 0, 1] and histogram.low.tolist() == [-size, 0, 0]
    assert_close(step_of(histogram, 4, True, "minmax"), torch.tensor([size / 7, 1, 1 / 7], dtype=torch.float64))
    step = step_of(histogram, 4, True, "mse")
    x = torch.tensor([size, -size, 1], dtype=torch.float64)
    assert_close((x / step[[0, 0, 2]]).round().clamp(-8, 7) * step[[0, 0, 2]], x, rtol=0.13, atol=0)


@pytest.mark.parametrize("percentile", [50, 90, 99, 99.99, 100])
def test_percentiles(percentile):
    """Of |x| for LSQ's levels, of either tail with a zero point; against sorting, to the width of a bin."""
    x = sample("skewed", 20000) - 0.7
    histogram = Histogram(1)
    histogram.add(x[None])
    bin = 2.0 ** histogram.exponent.item() / BINS
    top = x.abs().quantile(percentile / 100)
    low, high = x.quantile(1 - percentile / 100), x.quantile(percentile / 100)
    assert_close(step_of(histogram, 4, True, "percentile", percentile)[0], top / 7, rtol=1e-3, atol=bin)
    step, zero = affine_of(histogram, 4, "percentile", percentile)
    assert_close(step[0], (high.clamp(min=0) - low.clamp(max=0)) / 15, rtol=1e-3, atol=bin)
    assert zero[0] == (-low.clamp(max=0) / step[0]).round()
    if percentile == 100:
        assert torch.equal(step_of(histogram, 4, True, "percentile", 100), step_of(histogram, 4, True, "minmax"))


def test_a_percentile_of_mostly_zeros_clips_nothing():
    x = torch.zeros(1, 1000)
    x[0, 0] = 3.5
    histogram = Histogram(1)
    histogram.add(x)
    assert step_of(histogram, 4, True, "percentile", 99)[0] == 0.5
    assert affine_of(histogram, 3, "percentile", 99) == (torch.tensor([0.5]), torch.tensor([0]))


def test_one_bit_of_zeros_stays_zero():
    """The levels of one bit are both beside 0; they are too small for any dtype but float64 to tell from it."""
    for dtype in (torch.float32, torch.float16):
        w = torch.tensor([[0.0, 0.0], [1.0, -1.0]], dtype=dtype)
        for method in ("mse", "minmax", "percentile"):
            step, zero = weight_qparams(w, 1, 0, method, True)
            assert nearest(w, Grid(1, 0), step, zero).decoded().abs().amax(1).tolist() == pytest.approx(
                [0, 1], abs=1e-29
            )


def test_min_max_ranges():
    w = torch.tensor([[-1.0, 0.5, 0.25], [3.0, -0.3, 0.0], [0.0, 0.0, 0.0]])
    step, zero = weight_qparams(w, 3, 0, "minmax", True)
    assert_close(step, torch.tensor([0.25, 1.0, 1.0]))
    assert zero is None
    step, zero = weight_qparams(w, 3, 0, "minmax", False)
    assert_close(step, torch.tensor([1.5 / 7, 3.3 / 7, 1.0]))
    assert zero.tolist() == [5, 1, 0]
    coded = nearest(w, Grid(3, 0), step, zero)
    assert (coded.decoded() == 0).equal(w == 0)  # exact zeros stay
    assert weight_qparams(w, 3, None, "minmax", True)[0].item() == 1.0
    assert weight_qparams(w / 0, 3, 0, "mse", True) is None
