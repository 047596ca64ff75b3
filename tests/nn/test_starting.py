"""From what ranges start, and when."""

import math
import warnings

import pytest
import torch
from nn.attached import images
from nn.quantized import METHODS, plain
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from r2kernels import LearnableCoefficient, Quantizer, partial_l2

pytestmark = pytest.mark.usefixtures("one_thread")


def step_of(quantizer, key):
    return quantizer.inputs._modules[key].step.item()


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_of_zeros_trains(method, bits):
    """It starts from the range of torch's usual weights, uniform up to 1 / sqrt(fan-in)."""
    model, (x, y) = plain(), images()
    nn.init.zeros_(model[4].weight)
    quantizer = Quantizer(model, method, bits)
    optimizer = torch.optim.SGD([{"params": model.parameters()}, *quantizer.param_groups()], lr=0.1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(cross_entropy(model(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0] and len(model[4].weight.unique()) > 2


def test_the_usual_range_of_zeros():
    model = nn.Sequential(nn.Linear(100, 3))
    nn.init.zeros_(model[0].weight)
    quantizer = Quantizer(model, "lsq", 8)
    quantizer.initialize(torch.randn(4, 100))
    assert_close(quantizer.weights._modules["0/weight"].step.item(), 2 * 0.05 / math.sqrt(127))


def test_zeros_at_an_input_start_nothing():
    """The first batch that is not zero does."""
    model = nn.Sequential(nn.Linear(4, 4))
    quantizer = Quantizer(model, "lsq", 8, 8)
    assert torch.equal(model(torch.zeros(2, 4)), model[0].bias.expand(2, 4))
    assert not quantizer.inputs._modules["0"].is_started
    model(torch.full((2, 4), 3.0))
    assert step_of(quantizer, "0") == pytest.approx(2 * 3 / math.sqrt(255))
    model(torch.full((2, 4), 9.0))
    assert step_of(quantizer, "0") == pytest.approx(2 * 3 / math.sqrt(255))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_start_that_is_not_finite_is_an_error(method, bad):
    model, x = plain(), images()[0]
    quantizer = Quantizer(model, method, 4, 4)
    wrong = x.clone()
    wrong[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="the input of 0 has a NaN or an infinity in the batch"):
        model(wrong)
    assert not quantizer.has_started() and "weight" not in model[0].__dict__
    model(x)
    assert quantizer.has_started()
    model[4].weight.data[0, 0] = bad
    with pytest.raises(ValueError, match=r"4\.weight has a NaN or an infinity; its range cannot start"):
        quantizer.initialize(x)
    with pytest.raises(ValueError, match=r"4\.weight has a NaN or an infinity; it cannot be quantized"):
        Quantizer(model, method, 4, replace=True)


def test_a_coefficient_of_nothing_stays_finite():
    coefficient, w = LearnableCoefficient(1.0), torch.zeros(9, requires_grad=True)
    optimizer = torch.optim.SGD(coefficient.parameters(), lr=1.0)
    for _ in range(100):
        optimizer.zero_grad()
        loss = coefficient(partial_l2(w, 0.5))
        loss.backward()
        optimizer.step()
    assert loss.isfinite() and w.grad.isfinite().all() and loss == -60


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        return self.layer(self.layer(x.relu() * 0.1) * 10)


@pytest.mark.parametrize("method", METHODS)
def test_a_start_sees_all_calls_of_a_module(method):
    """The first is not negative, the second is: the range is signed and as wide as both ask for."""
    model, x = Twice(), torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    dense = model(x)
    first, seen = x.relu() * 0.1, []
    quantizer = Quantizer(model, method, 8, 8)
    model.layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out = model(x)
    q = quantizer.inputs._modules["layer"]
    both = torch.cat([first, model.layer(first).detach() * 10])
    assert q.is_signed
    if method == "lsq":
        assert_close(q.step.item(), (2 * both.abs().mean() / math.sqrt(127)).item(), rtol=0.02, atol=0)
    assert ((out - dense).norm() / dense.norm()).item() < 0.15  # of the first call alone .765


def test_late_ranges_see_all_calls_too():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.on = nn.Linear(8, 8), nn.Linear(8, 8), False

        def forward(self, x):
            x = self.a(x)
            return self.b(x.abs()) + self.b(-5 * x.abs()) if self.on else x

    model = Late()
    quantizer = Quantizer(model, "lsq", 8, 8)
    x = torch.randn(4, 8)
    model(x)
    model.on = True
    x = model.a(x).detach()
    model(torch.randn(4, 8))
    q = quantizer.inputs._modules["b"]
    assert q.is_started and q.is_signed


def test_negative_values_at_an_unsigned_input_are_told_once():
    model = nn.Sequential(nn.Linear(4, 4))
    quantizer = Quantizer(model, "lsq", 8, 8)
    x = torch.randn(8, 4)
    model(x.abs())
    with pytest.warns(UserWarning, match=r"the input of 0 has negative values \(down to -\d.*Call `initialize`"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    quantizer.initialize(x)
    assert quantizer.inputs._modules["0"].is_signed


def test_eval_and_remove_before_the_start_are_told():
    model, x = plain(), images()[0]
    quantizer = Quantizer(model, "lsq", 2, 2)
    dense = model[4].weight.clone()
    with pytest.warns(UserWarning, match=r"0\.weight and 1 more run in full precision: .* call `initialize`"):
        model.eval()(x)
    quantizer.remove()
    assert torch.equal(model[4].weight, dense)
    other = plain()
    quantizer = Quantizer(other, "lsq", 2, 2)
    with pytest.warns(UserWarning, match=r"0\.weight and 1 more run in full precision"):
        quantizer.remove()


def test_delay_and_observe():
    """3 forwards in full precision, 2 that ranges are taken from, then quantized."""
    model, other = plain(), plain()
    quantizer = Quantizer(model, "lsq", 4, 4, delay=3, observe=2)
    batches = [images(seed)[0] * (seed + 1) for seed in range(6)]
    for x in batches[:5]:
        assert not quantizer.has_started() and torch.equal(model(x), other(x))
    seen = torch.cat(batches[3:5])
    assert quantizer.has_started()
    assert_close(step_of(quantizer, "0"), (2 * seen.abs().mean() / math.sqrt(7)).item())
    assert not torch.equal(model(batches[5]), other(batches[5]))
    resumed = plain()
    again = Quantizer(resumed, "lsq", 4, 4, delay=3, observe=2)
    again.load_state_dict(quantizer.state_dict()), resumed.load_state_dict(model.state_dict())
    assert torch.equal(resumed.eval()(x), model.eval()(x)) and again.waited.tolist() == [5, 5]


def test_enable():
    model, x = plain(), images()[0]
    quantizer = Quantizer(model, "lsq", 2, 2)
    full = plain().eval()(x)
    quantizer.initialize(x)
    model.eval()
    both = model(x)
    quantizer.enable(weights=False, activations=False)
    assert torch.equal(model(x), full)
    quantizer.enable(weights=True)
    weights = model(x)
    quantizer.enable(weights=False, activations=True)
    activations = model(x)
    assert len({t.sum().item() for t in (both, full, weights, activations)}) == 4
    quantizer.enable(weights=True)
    assert torch.equal(model(x), both)
    with pytest.raises(TypeError, match=r"weights must be True, False or None, got 1\.5"):
        quantizer.enable(weights=1.5)


def test_frozen_ranges_do_not_learn():
    model, (x, y) = plain(), images()
    quantizer = Quantizer(model, "lsq", 4, 4)
    quantizer.freeze("0")
    optimizer = torch.optim.SGD([{"params": model.parameters()}, *quantizer.param_groups()], lr=0.1)
    model(x)
    before = {name: p.clone() for name, p in quantizer.named_parameters()}
    for _ in range(2):
        cross_entropy(model(x), y).backward()
        optimizer.step()
    moved = {name for name, p in quantizer.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"weights.4/weight.step", "inputs.4.step"}
    quantizer.freeze(frozen=False)
    assert all(p.requires_grad for p in quantizer.parameters())
    with pytest.raises(ValueError, match="'x' matches no quantized weight or input"):
        quantizer.freeze("x")


@pytest.mark.parametrize("parts", [2, 8])
def test_the_gradient_of_a_step_does_not_depend_on_how_the_batch_is_divided(parts):
    model, (x, y) = plain().eval(), images()
    model.train()
    model[1].eval()
    quantizer = Quantizer(model, "lsq", 4, 4)
    quantizer.initialize(x)

    def gradients(count):
        quantizer.zero_grad()
        for some, labels in zip(x.chunk(count), y.chunk(count), strict=True):
            (cross_entropy(model(some), labels) / count).backward()
        return [p.grad for p in quantizer.parameters()]

    assert_close(gradients(parts), gradients(1))


def test_half_precision_with_a_scaler():
    """fp16 weights and activations, as autocast and GradScaler leave them."""
    model, (x, y) = plain(), images()
    quantizer = Quantizer(model, "lsq", 4, 4)
    optimizer = torch.optim.SGD([{"params": model.parameters()}, *quantizer.param_groups()], lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(p.dtype == torch.float32 for p in quantizer.parameters())
