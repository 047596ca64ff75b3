"""Quantizer: attaches to any model, trains it on quantized weights and activations, leaves quantized weights."""

import copy
import math

import pytest
import torch
from nn.attached import images, net, tokens
from nn.quantized import METHODS, Branching, assert_equal, plain, train, train_branching_rank, train_rank, values
from torch import nn
from torch.testing import assert_close

import r2kernels as r2
from r2kernels import Quantizer, RangeRegularizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("bits", [(4, 4), (2, None), (1, 1), (8, 8)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_trains(method, bits):
    """The loss falls, evaluation runs on the same levels, and what is left has as many as it may."""
    model = plain()
    quantizer = Quantizer(model, method, *bits)
    losses = train(model, quantizer, 25, lr=0.005)
    assert losses[-1] < losses[0] and all(math.isfinite(loss) for loss in losses)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [*model.parameters(), *quantizer.parameters()])
    soft = quantizer._soft(quantizer.layers)
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


@pytest.mark.parametrize("method", METHODS)
def test_the_first_batch_changes_nothing_else(method):
    """The run that sets steps and bounds leaves buffers and random numbers as they were.

    Full precision before it in eval; a later batch sets nothing.
    """
    model, other, x = plain(), plain(), images()[0]
    quantizer = Quantizer(model, method, 4, 4)
    model.eval(), other.eval()
    with pytest.warns(UserWarning, match=r"0\.weight and 1 more run in full precision"):
        out = model(x)
    assert torch.equal(out, other(x)) and not any(quantizer._is_started)
    with pytest.raises(RuntimeError, match=r"ranges of 0\.weight have no values"):
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
    """Attention, a tied head and a layer called by keyword.

    One quantizer for the shared weight, one for the input of each layer that is called.
    """
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
    assert second._all_started and all(q.is_started for q in second.inputs.children())
    assert [q.is_signed for q in second.inputs.children()] == [True, False]
    assert train(model, quantizer, 2) == train(other, second, 2)
    assert_equal(values(quantizer), values(second))


def test_parts_of_the_model_called_alone():
    model = plain()
    quantizer = Quantizer(model, "lsq", 4, 4)
    x, _ = images()
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
    assert "weight" not in model[0].__dict__ and not any(quantizer._is_started) and not quantizer._entry
    model(images()[0])
    assert quantizer._all_started


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
    model, calls, original = net(), [], r2.nn.scales.quantizers.sized_lsq

    def counted(x, *args, **options):
        calls.append(1 if isinstance(x, torch.Tensor) else len(x))
        return original(x, *args, **options)

    quantizer = Quantizer(model, "lsq", 4, 4)
    quantizer.initialize(tokens())
    monkeypatch.setattr(r2.nn.scales.quantizers, "sized_lsq", counted)
    model(tokens())
    assert calls == [4, 1, 1]
    model.eval()
    calls.clear()
    model(tokens())
    assert calls == [4, 1, 1]
    with quantizer.frozen():
        model(tokens())
        calls.clear()
        model(tokens())
    assert calls == [1, 1]  # the weights are kept


def test_two_processes_agree(tmp_path):
    """Under DDP both ranks have the same steps and bounds, from the first batch on.

    The average of their gradients is that of the whole batch for the weights.
    """
    torch.multiprocessing.spawn(train_rank, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["start"].keys() == second["start"].keys()
    for when in ("start", "end"):
        assert_equal(first[when], second[when])
    assert not torch.equal(first["start"]["inputs.0.step"], first["end"]["inputs.0.step"])
    assert_close(first["average"], (first["local"] + second["local"]) / 2)
    assert not torch.equal(first["local"], second["local"])


def test_two_processes_agree_where_one_alone_reaches_a_layer(tmp_path):
    """The range of its input starts there; also where the quantizer is a part of the model."""
    torch.multiprocessing.spawn(train_branching_rank, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for own in (False, True):
        assert_equal(first[own], second[own])
        assert first[own]["inputs.b.started"] and not torch.equal(
            first[own]["weights.b/weight.step"], Quantizer(Branching(False), "lsq", 4).weights._modules["b/weight"].step
        )
