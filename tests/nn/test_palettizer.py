"""Palettizer: attaches to any model, trains it on soft weights, leaves hard ones."""

import copy
import itertools

import pytest
import torch
from nn.attached import images, net, tokens
from nn.palettized import plain, train, train_rank
from torch import nn
from torch.testing import assert_close

import r2kernels as r2
from r2kernels import Palettizer, RangeRegularizer


def test_forward_is_that_of_the_soft_weights():
    """Every use of a weight sees W_hat: layers, the tied head, and attention, which does not call its output layer."""
    model = net()
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    palettizer = Palettizer(model, 2, tau=0.05)
    assert [layer.name for layer in palettizer.layers] == names
    weights = [model.get_parameter(name) for name in names]
    hats, _ = r2.dkm(weights, [palettizer.centroids._buffers[name.replace(".", "/")][0, :, 0] for name in names], 0.05)
    expected = torch.func.functional_call(net(), dict(zip(names, hats, strict=True)), (tokens(),))
    out = model(tokens())
    assert_close(out, expected)
    for ours, exact in zip(
        torch.autograd.grad(out.square().sum(), weights),
        torch.autograd.grad(expected.square().sum(), weights),
        strict=True,
    ):
        assert_close(ours, exact)
    model.eval()
    hard = dict(zip(names, palettizer._hard(palettizer.layers), strict=True))
    assert_close(model(tokens()), torch.func.functional_call(net().eval(), hard, (tokens(),)))


def test_a_forward_changes_nothing():
    model = plain()
    palettizer = Palettizer(model, 2)
    before = copy.deepcopy([model.state_dict(), palettizer.state_dict()])
    names = [name for name, _ in model.named_parameters()]
    x, _ = images()
    out = [model(x) for _ in range(2)]
    model.eval()
    model(x)
    model.train()
    assert torch.equal(out[0], out[1]) and torch.equal(model(x), out[0])
    for a, b in zip(before, [model.state_dict(), palettizer.state_dict()], strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [name for name, _ in model.named_parameters()] == names and "weight" not in model[0].__dict__


OPTIMIZERS = [
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.Adam, {"lr": 1e-2}),
    (torch.optim.AdamW, {"foreach": True, "lr": 1e-2}),
    (torch.optim.RMSprop, {"lr": 1e-3}),
]


@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS, ids=[o.__name__ for o, _ in OPTIMIZERS])
def test_trains_with_every_optimizer(optimizer, options):
    model = plain()
    palettizer = Palettizer(model, 3)
    losses = train(model, palettizer, 15, optimizer, **options)
    assert losses[-1] < losses[0]
    palettizer.remove()
    assert all(len(p.unique()) <= 8 for p in model.parameters() if p.dim() > 1)


def test_gradient_accumulation_and_evaluation_between():
    """Forwards before a step start from the same centroids; one in eval or without gradients leaves none behind."""
    model = plain()
    palettizer = Palettizer(model, 2)
    x, _ = images()
    model(x).sum().backward()
    kept = [c.clone() for c in palettizer._fresh.values()]
    with torch.no_grad():
        model(x)
    model.eval()
    model(x)
    model.train()
    assert all(torch.equal(a, b) for a, b in zip(kept, palettizer._fresh.values(), strict=True))
    model(x).sum().backward()
    palettizer.step()
    for c, buffer in zip(kept, palettizer.centroids.buffers(), strict=True):
        assert torch.equal(c, buffer)
    palettizer.step()  # nothing new: nothing changes
    for c, buffer in zip(kept, palettizer.centroids.buffers(), strict=True):
        assert torch.equal(c, buffer)


def test_activation_checkpointing():
    grads = []
    for checkpointed in (False, True):
        model = net(checkpointed=checkpointed)
        palettizer = Palettizer(model, 2)
        model(tokens()).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        assert palettizer._hats[0] is not None
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)


def test_autocast():
    model = plain()
    palettizer = Palettizer(model, 2)
    x, y = images()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    nn.functional.cross_entropy(out.float(), y).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    palettizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes(dtype):
    model = plain().to(dtype)
    palettizer = Palettizer(model, 2, lut_dtype="fp16" if dtype == torch.float16 else "fp32")
    model(images()[0].to(dtype)).sum().backward()
    palettizer.step()
    assert model[0].weight.grad.dtype == dtype
    assert next(palettizer.centroids.buffers()).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    palettizer.remove()
    assert len(model[0].weight.unique()) <= 4


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compiled_equals_eager(mode):
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = plain()
        groups = {"lut_dtype": "int8", "group_size": 5, "per_channel_scale": True}
        tiles = {"lut_dtype": "fp8", "granularity": (8, 10)}
        palettizer = Palettizer(model, 2, overrides={"0": tiles, "3": groups})
        getattr(model, mode)()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        outs = []
        for _ in range(3):
            out = run(images()[0])
            outs.append(out)
            if mode == "train":
                model.zero_grad()
                out.square().sum().backward()
                outs += [p.grad.clone() for p in model.parameters()]
                palettizer.step()
        results.append(outs)
        copy.deepcopy(model)
    for a, b in zip(*results, strict=True):
        assert_close(a, b)


def test_deepcopy_between_forward_and_backward():
    model = plain()
    palettizer = Palettizer(model, 2)
    out = model(images()[0])
    both = copy.deepcopy((model, palettizer))
    out.sum().backward()
    assert both[0][0].weight is not model[0].weight and both[1].layers[0].weight() is both[0][0].weight
    assert torch.equal(both[0](images()[0]), out)
    train(both[0], both[1], 2)
    assert not torch.equal(both[0](images()[0]), model(images()[0]))
    assert torch.equal(model(images()[0]), out)


def test_state_dict_round_trip():
    """A training that is cut and resumed gives the same as one that is not."""
    model, other = plain(), plain(seed=5)
    options = {"tau": (0.1, 0.001, 8)}
    palettizer, second = Palettizer(model, 2, **options), Palettizer(other, 2, **options)
    train(model, palettizer, 3)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(palettizer.state_dict())
    assert train(model, palettizer, 3) == train(other, second, 3)
    for a, b in zip(palettizer.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_parts_of_the_model_called_alone():
    model = plain()
    palettizer = Palettizer(model, 2)
    x, _ = images()
    whole = model(x)
    parts = x
    for layer in model:
        parts = layer(parts)
    assert_close(parts, whole)
    parts.sum().backward()
    assert model[0].weight.grad is not None
    model.eval()
    assert len(model[0](x).unique()) > 1 and not palettizer._entry


def test_an_error_in_a_forward_leaves_the_model_as_it_was():
    model = plain()
    Palettizer(model, 2)
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 2, 3, 3))
    assert "weight" not in model[0].__dict__
    model(images()[0])


def test_the_hard_weights_follow_every_change_in_eval():
    model = plain()
    palettizer = Palettizer(model, 2)
    model.eval()
    x, _ = images()
    first = model(x)
    assert torch.equal(model(x), first)
    with torch.no_grad():
        model[0].weight.mul_(2)
    second = model(x)
    assert not torch.equal(first, second)
    with torch.no_grad():
        next(palettizer.centroids.buffers()).mul_(2)
    assert not torch.equal(second, model(x))


def test_range_losses_see_the_dense_weights():
    model = plain()
    reg = RangeRegularizer(model, "l_inf", 1.0)
    before = reg()
    Palettizer(model, 1)
    model(images()[0])
    assert torch.equal(reg(), before) and torch.equal(RangeRegularizer(model, "l_inf", 1.0)(), before)


def test_model_state_leaves_out_what_is_clustered():
    model = net()
    palettizer = Palettizer(model, 2, overrides={"conv": "skip"})
    assert set(palettizer.model_state()) == {
        "conv.weight",
        "conv.bias",
        "attention.in_proj_bias",
        "attention.out_proj.bias",
    }


def test_two_processes_agree(tmp_path):
    """Under DDP both ranks keep the same centroids, and the same as one process with the whole batch."""
    torch.multiprocessing.spawn(train_rank, (tmp_path,), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model = plain()
    palettizer = Palettizer(model, 2)
    x, y = images()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        palettizer.step()
    for a, b in itertools.pairwise([*states, {**model.state_dict(), **palettizer.state_dict()}]):
        assert a.keys() == b.keys()
        for key in a:
            assert_close(a[key], b[key], rtol=1e-4, atol=1e-6)
