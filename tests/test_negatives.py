"""Tensors with the negative bit, whose memory holds the negatives of their numbers, as that of `z.conj().imag` does:
every public function reads the numbers."""

import contextlib

import cases
import pytest
import torch
from torch.testing import assert_close

import r2kernels as r2
from r2kernels.files import packing


def negative(t):
    """t, in the strides it has, from memory that holds -t."""
    found = torch._neg_view(-t)
    assert found.is_neg() and torch.equal(found, t)
    return found


def imaginary(t):
    """t as every second number of complex ones, as autograd gives it for an imaginary part."""
    found = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert found.is_neg() and torch.equal(found, t)
    return found


def plain(t):
    return t


def tensors(device, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(s, generator=g) * cases.SCALE).to(device, dtype) for s in ((6, 9), (1, 1), (130,), (8, 2))]


def results(op, device, made, given):
    """Of a public function, with its derivatives: its tensors are what `made` makes of them, the gradients that come
    in what `given` does."""
    ws = [made(w).requires_grad_() for w in tensors(device)]
    arguments = op.arguments(cases.SCALE)
    learned = [p.name for p in op.parameters if p.learned]
    for p in op.parameters:
        value = torch.full((len(ws),), arguments[p.name], device=device)
        arguments[p.name] = made(value).requires_grad_(p.learned)
    if op.family == "dkm":
        arguments["centroids"] = [made(torch.tensor([-0.05, 0.0, 0.1], device=device)) for _ in ws]
    with pytest.warns(UserWarning, match="clusters for 1 rows") if op.family == "dkm" else contextlib.nullcontext():
        found = getattr(r2, op.function)(ws, **arguments)
    if op.function == "assign":
        return found
    flat = (
        [*found[0], *found[1]] if op.family == "dkm" else list(found) if isinstance(found, (list, tuple)) else [found]
    )
    g = torch.Generator().manual_seed(4)
    grads = [given(torch.randn(t.shape, generator=g).to(device)) for t in flat]
    return [*flat, *torch.autograd.grad(flat, [*ws, *[arguments[name] for name in learned]], grads)]


@pytest.mark.parametrize("op", cases.OPS, ids=lambda op: op.label)
def test_of_every_function(op, variant, device):
    expected = results(op, device, plain, plain)
    for made, given in ((negative, negative), (imaginary, imaginary), (plain, imaginary)):
        for a, b in zip(results(op, device, made, given), expected, strict=True):
            assert not a.is_neg() and torch.equal(a, b)


@pytest.mark.parametrize("made", [negative, imaginary])
def test_of_the_rest(made, variant, device):
    ws = tensors(device)
    terms = {"margin": {"M": 0.1}, "kure": {}, "msqe": {"step": 0.02, "bits": 3}}
    xs, ys = [w.clone().requires_grad_() for w in ws], [made(w).requires_grad_() for w in ws]
    a, b = r2.weight_terms(xs, terms), r2.weight_terms(ys, terms)
    grads = [torch.ones(4, device=device)] * 3
    for x, y in zip(
        torch.autograd.grad([*a.values()], xs, grads),
        torch.autograd.grad([*b.values()], ys, map(made, grads)),
        strict=True,
    ):
        assert torch.equal(x, y)
    for x, y in zip(r2.weight_stats(ws)[:-1], r2.weight_stats([made(w) for w in ws])[:-1], strict=True):
        assert torch.equal(x, y)
    row = ws[2].double()
    mass = torch.rand(130, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    for w, m in ((made(row), None), (row, made(mass)), (made(ws[2]), made(mass))):
        expected = r2.kmeans(w.clone(), 3, weight=None if m is None else m.clone())
        assert torch.equal(r2.kmeans(w, 3, weight=m), expected)


def test_compiled(device):
    w, step = tensors(device)[0], torch.tensor(0.02, device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(w, step):
        return r2.lsq(w, step, 4), r2.soft_min_max(w, 1.0)

    for made in (negative, imaginary):
        for a, b in zip(compiled(made(w), made(step)), (r2.lsq(w, step, 4), r2.soft_min_max(w, 1.0)), strict=True):
            assert torch.equal(a, b)


def test_gradients_in_place(device):
    """`accumulate_grad_` adds to a gradient with the bit what it adds to one without."""
    net = torch.nn.Linear(20, 30, device=device)
    start, found = torch.randn_like(net.weight), []
    reg = r2.RangeRegularizer(net, alpha=2.0)
    for made in (plain, negative, imaginary):
        net.weight.grad = made(start.clone())
        kept = net.weight.grad
        reg.accumulate_grad_()
        assert net.weight.grad is kept
        found.append(kept.clone())
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])


def test_tables_of_codes():
    groups, codes = packing.Groups(9, 9, 2), torch.arange(9, dtype=torch.uint8) % 4
    table = torch.randn(1, 4, 2)
    for made in (negative, imaginary):
        assert torch.equal(packing.look_up(packing.pack(codes, groups), groups, made(table)), table[0][codes.long()])
