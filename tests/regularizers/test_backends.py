"""What is the regularizers' own on every backend.

Every width of bits, ranks to the bit, codes at ties, steps of no use, gradients added to others.
"""

import budget
import cases
import pytest
import torch
from parametrize import first, first_dtypes

import r2kernels as r2
from r2kernels import ops, reference
from r2kernels.reference.columns import accumulator
from r2kernels.reference.quantizers import code

pytestmark = pytest.mark.usefixtures("nan_filled", "one_thread")

NAMES = ("bin_reg", "msqe", "partial_l2")
every_name = pytest.mark.parametrize("name", NAMES)


@first("bits", [1, 2, 5], range(1, 9))
@pytest.mark.parametrize("name", ["bin_reg", "msqe"])
def test_bits(name, bits, device, variants):
    inputs = ["below a vector", "a chunk and one", "ties", "transposed"]
    budget.hold(budget.draws(cases.BY_LABEL[name], inputs, torch.float32, device, [bits]), variants)


def added(draw, base):
    """The gradients, added to a copy of `base` by the op."""
    taken, of_saved = budget.for_ops(draw)
    _, saved = ops.call[draw.op.function + "_fwd"](*taken)
    sums = [b.clone() for b in base]
    ops.call[draw.op.function + "_bwd"](*of_saved(saved), out=sums)
    return sums


@first_dtypes(torch.bfloat16)
@every_name
def test_gradients_are_added_to_out(name, dtype, device, variant):
    for inputs in ("unaligned", "mixed list", "channels last", "transposed"):
        one = budget.draw(cases.BY_LABEL[name], inputs, dtype, device, 2)
        base = [
            torch.empty_like(w).copy_(torch.randn(w.shape))
            if w.is_contiguous() or inputs != "mixed list"
            else torch.randn_like(w)
            for w in one.weights
        ]
        alone = budget.by_ops(one.to(accumulator(dtype)))
        for a, b, g in zip(added(one, base), base, alone.weights, strict=True):
            torch.testing.assert_close(a, (b.to(g.dtype) + g).to(dtype))


@pytest.mark.parametrize("name", ["bin_reg", "msqe"])
def test_a_step_that_is_not_positive_gives_nan(name, device, variant):
    for bits in (1, 2, 8):
        one = budget.draw(cases.BY_LABEL[name], "mixed list", torch.float32, device, 4, bits=bits)
        one.parameter[:] = torch.tensor([1, 0, -1, float("nan"), 0.1, 1e-3, float("inf")])
        result = budget.evaluate(one)
        assert result.loss[:6].isnan().tolist() == [False, True, True, True, False, False]
        assert all(g.isnan().all() for g in result.weights[1:4]) and not result.weights[0].isnan().any()
        with r2.use_backend("reference"):
            expected = budget.evaluate(one)
        for a, b in zip(result.tensors, expected.tensors, strict=True):
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert (kind(a) == kind(b)).all(), (kind.__name__, a, b)


def spread(kind, n, dtype, device):
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=g, dtype=torch.float64)
    found = {
        "normal": x,
        "ties": (3 * x).round(),
        "equal": torch.full_like(x, -0.5),
        "rising": torch.linspace(-1, 3, n),
        "tiny": x * 1e-6,
        "subnormal": (x.abs() + 1) * torch.finfo(dtype).smallest_normal / 16,
        "nan": torch.where(x > 1, torch.nan, x),
        "far apart": x.sign() * 10 ** (4 * x),
    }[kind]
    return found.to(device, dtype)


@first_dtypes(torch.float32)
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "rising", "tiny", "subnormal", "nan", "far apart"])
def test_ranks_are_exact(kind, dtype, device, variant):
    """At 1, at N, where values tie, below 1, in tensors of one chunk and of several."""
    for n in (1, 2, 33, 4097, 50_000):
        w = spread(kind, n, dtype, device)
        ranks = sorted({0, 1, min(2, n), n // 3 + 1, n // 2 + 1, max(n - 1, 1), n})
        _, saved = ops.call["partial_l2_fwd"]([w] * len(ranks), torch.tensor(ranks, device=device))
        ordered = w.abs().to(saved.dtype).sort().values
        expected = torch.stack([ordered[r - 1] if r else ordered.new_tensor(float("nan")) for r in ranks])
        assert torch.equal(saved.reshape(-1).nan_to_num(-1), expected.nan_to_num(-1)), n


def test_codes_at_ties_are_those_of_a_true_division(device, variant):
    """Half to even of w / step, where a product with 1 / step would round otherwise: seen in the bin of a weight."""
    g = torch.Generator().manual_seed(0)
    steps = torch.rand(64, 1, generator=g) * 0.1 + 0.01
    w = ((torch.arange(-10, 11) + 0.5) * steps).to(device)
    w = torch.cat([w, w.nextafter(torch.zeros_like(w)), w.nextafter(2 * w)], 1)
    _, saved = ops.call["bin_reg_fwd"](list(w), steps.to(device), 4)
    expected = torch.stack(
        [
            torch.bincount((code(x / s, 4, True) + 8).long(), minlength=16)
            for x, s in zip(w, steps.to(device), strict=True)
        ]
    )
    assert torch.equal(saved[:, 0, :16].long(), expected)


@first_dtypes(torch.float32)
@first("bits", [1, 4, 8], range(1, 9))
def test_bins_hold_counts_and_mean_squares(bits, dtype, device, variants):
    """What a loss over shards is merged from."""
    ws = [spread(kind, n, dtype, device) for kind in ("normal", "rising", "tiny") for n in (1, 33, 50_001)]
    ws.append(torch.zeros(0, dtype=dtype, device=device))
    step = torch.full((len(ws), 1), 2.0 ** (2 - bits), dtype=accumulator(dtype), device=device)
    exact, expected = reference.bin_reg_fwd([w.double() for w in ws], step.double(), bits)
    assert expected.shape == (len(ws), 1, 2 * 2**bits)
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    for variant in variants:
        with variant.chosen():
            loss, saved = ops.call["bin_reg_fwd"](ws, step, bits)
        counts, means = saved.double().split(2**bits, -1)
        assert torch.equal(counts, expected[..., : 2**bits])
        torch.testing.assert_close(means, expected[..., 2**bits :], rtol=rtol, atol=0)
        torch.testing.assert_close(loss.double(), means.sum((1, 2)), rtol=rtol, atol=0)
        torch.testing.assert_close(loss.double(), exact, rtol=rtol, atol=0)
