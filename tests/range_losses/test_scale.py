"""Weights of every scale: to the bit where only powers of two are between them, else by the budget."""

import budget
import cases
import pytest
import torch
from parametrize import first, short

import r2kernels as r2

pytestmark = pytest.mark.usefixtures("nan_filled", "one_thread")

dtypes = first("dtype", [torch.float32], [torch.float32, torch.bfloat16, torch.float64], short)  # float16: no room
POWERS = [-75, 61, 100]  # below, what a soft extreme has after the digits of its shift is no normal number
INPUTS = ["below a vector", "a chunk and one", "ties", "far from zero", "constant"]


def weights(dtype, device, times=1.0):
    """Beside the usual ones a chunk that begins with many zeros."""
    ws = [w for name in INPUTS for w in cases.make(name, dtype, device)]
    pruned = cases.make("several chunks", dtype, device)[0].clone()
    pruned.view(-1)[:20000] = 0
    return [w * times for w in (*ws, pruned)]


def found(function, ws, parameter, learned=True, upstream=1.0, **options):
    """(losses, gradients of the weights, gradient of the parameter)"""
    ws = [w.detach().requires_grad_() for w in ws]
    values = {}
    if parameter is not None:
        wide = torch.promote_types(ws[0].dtype, torch.float32)
        name = cases.BY_LABEL[function].parameters[0].name
        values[name] = torch.full((len(ws),), parameter, dtype=wide, device=ws[0].device, requires_grad=learned)
    losses = getattr(r2, function)(ws, **values, **options)
    losses = torch.stack(losses) if isinstance(losses, tuple) else losses
    up = torch.linspace(1, 2, losses.numel(), dtype=losses.dtype, device=losses.device).reshape(losses.shape)
    own = list(values.values()) if learned else []
    grads = torch.autograd.grad(losses, [*ws, *own], up * upstream)
    return losses.detach(), list(grads[: len(ws)]), grads[-1] if own else None


@dtypes
@pytest.mark.parametrize("function", ["l_inf", "margin"])
def test_exact_powers_of_two(function, dtype, device, variant):
    parameter = None if function == "l_inf" else 0.0625
    ones = found(function, weights(dtype, device), parameter, function == "margin")
    for power in POWERS:
        c = 2.0**power
        scaled = found(function, weights(dtype, device, c), parameter and parameter * c, function == "margin")
        assert torch.equal(scaled[0], ones[0] * c), power
        assert all(torch.equal(a, b) for a, b in zip(scaled[1], ones[1], strict=True)), power
        assert parameter is None or torch.equal(scaled[2], ones[2]), power


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "fixed"])
@dtypes
@pytest.mark.parametrize("alpha", [40.0, -100.0, 1e-7, 0.0])
def test_exact_powers_of_two_of_soft_extrema(alpha, dtype, learned, device, variant):
    """The gradient of alpha goes with the square of the scale: its upstream makes a number of that."""
    ones = found("soft_extrema", weights(dtype, device), alpha, learned)
    powers = [power for power in POWERS if alpha != 0 or power < 100 or dtype == torch.float64]  # no normal alpha there
    for power in powers:
        c, upstream = 2.0**power, 2.0 ** max(min(-2 * power, 120), -120) if learned else 1.0
        scaled = found("soft_extrema", weights(dtype, device, c), alpha / c, learned, upstream)
        assert torch.equal(scaled[0], ones[0] * c), power
        assert not learned or torch.equal(scaled[2], ones[2] * (upstream * c * c)), power
        if upstream >= 1:
            assert all(torch.equal(a, b * upstream) for a, b in zip(scaled[1], ones[1], strict=True)), power


@pytest.mark.parametrize("alpha", [-2.0, 1e-12, 0.0])
@pytest.mark.parametrize("function", ["soft_min_max", "soft_extrema"])
@pytest.mark.parametrize("exponent", [-30, 30])
def test_budget(exponent, function, alpha, device, variants):
    """alpha in units of 1 / std, of weights of that std; of the small ones exp(-alpha) overflows where it is negative.

    The gradient of alpha is measured where it is float32; its natural scale is that of the reference."""
    std = 10.0**exponent
    if function == "soft_min_max" and alpha < 0 and std < 1:
        alpha = -1e-3 * std  # exp(-alpha) is a number
    op = cases.Op("scale", function, "range_losses", (cases.Parameter("alpha", alpha, "1/std"),), columns=True)
    draws = []
    for name in INPUTS:
        for seed in range(2):
            one = budget.draw(op, name, torch.float32, device, seed)
            ws = [(w.double() / cases.SCALE * std).float() for w in one.weights]
            draws.append(one._replace(weights=ws, parameter=one.parameter * (cases.SCALE / std), grad=one.grad / std))
    budget.hold(draws, variants, lambda one: _known(budget.evaluate(one)), lambda one: _known_truth(one))


def _known(result):
    return {"loss": result.loss, "dW": result.weights}


def _known_truth(one):
    exact, scale = budget.truth(one)
    return _known(exact), _known(scale)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_alpha_of_0_is_the_mean(scale, device, variant):
    for w in weights(torch.float32, device, scale):
        for extreme in r2.soft_extrema(w, 0.0):
            assert (extreme - w.double().mean()).abs() <= 3e-7 * w.abs().max()
        v = w.detach().requires_grad_()
        (g,) = torch.autograd.grad(sum(r2.soft_extrema(v, 0.0)), v)
        torch.testing.assert_close(g * w.numel(), torch.full_like(w, 2.0), rtol=1e-5, atol=0)


def test_gradient_of_alpha_where_its_parts_are_no_numbers(device, variant):
    """Var_p is 1e60 here: its gradient is a number for a small upstream one, and 0 for none."""
    w = torch.tensor([1e30, 2e30, 4e30], device=device)
    for upstream, factor in ((torch.tensor([0.0, 1e-35]), 1.0), (torch.tensor([1e-35, 0.0]), -1.0)):
        alpha = torch.tensor(0.0, device=device, requires_grad=True)
        torch.autograd.backward(r2.soft_extrema(w, alpha), list(upstream.to(device).unbind()))
        torch.testing.assert_close(
            alpha.grad.item(), factor * 1e-35 * w.double().var(correction=0).item(), rtol=1e-5, atol=0
        )
