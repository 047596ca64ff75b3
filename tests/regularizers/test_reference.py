"""The specification of the regularizers: values worked out by hand, identities, derivatives.

The reference and the public functions alike.
"""

import math

import cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import dtypes, examples, lists
from torch.testing import assert_close

import r2kernels as r2
from r2kernels import reference
from r2kernels.reference.quantizers import code

LAYERS = pytest.mark.parametrize("layer", [reference, r2], ids=["reference", "r2kernels"])

SIGMA = math.sqrt(20 / 3)  # of -3, -1, 1, 3: (9 + 1 + 1 + 9) / (4 - 1)
OFF = 41 / (20 / 3) ** 2 - 1.8  # their kurtosis, (81 + 1 + 1 + 81) / 4 / sigma^4 = 0.9225, minus the target

# function, arguments, W, value, dL/dW, dL/dstep
LITERALS = [
    # z = w / sigma, no skew: dkurtosis/dw = 4 / (4 sigma) z (z^2 - 4/3 0.9225) = w / sigma^2 (w^2 / sigma^2 - 1.23)
    (
        "kure",
        {},
        [-3, -1, 1, 3],
        OFF**2,
        [2 * OFF * g for g in (-0.45 * 0.12, 0.15 * 1.08, -0.15 * 1.08, 0.45 * 0.12)],
        None,
    ),
    ("kure", {"target": 0.9225}, [-3, -1, 1, 3], 0, [0, 0, 0, 0], None),
    ("kure", {}, [2, 2, 2], 0, [0, 0, 0], None),
    ("kure", {}, [2], 0, [0], None),
    # codes 0, -1, 1 (clipped), 0 (half to even); errors 0.2, 0.3, 2, 0.5
    (
        "msqe",
        {"step": 1, "bits": 2},
        [0.2, -0.7, 3, 0.5],
        (0.04 + 0.09 + 4 + 0.25) / 4,
        [0.1, 0.15, 1, 0.25],
        -2 / 4 * (-0.3 + 2),
    ),
    # codes 1, -1, 1: 0 is positive
    ("msqe", {"step": 1, "bits": 1}, [0, -0.5, 2], (1 + 0.25 + 1) / 3, [-2 / 3, 1 / 3, 2 / 3], -2 / 3 * (-1 - 0.5 + 1)),
    # codes -2 (clipped), 1, 1 of 1.5 (clipped from 2)
    ("msqe", {"step": 2, "bits": 2}, [-6, 2, 3], (4 + 0 + 1) / 3, [-4 / 3, 0, 2 / 3], -2 / 3 * (4 + 0 + 1)),
    ("msqe", {"step": 0.5, "bits": 8}, [1, -1.25, 0.75], (0.0625 * 2) / 3, [0, -1 / 6, -1 / 6], -2 / 3 * (0.5 - 0.5)),
    ("msqe", {"step": 3, "bits": 4}, [0, 0], 0, [0, 0], 0),
    ("bin_reg", {"step": 1, "bits": 2}, [0.2, -0.7, 3, 0.5], (0.04 + 0.25) / 2 + 0.09 + 4, [0.2, 0.6, 4, 0.5], None),
    ("bin_reg", {"step": 1, "bits": 1}, [0, -0.5, 2], (1 + 1) / 2 + 0.25, [-1, 1, 1], None),
    ("bin_reg", {"step": 2, "bits": 8}, [5], 1, [2], None),
    ("partial_l2", {"fraction": 0.5}, [1, -3, 2], (1 + 4) / 3, [2 / 3, 0, 4 / 3], None),
    ("partial_l2", {"fraction": 1}, [1, -3, 2], 14 / 3, [2 / 3, -2, 4 / 3], None),
    ("partial_l2", {"fraction": 1e-9}, [1, -3, 2], 1 / 3, [2 / 3, 0, 0], None),
    ("partial_l2", {"fraction": 1 / 3}, [1, -1, 2], 2 / 3, [2 / 3, -2 / 3, 0], None),
    ("partial_l2", {"fraction": 0.1}, [-7], 49, [-14], None),
]


@LAYERS
@pytest.mark.parametrize(("function", "options", "w", "value", "dw", "dstep"), LITERALS, ids=str)
def test_literal(function, options, w, value, dw, dstep, layer):
    w = torch.tensor(w, dtype=torch.float64, requires_grad=True)
    if dstep is not None:
        options = {**options, "step": torch.tensor(options["step"], dtype=torch.float64, requires_grad=True)}
    loss = getattr(layer, function)(w, **options)
    loss.backward()
    assert_close(loss.item(), float(value))
    # autograd through the std of a constant tensor gives no number
    if not (layer is reference and function == "kure" and w.max() == w.min()):
        assert_close(w.grad, torch.tensor(dw, dtype=torch.float64))
    if dstep is not None:
        assert_close(options["step"].grad.item(), float(dstep))


def drawn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_weight_stats_by_hand():
    for layer in (reference, r2):
        stats = layer.weight_stats(torch.tensor([[-3.0, -1], [1, 3]]))
        assert_close(torch.stack(stats[:6]), torch.tensor([-3, 3, 0, SIGMA, 0.9225, 3]))
        assert stats.numel == 4 and not stats.std.requires_grad
        stats = layer.weight_stats([torch.tensor([-7.0]), torch.full((5,), 0.1)])
        assert stats.std.tolist() == stats.kurtosis.tolist() == [0, 0] and stats.numel == (1, 5)
        assert stats.abs_max.tolist() == [7, torch.tensor(0.1).item()]


def test_what_shards_are_merged_from_by_hand():
    """The skew; counts and mean squares of the bins of codes -2 .. 1; digits of 0x3F80, 0x4000, 0x4040 and 0x7FC0."""
    assert reference.weight_stats_fwd([torch.tensor([0.0, 0, 4, 0])])[0].tolist()[2::4] == [1, 0.75]
    w, step = torch.tensor([0.2, -0.7, 3, 0.5], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    _, saved = reference.bin_reg_fwd([w], step, 2)
    assert_close(saved[0, 0], w.new_tensor([0, 1, 2, 1, 0, 0.09, 0.145, 4]))
    w = torch.tensor([1, -2, 2, 3, torch.nan], dtype=torch.bfloat16)
    high, low = (reference.digits_fwd([w], torch.tensor([prefix]), place)[0] for place, prefix in ((0, 7), (1, 0x40)))
    assert {i: n for i, n in enumerate(high.tolist()) if n} == {0x3F: 1, 0x40: 3, 0x7F: 1}
    assert {i: n for i, n in enumerate(low.tolist()) if n} == {0x00: 2, 0x40: 1}


def test_kurtosis_of_the_uniform_distribution():
    """Of n equidistant points: 9/5 (n^2 - 7/3) / (n^2 - 1), times ((n - 1) / n)^2 for the unbiased std.

    For many points that is 1.8.
    """
    for n in (2, 5, 1000):
        kurtosis = reference.weight_stats(torch.linspace(-3, 1, n, dtype=torch.float64)).kurtosis
        assert_close(kurtosis.item(), 9 / 5 * (n * n - 7 / 3) / (n * n - 1) * ((n - 1) / n) ** 2)
    assert reference.kure(torch.linspace(-3, 1, 100_000, dtype=torch.float64)) < 1e-8


def test_kure_ignores_scale_and_place():
    w = drawn(200).requires_grad_()
    (g,) = torch.autograd.grad(reference.kure(w), w)
    assert_close(reference.kure(3 * w - 5), reference.kure(w))
    assert_close(torch.stack([g.sum(), (g * w).sum()]), torch.zeros(2, dtype=torch.float64))


@LAYERS
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_bin_reg_is_the_sum_of_squared_offsets_and_variances(bits, layer):
    """As its paper writes it."""
    w, step = drawn(40, 25), 0.4
    c = code(w / step, bits, True)
    bins = [w[c == v] for v in c.unique()]
    expected = sum((b.mean() - step * v).square() + b.var(correction=0) for b, v in zip(bins, c.unique(), strict=True))
    assert_close(layer.bin_reg(w, step, bits), expected)


@LAYERS
@pytest.mark.parametrize("fraction", [0.001, 0.07, 0.3, 0.5, 0.999, 1.0])
def test_partial_l2_against_kthvalue(fraction, layer):
    for n in (1, 10, 100, 5000):
        w = drawn(n, seed=n)
        theta = w.abs().kthvalue(max(1, math.ceil(round(fraction * n, 9)))).values
        assert_close(layer.partial_l2(w, fraction), torch.where(w.abs() <= theta, w * w, 0).sum() / n)


def test_partial_l2_never_takes_one_too_many():
    """0.07 * 100 is a rounding above 7."""
    w = torch.arange(1.0, 101, dtype=torch.float64)
    assert r2.partial_l2(w, 0.07).item() == sum(k * k for k in range(1, 8)) / 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_partial_l2_of_a_tensor_takes_as_many_as_of_the_number(dtype):
    """0.3 in float32 is 0.30000001: still 3 of 10."""
    w = torch.arange(1.0, 11)
    for tenths in range(1, 11):
        expected = sum(k * k for k in range(1, tenths + 1)) / 10
        assert r2.partial_l2(w, tenths / 10).item() == pytest.approx(expected, rel=1e-6)
        assert r2.partial_l2(w, torch.tensor(tenths / 10, dtype=dtype)).item() == pytest.approx(expected, rel=1e-6)


def test_gradcheck():
    w, v, step = (
        drawn(7, 3).requires_grad_(),
        drawn(5, seed=1).requires_grad_(),
        torch.tensor([0.4, 0.7], dtype=torch.float64, requires_grad=True),
    )
    for bits in (1, 2, 4):
        assert torch.autograd.gradcheck(lambda w, v, s, bits=bits: r2.msqe([w, v], s, bits), (w, v, step))
        assert torch.autograd.gradcheck(lambda w, v, bits=bits: r2.bin_reg([w, v], 0.5, bits), (w, v))
    assert torch.autograd.gradcheck(lambda w, v: r2.partial_l2([w, v], 0.4), (w, v))
    alpha = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def terms(w, v, step, alpha):
        found = r2.weight_terms(
            [w, v],
            {
                "msqe": {"step": step, "bits": 3},
                "soft_min_max": {"alpha": alpha},
                "partial_l2": {"fraction": 0.5},
                "kure": {},
            },
        )
        return tuple(found.values())

    assert torch.autograd.gradcheck(terms, (w, v, step, alpha))


@examples(25)
@given(lists, dtypes, st.integers(1, 8), st.floats(0.01, 1.0))
def test_any_list(device, makeup, dtype, bits, fraction):
    """Between bounds that hold for every weight; and terms give what their functions give."""
    ws = [recipe.build(dtype, device).detach().requires_grad_() for recipe in makeup]
    step = cases.SCALE / bits
    losses = {
        "bin_reg": r2.bin_reg(ws, step, bits),
        "msqe": r2.msqe(ws, step, bits),
        "partial_l2": r2.partial_l2(ws, fraction),
    }
    together = r2.weight_terms(
        ws,
        {
            "bin_reg": {"step": step, "bits": bits},
            "msqe": {"step": step, "bits": bits},
            "partial_l2": {"fraction": fraction},
        },
    )
    for name, loss in losses.items():
        assert_close(together[name], loss, rtol=1e-5, atol=1e-9)
    for i, w in enumerate(ws):
        x = w.detach().reshape(-1).double()
        reach = step * (2 ** (bits - 1) + (bits == 1)) + x.abs().max()
        assert 0 <= losses["msqe"][i] <= reach**2 and 0 <= losses["bin_reg"][i] <= 2**bits * reach**2
        assert losses["partial_l2"][i] <= x.square().mean() * (1 + 1e-5)
    gradients = torch.autograd.grad(sum(loss.sum() for loss in losses.values()), ws)
    assert all(
        g.shape == w.shape and g.dtype == w.dtype and g.isfinite().all() for g, w in zip(gradients, ws, strict=True)
    )
