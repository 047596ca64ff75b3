"""Gradients that nobody asked for are neither written nor given memory; those of the parameters stay the same."""

import contextlib

import pytest
import torch
from emulate import emulated

import r2kernels as r2
from r2kernels import lists

LOSSES = {
    "margin": lambda ws, p: r2.margin(ws, p).sum(),
    "margin of columns": lambda ws, p: r2.margin(ws, p, cluster_dim=2).sum(),
    "soft_min_max": lambda ws, p: r2.soft_min_max(ws, p).sum(),
    "soft_extrema": lambda ws, p: sum(s.sum() for s in r2.soft_extrema(ws, p)),
    "msqe": lambda ws, p: r2.msqe(ws, p, 4).sum(),
    "weight_terms": lambda ws, p: sum(
        v.sum() for v in r2.weight_terms(ws, {"soft_min_max": {"alpha": p}, "l_inf": {}, "kure": {}}).values()
    ),
}


def gradients(loss, shapes, learned):
    """(of the weights, of the parameter) where those weights are learned that `learned` says"""
    g = torch.Generator().manual_seed(0)
    ws = [torch.randn(shape, generator=g).requires_grad_(need) for shape, need in zip(shapes, learned, strict=True)]
    parameter = torch.tensor(0.3, requires_grad=True)
    loss(ws if len(ws) > 1 else ws[0], parameter).backward()
    return [w.grad for w in ws], parameter.grad


@pytest.mark.parametrize("order", [None, *emulated.ORDERS], ids=str)
@pytest.mark.parametrize("learned", [(False,), (False, False, False), (True, False, True)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_what_nobody_needs(name, learned, order, monkeypatch):
    if order and emulated.why_not():
        pytest.skip(f"cannot be built: {emulated.why_not()}")
    shapes = [(40, 30), (5000,), (6, 2)][: len(learned)]
    made, plain = [], lists._empty_gradient
    with order.chosen() if order else contextlib.nullcontext():
        every, of_parameter = gradients(LOSSES[name], shapes, (True,) * len(learned))
        monkeypatch.setattr(lists, "_empty_gradient", lambda *args: made.append(args) or plain(*args))
        some, alone = gradients(LOSSES[name], shapes, learned)
    assert torch.equal(alone, of_parameter) and len(made) == sum(learned)
    for g, whole, need in zip(some, every, learned, strict=True):
        assert torch.equal(g, whole) if need else g is None
