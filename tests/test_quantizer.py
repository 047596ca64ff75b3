"""Quantizer: attaches to any model, trains it on quantized weights and activations, leaves quantized weights."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import r2kernels as r2
from r2kernels import LearnableCoefficient, Quantizer, RangeRegularizer
from r2kernels.nn.scales import FLOOR
from r2kernels.reference.parameters import levels

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = ("lsq", "ewgs", "pact")


class Net(nn.Module):
    """Convolutions, an embedding tied to the head, attention; `checkpointed` computes the body again in backward."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight
        self.drop, self.checkpointed = nn.Dropout(0.2), checkpointed

    def body(self, x):
        x = self.conv(input=x.transpose(1, 2)).transpose(1, 2).relu()
        return self.drop(x + self.attention(x, x, x, need_weights=False)[0])

    def forward(self, tokens):
        x = self.embed(tokens)
        x = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        return self.head(x)


def net(seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options)


def plain(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))


def images(seed=1, count=8):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 6, 6, generator=g), torch.randint(10, (count,), generator=g)


def tokens():
    return torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(2))


def train(model, quantizer, steps=10, lr=0.02, run=None):
    x, y = images()
    optimizer = torch.optim.SGD([{"params": model.parameters()}, *quantizer.param_groups()], lr=lr, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy((run or model)(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def values(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("bits", [(4, 4), (2, None), (1, 1), (8, 8)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_trains(method, bits):
    """The loss falls, evaluation runs on the same levels, and what is left has as many as it may."""
    model = plain()
    quantizer = Quantizer(model, method, *bits)
    losses = train(model, quantizer, 25, lr=0.005)
    assert losses[-1] < losses[0] and all(math.isfinite(loss) for loss in losses)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [*model.parameters(), *quantizer.parameters()])
    soft = quantizer._soft_all()
    for layer, a, b in zip(quantizer.layers, soft, quantizer._hard(quantizer.layers), strict=True):
        assert_close(a, b)
        assert len(b.unique()) <= 2 ** bits[0] and layer.weight() in set(model.parameters())
    x, _ = images()
    model.eval()
    out = model(x)
    assert torch.equal(model(x), out)
    quantizer.remove()
    assert (bits[1] is None) == torch.equal(model(x), out)  # the inputs are no longer quantized
    assert not model._forward_pre_hooks and not model[0]._forward_pre_hooks and "weight" not in model[0].__dict__
    assert all(len(w.unique()) <= 2 ** bits[0] for w in (model[0].weight, model[4].weight))


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
    """torch._fake_quantize_learnable_per_tensor_affine masks after rounding: points on the half step at each end are left out, and those at ties."""
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


def test_param_groups():
    for method, count in (("lsq", 4), ("ewgs", 10), ("pact", 4)):
        quantizer = Quantizer(plain(), method, 4, 4)
        groups = quantizer.param_groups(lr=0.5)
        assert all(g["lr"] == 0.5 and g["weight_decay"] == 0 for g in groups)
        assert sum(len(g["params"]) for g in groups) == len(list(quantizer.parameters())) == count
        assert quantizer.param_groups(weight_decay=0.3)[0]["weight_decay"] == 0.3


@pytest.mark.parametrize("method", METHODS)
def test_the_first_batch_changes_nothing_else(method):
    """The run that sets the ranges leaves buffers and random numbers as they were; full precision before it in eval; a later batch sets nothing."""
    model, other, x = plain(), plain(), images()[0]
    quantizer = Quantizer(model, method, 4, 4)
    model.eval(), other.eval()
    assert torch.equal(model(x), other(x)) and not quantizer._started
    with pytest.raises(RuntimeError, match="ranges have no values"):
        quantizer.coded()
    model.train()
    before, state = values(model), torch.get_rng_state()
    quantizer.initialize(x)
    assert_equal(before, values(model))
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in quantizer.parameters())
    started = values(quantizer)
    second = Quantizer(other.train(), method, 4, 4)
    assert torch.equal(model(x), other(x))
    assert_equal(started, values(second))
    assert model[1].num_batches_tracked == 1
    model(3 * x)
    assert_equal(started, values(quantizer))
    quantizer.initialize(3 * x)
    size = {"lsq": "step", "ewgs": "upper", "pact": "alpha"}[method]
    assert_close(values(quantizer)[f"inputs.0.{size}"], 3 * started[f"inputs.0.{size}"])


def test_every_use_of_a_weight():
    """Attention, a tied head and a layer called by keyword; one quantizer for the shared weight, an input for each layer that is called."""
    model = net()
    quantizer = Quantizer(model, "lsq", 2, 4)
    assert {layer.name for layer in quantizer.layers} == {
        "conv.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "head.weight",
    }
    assert list(quantizer.inputs._modules) == ["conv", "head"]
    model(tokens()).sum().backward()
    assert quantizer.inputs._modules["conv"].is_started and quantizer.inputs._modules["conv"].step.grad is not None
    model.eval()
    out = model(tokens())
    hats = {layer.name: hat for layer, hat in zip(quantizer.layers, quantizer._hard(quantizer.layers), strict=True)}
    quantizer.remove()
    for name, hat in hats.items():
        assert torch.equal(model.get_parameter(name), hat)
    assert model.embed.weight is model.head.weight and out.shape == (3, 7, 40)


@pytest.mark.parametrize("method", METHODS)
def test_activation_checkpointing(method):
    """A recomputed forward changes nothing, in the first step too."""
    grads = []
    for checkpointed in (False, True):
        model = net(checkpointed=checkpointed)
        quantizer = Quantizer(model, method, 4, 4)
        torch.manual_seed(3)
        for _ in range(2):
            model(tokens()).square().sum().backward()
        before = values(quantizer)
        grads.append(
            [p.grad for p in [*model.parameters(), *quantizer.parameters()] if p.grad is not None]
            + list(before.values())
        )
    assert len(grads[0]) == len(grads[1])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method):
    model = plain()
    quantizer = Quantizer(model, method, 4, 4)
    x, y = images()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    nn.functional.cross_entropy(out.float(), y).backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in [*model.parameters(), *quantizer.parameters()]
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_dtypes(method, dtype):
    model = plain().to(dtype)
    quantizer = Quantizer(model, method, 3, 3)
    model(images()[0].to(dtype)).sum().backward()
    assert model[0].weight.grad.dtype == dtype
    assert {p.dtype for p in quantizer.parameters()} == {torch.float64 if dtype == torch.float64 else torch.float32}
    quantizer.remove()
    assert len(model[0].weight.unique()) <= 8 and model[0].weight.dtype == dtype


def test_gradient_accumulation():
    """Two halves of a batch give the gradients of the whole: a forward changes no state."""
    grads = []
    for parts in (1, 2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 9), nn.ReLU(), nn.Linear(9, 4))
        quantizer = Quantizer(model, "lsq", 4, None)
        x = torch.linspace(-2, 2, 160).reshape(8, 20)
        for part in x.chunk(parts):
            model(part).square().sum().backward()
        grads.append([p.grad for p in [*model.parameters(), *quantizer.parameters()]])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("method", METHODS)
def test_compiled_equals_eager(method, mode):
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = plain()
        quantizer = Quantizer(model, method, 4, 4)
        quantizer.initialize(images()[0])
        getattr(model, mode)()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        outs = [run(images()[0])]
        if mode == "train":
            outs[0].square().sum().backward()
            outs += [p.grad for p in [*model.parameters(), *quantizer.parameters()]]
        results.append([*outs, run(images(2)[0])])
        copy.deepcopy(model)
    for a, b in zip(*results, strict=True):
        assert_close(a, b)


def test_compiled_from_the_first_batch_on():
    """Without fullgraph nothing needs to be called first."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = plain()
        quantizer = Quantizer(model, "lsq", 4, 4)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        results.append([*train(model, quantizer, 3, run=run), *[p.detach() for p in quantizer.parameters()]])
    for a, b in zip(*results, strict=True):
        assert_close(a, b)


def test_deepcopy():
    model = plain()
    quantizer = Quantizer(model, "ewgs", 4, 4)
    out = model(images()[0])
    both = copy.deepcopy((model, quantizer))
    out.sum().backward()
    assert both[0][0].weight is not model[0].weight and both[1].layers[0].weight() is both[0][0].weight
    model[1].reset_running_stats(), both[0][1].reset_running_stats()
    assert torch.equal(both[0](images()[0]), model(images()[0]))
    train(both[0], both[1], 2)
    assert not torch.equal(both[0](images()[0]), model(images()[0])) and torch.equal(model(images()[0]), out)
    assert not torch.equal(next(both[1].parameters()), next(quantizer.parameters()))
    assert next(both[1].parameters())._post_accumulate_grad_hooks


@pytest.mark.parametrize("method", METHODS)
def test_state_dict_round_trip(method):
    """What is loaded has started, and goes on as if it had not been cut."""
    model, other = plain(), plain(seed=5)
    quantizer, second = Quantizer(model, method, 4, 4), Quantizer(other, method, 4, 4)
    train(model, quantizer, 2)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(quantizer.state_dict())
    assert second._started and all(q.is_started for q in second.inputs.children())
    assert [q.is_signed for q in second.inputs.children()] == [True, False]
    assert train(model, quantizer, 2) == train(other, second, 2)
    assert_equal(values(quantizer), values(second))


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
    assert quantizer._soft_all()[0].isfinite().all()


def test_parts_of_the_model_called_alone():
    model = plain()
    quantizer = Quantizer(model, "lsq", 4, 4)
    x, _ = images()
    assert torch.equal(model[0](x), plain()[0](x))  # full precision before the first batch
    whole = model(x)
    parts = x
    for layer in model:
        parts = layer(parts)
    assert_close(parts, whole)
    parts.sum().backward()
    assert quantizer.weights._modules["0/weight"].step.grad is not None


def test_an_error_in_the_first_forward_leaves_all_as_it_was():
    model = plain()
    quantizer = Quantizer(model, "lsq", 4, 4)
    before = values(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(8, 3, 6, 6))
    assert_equal(before, values(model))
    assert "weight" not in model[0].__dict__ and not quantizer._started and not quantizer._inside
    model(images()[0])
    assert quantizer._started


def test_layers_that_the_first_batch_does_not_reach():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.both = nn.Linear(4, 4), nn.Linear(4, 4), False

        def forward(self, x):
            x = self.a(x)
            return self.b(x) if self.both else x

    for method in METHODS:
        model = Two()
        quantizer = Quantizer(model, method, 4, 4)
        x = torch.linspace(-1, 1, 32).reshape(8, 4)
        model(x)
        assert [q.is_started for q in quantizer.inputs.children()] == [True, False]
        model.both = True
        model(x).sum().backward()
        assert all(q.is_started for q in quantizer.inputs.children()) and model.b.weight.grad is not None


def test_layers_that_share_a_weight():
    """One range for the weight, which gets the gradients of both; an input for each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    model[2].weight = model[0].weight
    quantizer = Quantizer(model, "ewgs", 4, 4)
    assert [layer.name for layer in quantizer.layers] == ["0.weight", "4.weight"] and list(
        quantizer.inputs._modules
    ) == ["0", "2", "4"]
    x = torch.randn(9, 6)
    out = model(x)
    out.sum().backward()
    assert all(p.grad is not None for p in [*model.parameters(), *quantizer.parameters()])
    model.eval()
    assert_close(model(x), out)
    quantizer.remove()
    assert model[2].weight is model[0].weight and len(model[0].weight.unique()) <= 16


def test_a_channels_last_model_and_other_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Conv2d(4, 4, 2, groups=2)).to(
        memory_format=torch.channels_last
    )
    twin = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    outs = []
    for some in (model, twin):
        quantizer = Quantizer(some, "lsq", 4, 4, axis=0)
        outs.append((some(x), quantizer._hard(quantizer.layers)))
    assert_close(outs[0][0], outs[1][0])
    for a, b in zip(outs[0][1], outs[1][1], strict=True):
        assert_close(a, b)


def test_overrides():
    model = plain()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantizer = Quantizer(
            model,
            "lsq",
            4,
            4,
            overrides={"0": {"weight_bits": 8, "activation_bits": None, "axis": 0}, "4.*": {"method": "pact"}},
        )
    assert [(layer.options.method, layer.options.weight_bits) for layer in quantizer.layers] == [
        ("lsq", 8),
        ("pact", 4),
    ]
    assert list(quantizer.inputs._modules) == ["4"] and quantizer.weights._modules["0/weight"].step.shape == (8,)
    model(images()[0]).sum().backward()
    assert [layer.name for layer in Quantizer(plain(), "lsq", 4, overrides={"0": "skip"}).layers] == ["4.weight"]


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
    hat = quantizer._soft_all()[0].detach().requires_grad_()
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


def test_range_losses_see_the_dense_weights():
    model = plain()
    before = RangeRegularizer(model, "l_inf", 1.0)()
    Quantizer(model, "lsq", 2)
    model(images()[0])
    assert torch.equal(RangeRegularizer(model, "l_inf", 1.0)(), before)


@pytest.mark.parametrize("attached", ["quantizer", "palettizer"])
def test_gradients_of_the_input_after_inference_mode(attached):
    """The weights that eval() keeps can be saved for backward."""
    model, x = plain(), images()[0]
    if attached == "quantizer":
        Quantizer(model, "lsq", 4).initialize(x)
    else:
        r2.Palettizer(model, 2)
    model.eval()
    with torch.inference_mode():
        out = model(x)
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad.any() and torch.equal(model(x), out)


def test_all_weights_are_one_call(monkeypatch):
    """And every input one of its own."""
    model, calls, original = net(), [], r2.nn.ranges.quantizers.lsq

    def counted(x, *args, **options):
        calls.append(1 if isinstance(x, torch.Tensor) else len(x))
        return original(x, *args, **options)

    quantizer = Quantizer(model, "lsq", 4, 4)
    quantizer.initialize(tokens())
    monkeypatch.setattr(r2.nn.ranges.quantizers, "lsq", counted)
    model(tokens())
    assert calls == [4, 1, 1]
    model.eval()
    model(tokens())
    calls.clear()
    model(tokens())
    assert calls == [1, 1]  # the weights are kept


def test_errors_and_sizes():
    model = plain()
    quantizer = Quantizer(model, "lsq", 4, axis=0)
    quantizer.initialize(images()[0])
    size = quantizer.sizes()["0.weight"]
    assert (size.dense, size.codes, size.luts) == (8 * 18 * 4, 8 * 18 // 2, 8 * 6) and size.coded <= size.packed
    w, hat = model[0].weight.detach(), quantizer._hard(quantizer.layers)[0]
    assert quantizer.errors()["0.weight"] == pytest.approx(((w - hat).norm() / w.norm()).item(), rel=1e-5)
    quantizer.remove(bake=False)
    assert torch.equal(model[0].weight, w)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_is_baked(tmp_path, method, dtype):
    for bits in (1, 3, 8):
        model = plain().to(dtype)
        quantizer = Quantizer(model, method, bits, axis=0 if method == "lsq" else None)
        model(images()[0].to(dtype))
        r2.save_quantized(quantizer, tmp_path / "f", entropy="huffman" if bits == 3 else None)
        found = r2.load_palettized(tmp_path / "f")
        quantizer.remove()
        assert_equal(found, dict(model.state_dict()))


def test_a_tied_model_is_saved_once(tmp_path):
    model = net()
    quantizer = Quantizer(model, "lsq", 4)
    model(tokens())
    r2.save_quantized(quantizer, tmp_path / "f")
    found = r2.load_palettized(tmp_path / "f")
    assert found["embed.weight"] is found["head.weight"]
    quantizer.remove()
    assert_equal(found, dict(model.state_dict()))


def test_learnable_coefficient():
    """omega moves to log(strength / R)."""
    coefficient = LearnableCoefficient(0.5, init=1.0)
    R = torch.tensor(2.0, requires_grad=True)
    loss = coefficient(R)
    loss.backward()
    e = math.exp(1.0)
    assert (
        loss.item() == pytest.approx(e * 2 - 0.5)
        and R.grad.item() == pytest.approx(e)
        and coefficient.omega.grad.item() == pytest.approx(2 * e - 0.5)
    )
    optimizer = torch.optim.SGD(coefficient.param_groups(lr=0.5))
    for _ in range(200):
        optimizer.zero_grad()
        coefficient(R.detach()).backward()
        optimizer.step()
    assert (
        coefficient.omega.item() == pytest.approx(math.log(0.25), abs=1e-4)
        and optimizer.param_groups[0]["weight_decay"] == 0
    )
    for bad in (0, -1.0, math.inf):
        with pytest.raises(ValueError, match="strength must be a finite number > 0"):
            LearnableCoefficient(bad)
    with pytest.raises(TypeError, match="init must be a number"):
        LearnableCoefficient(1.0, init="0")


BAD = [
    ({"method": "sgd"}, ValueError, r"method of the model must be one of \('lsq', 'ewgs', 'pact'\), got 'sgd'"),
    ({"weight_bits": 0}, ValueError, r"weight_bits of the model must be an int in 1..8, got 0"),
    ({"weight_bits": 9}, ValueError, "got 9"),
    ({"weight_bits": None}, TypeError, "weight_bits of the model must be an int in 1..8, got None"),
    ({"weight_bits": 4.0}, TypeError, "got 4.0"),
    ({"activation_bits": 0}, ValueError, "activation_bits of the model must be an int in 1..8, got 0"),
    ({"activation_bits": True}, TypeError, "activation_bits of the model must be an int in 1..8, got True"),
    ({"axis": 2}, ValueError, r"axis=2 does not exist: 4.weight has shape \(10, 128\)"),
    ({"axis": "0"}, TypeError, "axis of the model must be an int or None, got '0'"),
    ({"method": "ewgs", "axis": 0}, ValueError, "axis of the model must be None for method 'ewgs'.*got 0"),
    ({"overrides": ["0"]}, TypeError, "overrides must be a dict"),
    ({"overrides": {"0": 3}}, TypeError, r"overrides\['0'\] must be a dict of options or \"skip\", got 3"),
    ({"overrides": {"0": {"bits": 3}}}, ValueError, r"overrides\['0'\] has no option 'bits'; allowed are"),
    ({"overrides": {"0": {"weight_bits": 0}}}, ValueError, "weight_bits of 0.weight must be an int in 1..8, got 0"),
    (
        {"overrides": {"0": {"delta": -1.0}}},
        ValueError,
        'delta of 0.weight must be a finite number >= 0 or "hessian", got -1',
    ),
    ({"overrides": {"0": {"plus": 1}}}, TypeError, "plus of 0.weight must be True or False, got 1"),
    ({"overrides": {"nothing": "skip"}}, ValueError, r"overrides\['nothing'\] matches no weight"),
    ({"overrides": {"*": "skip"}}, ValueError, "Sequential has no weight left to quantize"),
    ({"model": nn.ReLU()}, ValueError, "ReLU has no conv, linear or attention weight"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[str(o) for o, _, _ in BAD])
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        Quantizer(**{"model": plain(), "method": "lsq", "weight_bits": 4, **options})
    with pytest.raises(ValueError, match="step must be a finite number > 0, got -1"):
        r2.lsq(torch.ones(3), -1.0, 4)


def test_two_processes_agree(tmp_path):
    """Under DDP both ranks have the same ranges, from the first batch on; the average of their gradients is that of the whole batch for the weights."""
    torch.multiprocessing.spawn(_rank, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["start"].keys() == second["start"].keys()
    for when in ("start", "end"):
        assert_equal(first[when], second[when])
    assert not torch.equal(first["start"]["inputs.0.step"], first["end"]["inputs.0.step"])
    assert_close(first["average"], (first["local"] + second["local"]) / 2)
    assert not torch.equal(first["local"], second["local"])


def _rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))
    quantizer = Quantizer(model, "lsq", 4, 4)
    wrapped = nn.parallel.DistributedDataParallel(model)
    x, y = images()
    half = slice(rank * 4, rank * 4 + 4)
    optimizer = torch.optim.SGD([{"params": model.parameters()}, *quantizer.param_groups()], lr=0.05)
    result = {}
    for i in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(wrapped(x[half]), y[half])
        if i == 0:
            result["start"] = values(quantizer)
            (result["local"],) = torch.autograd.grad(loss, [quantizer.inputs._modules["0"].step], retain_graph=True)
        loss.backward()
        if i == 0:
            result["average"] = quantizer.inputs._modules["0"].step.grad.clone()
        optimizer.step()
    result["end"] = values(quantizer) | values(model)
    torch.save(result, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
