"""Quantizers and regularizers in Triton's interpreter. test_triton_static.py runs this file, in its own process:

TRITON_INTERPRET=1 pytest tests/quantizers/interpreted.py
"""

import math

import pytest
import torch
from cases import DTYPES
from torch.testing import assert_close

import r2kernels as r2
from r2kernels import contract, reference
from r2kernels import lists as weights
from r2kernels.backends import select
from r2kernels.backends.triton import (
    chunks,
    quantizers_kernels,
    range_losses,
    regularizers_counts_kernels,
    regularizers_terms_kernels,
)
from r2kernels.reference.columns import accumulator

BITS = [(torch.float32, bits) for bits in (1, 2, 5, 8)] + [
    (dtype, bits) for dtype in DTYPES if dtype != torch.float32 for bits in (1, 4)
]
TERMS = {"l_inf": 0, "margin": 2, "soft_min_max": 1, "kure": 1, "bin_reg": 1, "msqe": 1, "partial_l2": 1}


@pytest.fixture
def triton():
    with r2.use_backend("triton"):
        yield select(torch.device("cpu"))


def draw(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tensors(dtype, seed=0):
    """Contiguous, unaligned and longer than a chunk, transposed, channels_last, one element; every one with ties of
    codes."""
    found = [
        draw(2, 3, 4, seed=seed),
        draw(2, 2200, seed=seed + 1).reshape(-1)[1:].reshape(1, -1),
        draw(2, 9, seed=seed + 2).t(),
        draw(2, 3, 2, 5, seed=seed + 3),
        draw(1, 1, seed=seed + 4),
    ]
    found = [x.to(dtype) for x in found]
    found[3] = found[3].contiguous(memory_format=torch.channels_last)
    found[0][0, 0] = torch.tensor([0.5, 0.75, -0.25, 0.0]) * 0.5
    return found


def numbers(*values, dtype):
    return torch.tensor(values, dtype=accumulator(dtype))


def same(ours, exact):
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def close(ours, exact, digits=1):
    """Within a few roundings of the dtype, of numbers of the order of 1."""
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        bound = 20 * digits * torch.finfo(a.dtype).eps
        assert_close(a, b, rtol=bound, atol=bound * max(1, float(b.nan_to_num(0, 0, 0).abs().max())), equal_nan=True)


def both(triton, op, xs, *rest, bits_of_gradients=True, seed=40):
    """Values to the bit; gradients of x to the bit or close, those of parameters close."""
    same(getattr(triton, op + "_fwd")(xs, *rest), getattr(reference, op + "_fwd")(xs, *rest))
    gs = [draw(*x.shape, seed=seed + i, dtype=x.dtype) for i, x in enumerate(xs)]
    ours, exact = (getattr(layer, op + "_bwd")(gs, xs, *rest) for layer in (triton, reference))
    if not isinstance(exact, tuple):
        ours, exact = (ours,), (exact,)
    (same if bits_of_gradients else close)(ours[0], exact[0])
    assert all(y.stride() == x.stride() for x, y in zip(xs, ours[0], strict=True))
    close(ours[1:], exact[1:], digits=50)


def test_the_kernels_have_the_ops_of_the_contract():
    """Their files import Triton alone, so what they share with the contract and lists.py stands there once more."""
    assert chunks.FIELDS.value == weights.FIELDS and regularizers_counts_kernels.DIGIT.value == contract.RADIX
    assert {*regularizers_terms_kernels.BLOCKS} - {"frozen"} == {*contract.TERMS}
    alone = ("l_inf", "margin", "soft_min_max", "soft_extrema", "kure", "weight_stats")
    assert [name for name in contract.BY_NAME if name in range_losses.FORMULAS] == [*alone]
    for op in (contract.LSQ, contract.EWGS, contract.PACT, contract.DOREFA, contract.RESCALE):
        assert (quantizers_kernels.QUANTIZERS[op.name].finish is not None) == (op.learned > 0)


def tops(xs, bits):
    wide = [x.to(accumulator(x.dtype)).abs() for x in xs]
    if bits == 1:
        return torch.stack([torch.stack([x.mean(), x.new_ones(())]) for x in wide])
    return torch.stack([torch.stack([x.amax(), (x == x.amax()).sum().to(x.dtype)]) for x in wide])


@pytest.mark.parametrize(("dtype", "bits"), BITS, ids=str)
def test_quantizers(dtype, bits, triton):
    xs = tensors(dtype)
    step = numbers(0.25, 0.01, 0.5, 0.1, 1.0, dtype=dtype)
    for flag in (False, True):
        both(triton, "lsq", xs, step, bits, flag, None, "lsq")
        both(triton, "ewgs", xs, -3 * step, 4 * step, step / 10, bits, flag, bits_of_gradients=False)
        both(triton, "pact", xs, 2 * step, bits, flag)
    both(triton, "lsq", xs, step, bits, True, None, "seq")
    both(triton, "dorefa", xs, tops(xs, bits), bits, False, bits_of_gradients=bits == 1)
    if bits == 2:
        both(triton, "lsq", xs, step, bits, True, None, "ternary")
        both(triton, "dorefa", xs, tops(xs, bits), bits, True, bits_of_gradients=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_lsq_by_channel(axis, dtype, triton):
    xs = [
        draw(2, 3, 4, dtype=dtype),
        draw(3, 2, seed=2, dtype=dtype).t(),
        draw(2, 3, 2, 2, seed=3, dtype=dtype).contiguous(memory_format=torch.channels_last),
    ]
    step = draw(sum(x.shape[axis] for x in xs), seed=4, dtype=accumulator(dtype)).abs() + 0.05
    both(triton, "lsq", xs, step, 3, True, axis, "lsq")
    both(triton, "lsq", [draw(2, 4100, dtype=dtype)], step[:2], 2, False, 0, "lsq")
    both(triton, "lsq", xs, step, 2, True, axis, "ternary" if axis else "seq")
    if axis == 1:
        both(triton, "lsq", [draw(2, 2, 2100, dtype=dtype)], step[:2], 2, False, 1, "lsq")
        both(triton, "lsq", [draw(2, 40, dtype=dtype)], step.repeat(20)[:40], 1, True, 1, "lsq")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("each", "columns"), [(1, (9,)), (5, (7, 2)), (16, (300, 1)), (128, (40, 33)), (700, (5,))])
def test_lsq_by_short_channel(each, columns, dtype, triton):
    """Several to a program, which may not fill the last one."""
    xs = [draw(n, each, seed=n, dtype=dtype) for n in columns]
    step = draw(sum(columns), seed=4, dtype=accumulator(dtype)).abs() + 0.05
    step[0] = math.nan
    for bits, kind in ((3, "lsq"), (1, "lsq"), (2, "ternary"), (2, "seq")):
        both(triton, "lsq", xs, step, bits, True, 0, kind)
    both(triton, "lsq", [xs[0].t()], step[: columns[0]], 3, False, 1, "lsq")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_code_and_tie(dtype, triton):
    """Half-integers, and the numbers on either side of them"""
    halves = torch.arange(-300, 300, dtype=dtype) / 2
    for s in (0.3, 1e-3, 1 / 3, 7e4):
        x = halves * torch.tensor(s, dtype=dtype)
        x = torch.cat(
            [x, torch.nextafter(x, torch.full_like(x, math.inf)), torch.nextafter(x, torch.full_like(x, -math.inf))]
        )
        for bits, signed in ((8, True), (8, False), (3, True)):
            both(triton, "lsq", [x], numbers(s, dtype=dtype), bits, signed, None, "lsq")
        both(triton, "lsq", [x], numbers(s, dtype=dtype), 8, True, None, "seq")
        both(triton, "lsq", [x], numbers(s, dtype=dtype), 2, True, None, "ternary")
        both(triton, "pact", [x], numbers(255 * s, dtype=dtype), 8, True)
        low, high, delta = (numbers(v, dtype=dtype) for v in (-127.5 * s, 127.5 * s, 0.1))
        both(triton, "ewgs", [x], low, high, delta, 8, True, bits_of_gradients=False)


def test_tanh(triton):
    for dtype in (torch.float64, torch.float32):
        x = torch.cat(
            [torch.linspace(-10, 10, 4001, dtype=torch.float64), torch.logspace(-8, 1, 3000, dtype=torch.float64)]
        ).to(dtype)
        scale, g = numbers(0.5, 1.0, dtype=dtype)[None], torch.ones_like(x)
        found = triton.dorefa_bwd([g], [x], scale, 2, True)[0]
        t = x.double().tanh()
        exact = (1 - t) * (1 + t) / scale[0, 0].double().tanh()
        assert (found.double() - exact).abs().max() < 8 * torch.finfo(dtype).eps


def test_ties_of_the_maximum(triton):
    """Some chunks hold the maximum, one of either sign, others do not."""
    x = draw(13000, dtype=torch.float32).clamp(-1.5, 1.5)
    x[4096:8192] *= 0.5
    both(
        triton,
        "dorefa",
        [x, x[:300].clone(), torch.zeros(5)],
        tops([x, x[:300], torch.zeros(5)], 3),
        3,
        False,
        bits_of_gradients=False,
    )


@pytest.mark.parametrize(("dtype", "bits"), BITS, ids=str)
def test_sizes_and_scales(dtype, bits, triton):
    xs = tensors(dtype)
    step = numbers(0.25, -0.01, 0.5, 0.0, -1.0, dtype=dtype)
    for flag in (False, True):
        both(triton, "lsq", xs, step, bits, flag, None, "lsq", True)
        both(triton, "ewgs", xs, -3 * step, 4 * step, step.abs() / 10, bits, flag, True, bits_of_gradients=False)
        both(triton, "pact", xs, 2 * step, bits, flag, True)
    channels = numbers(*torch.linspace(-1, 1, sum(x.shape[0] for x in xs)).tolist(), dtype=dtype)
    both(triton, "lsq", xs, channels, bits, True, 0, "lsq", True)
    for sized in (False, True):
        both(triton, "rescale", xs, step if sized else step.abs() + 0.1, sized)


def test_special_values_and_invalid_parameters(triton):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 3e38, 0.7])
    for bits in (1, 3):
        for flag in (False, True):
            for p in (0.3, 0.0, -1.0, math.nan, math.inf, 1e-38):
                both(triton, "lsq", [x], torch.tensor([p]), bits, flag, None, "seq" if flag and bits > 1 else "lsq")
                both(triton, "pact", [x], torch.tensor([p]), bits, flag)
            for low, high in ((-1.0, 1.0), (1.0, 1.0), (1.0, -1.0), (math.nan, 1.0)):
                both(
                    triton,
                    "ewgs",
                    [x],
                    torch.tensor([low]),
                    torch.tensor([high]),
                    torch.tensor([0.1]),
                    bits,
                    flag,
                    bits_of_gradients=False,
                )
    for some in (x, x[3:]):
        both(triton, "dorefa", [some], tops([some], 2), 2, False, bits_of_gradients=False)
    for s in (0.3, 0.0, math.nan):
        for op in ("bin_reg", "msqe"):
            for w in (x[3:], x[:1], x):
                term(triton, op, [w], torch.tensor([[s]]), 2)
    for w, rank in ((x, 3), (x, 7), (x, 8), (x[3:], 1), (x[3:], 0)):
        term(triton, "partial_l2", [w], torch.tensor([rank]))


def term(triton, op, ws, *rest):
    ours, exact = (getattr(layer, op + "_fwd")(ws, *rest) for layer in (triton, reference))
    close(ours, exact, digits=50)
    grad, at = draw(len(ws), seed=9, dtype=exact[0].dtype), 1 if op == "partial_l2" else -1
    given = (*rest[:1], exact[1], *rest[1:])
    ours, exact = (getattr(layer, op + "_bwd")(grad, ws, *given) for layer in (triton, reference))
    if at == 1 or op == "bin_reg":
        ours, exact = (ours,), (exact,)
    close(ours[0], exact[0])
    close(ours[1:], exact[1:], digits=50)


@pytest.mark.parametrize(("dtype", "bits"), BITS, ids=str)
def test_regularizers(dtype, bits, triton):
    ws = tensors(dtype, seed=20)
    step = numbers(0.3, 0.02, 0.5, 0.1, 2.0, dtype=dtype)[:, None]
    term(triton, "bin_reg", ws, step, bits)
    term(triton, "msqe", ws, step, bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_is_exact(dtype, triton):
    ws = [*tensors(dtype, seed=30), draw(500, seed=5, dtype=dtype).round(decimals=1), torch.zeros(7, dtype=dtype)]
    for some in (lambda n: 1, lambda n: -(-n // 3)):
        rank = torch.tensor([some(w.numel()) for w in ws])
        _, saved = triton.partial_l2_fwd(ws, rank)
        exact = reference.partial_l2_fwd(ws, rank)
        assert torch.equal(saved, exact[1])
        term(triton, "partial_l2", ws, rank)


def given(names, dtype, count):
    def one(value):
        return (
            torch.full((count, 1), value, dtype=accumulator(dtype))
            * torch.linspace(0.8, 1.2, count, dtype=accumulator(dtype))[:, None]
        )

    of = {
        "l_inf": [],
        "margin": [one(-0.6), one(0.4)],
        "soft_min_max": [one(2.0)],
        "kure": [one(1.8)],
        "bin_reg": [one(0.3)],
        "msqe": [one(0.2)],
        "partial_l2": [torch.ones(count, dtype=torch.int64)],
    }
    return [p for name in names for p in of[name]], [3 if name in ("bin_reg", "msqe") else 0 for name in names]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "names", [list(TERMS), ["soft_min_max", "kure", "msqe"], ["partial_l2", "bin_reg"], ["msqe", "l_inf"]], ids="+".join
)
def test_terms(names, dtype, triton):
    ws = tensors(dtype, seed=50)
    parameters, bits = given(names, dtype, len(ws))
    for learned in (True, False):
        problem = names, parameters, bits, [learned and name == "soft_min_max" for name in names]
        losses, saved = triton.terms_fwd(ws, *problem)
        exact_losses, exact_saved = reference.terms_fwd(ws, *problem)
        close(losses, exact_losses, digits=50)
        assert [s.shape for s in saved] == [s.shape for s in exact_saved]
        grads = [draw(len(ws), seed=60 + i, dtype=losses[0].dtype) for i in range(len(names))]
        ours, exact = (
            layer.terms_bwd(grads, ws, *problem, kept) for layer, kept in ((triton, saved), (reference, exact_saved))
        )
        close(ours[0], exact[0], digits=20)
        if learned:
            close(ours[1], exact[1], digits=100)


def test_a_chunk_that_is_read_again(triton):
    """soft_min_max whose first weights say nothing of the extremes, kure whose first weights lie far from the mean."""
    w = draw(4096, dtype=torch.float32) * 0.01
    w[:2048] += 50
    w[4000] = 900.0
    names = ["soft_min_max", "kure", "msqe"]
    for learned in (True, False):
        problem = (
            names,
            [torch.tensor([[3.0]]), torch.tensor([[1.8]]), torch.tensor([[0.5]])],
            [0, 0, 4],
            [learned, False, False],
        )
        alone = (
            triton.soft_min_max_fwd([w], torch.tensor([[3.0]]), learned, 1, "output")[0],
            triton.kure_fwd([w], torch.tensor([[1.8]]))[0],
        )
        losses, _ = triton.terms_fwd([w], *problem)
        assert torch.equal(losses[0], alone[0]) and torch.equal(losses[1], alone[1])


def test_gradients_that_nobody_needs(triton):
    for ws in ([draw(50, 2).float(), draw(70).float()], [draw(33).float()]):
        nobody, count = (False,) * len(ws), len(ws)
        alpha, grad = torch.full((count, 1), 0.3), draw(count).float()
        _, saved = triton.soft_min_max_fwd(ws, alpha, True, 1, "output")
        _, learned = triton.soft_min_max_bwd(grad, ws, alpha, saved, 1, "output")
        made, alone = triton.soft_min_max_bwd(grad, ws, alpha, saved, 1, "output", needed=nobody)
        assert made == [None] * count and torch.equal(alone, learned)
        problem = ["soft_min_max"], [alpha], [0], [True]
        made, (of_terms,) = triton.terms_bwd([grad], ws, *problem, [saved], needed=nobody)
        assert made == [None] * count and torch.equal(of_terms, learned)


def test_added_gradients(triton):
    ws = [draw(50, 2).float(), draw(64).float(), draw(7).float()]
    step, grad = torch.full((3, 1), 0.3), draw(3).float()
    _, saved = triton.msqe_fwd(ws, step, 3)
    exact, _ = triton.msqe_bwd(grad, ws, step, saved, 3)
    sums = [torch.ones_like(w) for w in ws]
    triton.msqe_bwd(grad, ws, step, saved, 3, out=sums)
    close(sums, [e + 1 for e in exact])


def test_public_functions_and_the_same_bits_again(triton):
    """Through autograd, with gradients that lie otherwise than x."""
    x = draw(6, 700, dtype=torch.float32)
    found = []
    for _ in range(2):
        a, step = x.clone().requires_grad_(), torch.tensor(0.2, requires_grad=True)
        y = r2.lsq(a, step, 4) + r2.pact(a, 1.0, 4) + r2.dorefa(a, 4) + r2.ewgs(a, -1.0, 1.0, 4)
        losses = r2.weight_terms(
            a,
            {
                "kure": {},
                "msqe": {"step": step, "bits": 4},
                "bin_reg": {"step": 0.2, "bits": 4},
                "partial_l2": {"fraction": 0.3},
            },
        )
        found.append(
            torch.autograd.grad((y * x.t().contiguous().t()).sum() + y.sum() + sum(losses.values()), [a, step])
        )
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))
