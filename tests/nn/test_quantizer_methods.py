"""Quantizer: each method by its published formulas, and EWGS's delta from the Hessian."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn.attached import images
from nn.quantized import assert_equal, plain, values
from torch import nn
from torch.testing import assert_close

import r2kernels as r2
from r2kernels import Quantizer
from r2kernels.nn.scales import FLOOR
from r2kernels.reference.parameters import levels

pytestmark = pytest.mark.usefixtures("one_thread")


def test_lsq_is_lsq():
    """Weights by channel, inputs unsigned behind a ReLU and signed at the start, all of it by hand."""
    model, x = plain(), images()[0]
    reference = copy.deepcopy(model)
    quantizer = Quantizer(model, "lsq", 3, 4, axis=0)
    out = model(x)
    steps = {name: p.detach().abs() + FLOOR for name, p in quantizer.named_parameters()}
    w = {i: reference[i].weight.detach() for i in (0, 4)}
    for i, name in ((0, "0"), (4, "4")):
        s0 = 2 * w[i].abs().flatten(1).mean(1) / math.sqrt(3)
        assert_close(steps[f"weights.{name}/weight.step"], s0)
    s0 = 2 * x.abs().mean() / math.sqrt(7)
    assert_close(steps["inputs.0.step"], s0)
    hats = {f"{i}.weight": r2.reference.lsq(w[i], steps[f"weights.{i}/weight.step"], 3, axis=0) for i in w}
    hidden = r2.reference.lsq(x, steps["inputs.0.step"], 4)
    hidden = nn.functional.conv2d(hidden, hats["0.weight"], reference[0].bias)
    hidden = reference[1](hidden).relu().flatten(1)
    assert_close(steps["inputs.4.step"], 2 * hidden.abs().mean() / math.sqrt(15))
    assert quantizer.inputs._modules["0"].is_signed and not quantizer.inputs._modules["4"].is_signed
    hidden = r2.reference.lsq(hidden, steps["inputs.4.step"], 4, signed=False)
    assert_close(out, nn.functional.linear(hidden, hats["4.weight"], reference[4].bias))


@given(st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=30), st.floats(0.1, 1), st.integers(2, 8))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_lsq_agrees_with_pytorch(numbers, step, bits):
    """torch._fake_quantize_learnable_per_tensor_affine masks after rounding.

    Points on the half step at each end are left out, and those at ties.
    """
    below, above = levels(bits, True)
    v = torch.tensor(numbers) / step
    x = torch.tensor(numbers)[
        ((v <= -below - 0.51) | (v >= -below))
        & ((v >= above + 0.51) | (v <= above))
        & (((v - 0.5).remainder(1) - 0.5).abs() < 0.499)
    ]
    if x.numel() == 0:
        return
    results = []
    for ours in (True, False):
        a, s = x.clone().requires_grad_(), torch.tensor([step], requires_grad=True)
        if ours:
            y = r2.lsq(a, s[0], bits)
        else:
            factor = 1 / math.sqrt(x.numel() * above)
            y = torch._fake_quantize_learnable_per_tensor_affine(a, s, torch.zeros(1), -below, above, factor)
        (y * torch.linspace(-1, 2, len(x))).sum().backward()
        results.append((y.detach(), a.grad, s.grad))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours.reshape(-1), theirs.reshape(-1), rtol=1e-4, atol=1e-5)


def published_ewgs(x, lower, upper, bits, delta, signed):
    """Lee et al. 2021, eqs. 1-7, as an autograd function of its own."""

    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (x * (2**bits - 1)).round() / (2**bits - 1)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * (1 + delta * g.sign() * (x - (x * (2**bits - 1)).round() / (2**bits - 1)))

    q = Round.apply(((x - lower) / (upper - lower)).clamp(0, 1))
    return 2 * (q - 0.5) if signed else q


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_ewgs_is_the_published_formula(bits):
    """Weights, inputs and the output scale: values, start and gradients."""
    torch.manual_seed(1)
    layer = nn.Linear(20, 6)
    dense, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    quantizer = Quantizer(layer, "ewgs", bits, bits, overrides={"*": {"delta": 0.3}})
    x = torch.randn(9, 20).relu().requires_grad_()
    upstream = torch.randn(9, 6)
    out = layer(x)
    (out * upstream).sum().backward()
    q, inp = quantizer.weights._modules["weight"], quantizer.inputs._modules["/"]
    std = dense.std(correction=0)
    assert_close([q.lower.item(), q.upper.item()], [-3 * std.item(), 3 * std.item()])
    assert_close(
        [inp.lower.item(), inp.upper.item()], [0.0, (3 * x.std(correction=0) / math.sqrt(1 - 2 / math.pi)).item()]
    )

    w, a = dense.clone().requires_grad_(), x.detach().clone().requires_grad_()
    lw, uw, la, ua = (p.detach().clone().requires_grad_() for p in (q.lower, q.upper, inp.lower, inp.upper))
    w_hat, a_hat = published_ewgs(w, lw, uw, bits, 0.3, True), published_ewgs(a, la, ua, bits, 0.3, False)
    a_hat = a_hat * (ua - la).detach() + la.detach()
    scale = (a @ w.t()).abs().mean() / (a_hat @ w_hat.t()).abs().mean()
    assert_close(q.scale.detach(), scale.detach())
    s = q.scale.detach().clone().requires_grad_()
    expected = nn.functional.linear(a_hat, w_hat * s.abs(), bias)
    assert_close(out, expected)
    (expected * upstream).sum().backward()
    for ours, exact in (
        (layer.weight, w),
        (x, a),
        (q.lower, lw),
        (q.upper, uw),
        (inp.lower, la),
        (inp.upper, ua),
        (q.scale, s),
    ):
        assert_close(ours.grad, exact.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plus", [False, True])
def test_pact_and_dorefa(plus):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3))
    reference = copy.deepcopy(model)
    quantizer = Quantizer(model, "pact", 3, 4, overrides={"*": {"plus": plus}})
    x = torch.randn(50, 20)
    out = model(x)
    first, second = quantizer.inputs._modules["0"], quantizer.inputs._modules["2"]
    scales = [quantizer.weights._modules[key].scale.detach() for key in ("0/weight", "2/weight")]
    assert_close(first.alpha.detach(), torch.minimum(x.abs().max(), 3 * x.std(correction=0)))
    hidden = r2.reference.lsq(x, first.alpha.detach() / 7, 4)
    hidden = nn.functional.linear(
        hidden, r2.reference.dorefa(reference[0].weight, 3) * scales[0], reference[0].bias
    ).relu()
    alpha = second.alpha.detach()
    assert_close(alpha, torch.minimum(hidden.max(), 3 * hidden.std(correction=0) / math.sqrt(1 - 2 / math.pi)).detach())
    assert_close(
        out,
        nn.functional.linear(
            r2.reference.pact(hidden, alpha, 4),
            r2.reference.dorefa(reference[2].weight, 3) * scales[1],
            reference[2].bias,
        ),
    )
    out.sum().backward()
    assert second.alpha.grad.isfinite() and first.alpha.grad != 0
    groups = quantizer.param_groups(alpha_decay=0.1, lr=1.0)
    assert [(len(g["params"]), g["weight_decay"], g["lr"]) for g in groups] == [(2, 0.0, 1.0), (2, 0.1, 1.0)]
    assert {id(p) for p in groups[1]["params"]} == {id(first.alpha), id(second.alpha)}


def test_steps_do_not_cross_zero():
    """An optimizer step through zero: the step is its size, and comes back."""
    model = nn.Sequential(nn.Linear(4, 4))
    quantizer = Quantizer(model, "lsq", 4)
    x = torch.linspace(-1, 1, 32).reshape(8, 4)
    model(x)
    step = quantizer.weights._modules["0/weight"].step
    hats = []
    for value in (0.1, -0.1):
        step.data.fill_(value)
        hats.append(model(x))
    assert torch.equal(*hats)
    step.data.fill_(0)
    assert model(x).isfinite().all() and quantizer.coded()["0.weight"].scale.item() == pytest.approx(FLOOR)
    step.data.fill_(1e-12)
    model(x).square().sum().backward()
    assert step.grad.isfinite()
    quantizer = Quantizer(plain(), "ewgs", 4)
    q = quantizer.weights._modules["0/weight"]
    quantizer.initialize(images()[0])
    q.upper.data.copy_(q.lower - 1)
    assert quantizer._soft(quantizer.layers)[0].isfinite().all()


def test_delta_from_the_hessian():
    """The loss sum c (y - t)^2 / 2 of a linear layer: its Hessian with regard to the weights is known."""
    torch.manual_seed(0)
    layer, x, t = nn.Linear(6, 5, bias=False), torch.randn(40, 6), torch.randn(40, 5)
    quantizer = Quantizer(layer, "ewgs", 4, overrides={"*": {"delta": "hessian"}})
    q = quantizer.weights._modules["weight"]
    assert q.delta == pytest.approx(1e-3)
    quantizer.initialize(x)
    before = values(quantizer)
    quantizer.estimate_delta(lambda: (layer(x) - t).square().sum() / 2, probes=64)
    trace = 5 * x.square().sum()
    hat = quantizer._soft(quantizer.layers)[0].detach().requires_grad_()
    (g,) = torch.autograd.grad((nn.functional.linear(x, hat) - t).square().sum() / 2, hat)
    exact = trace / 30 / (3 * g.std(correction=0)) * 2 * q.scale.abs()
    assert q.delta.item() == pytest.approx(exact.item(), rel=0.15) and layer.weight.grad is None
    before["weights.weight.delta"] = q.delta.clone()
    assert_equal(before, values(quantizer))


def test_delta_of_inputs_and_what_it_needs():
    model, (x, y) = plain(), images()
    quantizer = Quantizer(model, "ewgs", 4, 4, overrides={"4": {"delta": "hessian"}})

    def closure():
        return nn.functional.cross_entropy(model(x), y)

    with pytest.raises(RuntimeError, match="needs a model in train"):
        quantizer.estimate_delta(closure)
    quantizer.initialize(x)
    before = values(model)
    quantizer.estimate_delta(closure, probes=2)
    assert_equal(before, values(model))
    assert quantizer._probe is None and quantizer.inputs._modules["0"].delta == pytest.approx(1e-3)
    assert all(
        m._modules[k].delta >= 0 and m._modules[k].delta != pytest.approx(1e-3)
        for m, k in ((quantizer.inputs, "4"), (quantizer.weights, "4/weight"))
    )
    for bad, error in (
        ({"probes": 0}, "probes must be an int >= 1, got 0"),
        ({"epsilon": 0.0}, "epsilon must be a finite number > 0, got 0"),
    ):
        with pytest.raises(ValueError, match=error):
            quantizer.estimate_delta(closure, **bad)
    quantizer = Quantizer(plain(), "lsq", 4)
    quantizer.initialize(x)
    with pytest.raises(ValueError, match='method "ewgs" and delta "hessian"'):
        quantizer.estimate_delta(closure)


def test_delta_before_a_batch_norm():
    """Its buffers are restored once the gradients, which need them as they were, have been taken."""
    model, (x, y) = plain(), images()
    quantizer = Quantizer(model, "ewgs", 4, 4, overrides={"*": {"delta": "hessian"}})
    quantizer.initialize(x)
    before = values(model)
    quantizer.estimate_delta(lambda: nn.functional.cross_entropy(model(x), y), probes=1)
    assert_equal(before, values(model))
    assert quantizer.weights._modules["0/weight"].delta != pytest.approx(1e-3)
