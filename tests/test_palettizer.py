"""Palettizer: attaches to any model, trains it on soft weights, leaves hard ones."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import r2kernels as r2
from r2kernels import Palettizer, RangeRegularizer


class Net(nn.Module):
    """Convolutions, an embedding tied to the head, attention; `checkpointed` computes the body again in backward."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight
        self.checkpointed = checkpointed

    def body(self, x):
        x = self.conv(x.transpose(1, 2)).transpose(1, 2).relu()
        return x + self.attention(x, x, x, need_weights=False)[0]

    def forward(self, tokens):
        x = self.embed(tokens)
        x = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        return self.head(x)


def net(seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options)


def plain(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))


def images(seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(8, 2, 6, 6, generator=g), torch.randint(10, (8,), generator=g)


def tokens():
    return torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(2))


def train(model, palettizer, steps=4, optimizer=torch.optim.SGD, **options):
    x, y = images()
    opt = optimizer(model.parameters(), **{"lr": 0.05, **options})
    losses = []
    for _ in range(steps):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        palettizer.step()
        losses.append(loss.item())
    return losses


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
    kept = [c.clone() for c in palettizer._fresh]
    with torch.no_grad():
        model(x)
    model.eval()
    model(x)
    model.train()
    assert all(torch.equal(a, b) for a, b in zip(kept, palettizer._fresh, strict=True))
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
        assert palettizer._hats is not None
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
        palettizer = Palettizer(
            model, 2, overrides={"3": {"lut_dtype": "int8", "group_size": 5, "per_channel_scale": True}}
        )
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
    assert len(model[0](x).unique()) > 1 and palettizer._inside is False


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
    assert palettizer._hard_of is not None and torch.equal(model(x), first)
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


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_dim": 2},
        {"cluster_dim": 4, "layout": "contiguous"},
        {"metric": "sqeuclidean", "gradient": "last"},
        {"gradient": "implicit", "tau": 0.05},
        {"group_size": 3},
        {"group_size": 4, "cluster_dim": 2},
        {"per_channel_scale": True},
        {"lut_dtype": "fp16"},
        {"lut_dtype": "int8", "per_channel_scale": True},
        {"tau": lambda step: 0.1 / (1 + step)},
        {"tau": 0.02},
    ],
    ids=str,
)
def test_options(options):
    model = plain()
    palettizer = Palettizer(model, 2, **options)
    losses = train(model, palettizer, 12, torch.optim.Adam, lr=1e-2)
    assert losses[-1] < losses[0]
    x, _ = images()
    model.eval()
    hard = model(x)
    sizes = palettizer.sizes()
    for layer in palettizer.layers:
        size, w = sizes[layer.name], layer.weight()
        assert size.dense == w.nbytes and 0 < size.coded <= size.packed + len(sizes) and size.packed < size.dense
        assert size.codes == pytest.approx(w.numel() // palettizer.layers[0].options.cluster_dim * 2 / 8, abs=8)
    groups = [len(palettizer._clustered(layer).entries) for layer in palettizer.layers]
    palettizer.remove()
    assert_close(model(x), hard)
    d = options.get("cluster_dim", 1)
    for count, p in zip(groups, (model[0].weight, model[3].weight), strict=True):
        rows = r2.reference.columns(p.detach(), d, options.get("layout", "output")).t()
        if not options.get("per_channel_scale") and "group_size" not in options:
            assert len(rows.unique(dim=0)) <= 4 * count


def test_lut_dtypes_are_what_is_stored():
    for lut_dtype, grid in (
        ("fp16", lambda c: c.half().float()),
        ("int8", lambda c: (c / (c.abs().max() / 127)).round() * (c.abs().max() / 127)),
    ):
        model = plain()
        palettizer = Palettizer(model, 2, lut_dtype=lut_dtype)
        model.eval()
        model(images()[0])
        for layer in palettizer.layers:
            lut = palettizer._clustered(layer).luts()[0]
            assert_close(lut, grid(palettizer.centroids._buffers[layer.key][0]))
            assert set(palettizer._hard([layer])[0].unique().tolist()) <= set(lut.flatten().tolist())


def test_rounding_of_the_table_is_seen_in_training():
    """Sharp attention: W_hat are entries of the rounded table."""
    model = plain()
    palettizer = Palettizer(model, 2, tau=1e-7, iterations=1, lut_dtype="int8")
    hat = palettizer._soft(palettizer.layers)[0][0]
    lut = palettizer._clustered(palettizer.layers[0]).luts().flatten()
    assert_close((hat.detach().flatten()[:, None] - lut).abs().amin(1), torch.zeros(hat.numel()), atol=1e-6, rtol=0)


def test_temperatures():
    """Geometric from start to end; a function; "auto" follows the spacing of the centroids and their unit."""

    def taus(tau, steps, **options):
        model = plain()
        palettizer = Palettizer(model, 2, tau=tau, **options)
        found = []
        for _ in range(steps):
            found.append(next(palettizer.taus.buffers())[0].item())
            palettizer.step()
        return found

    assert taus((0.1, 0.001, 2), 5) == pytest.approx([0.1, 0.01, 0.001, 0.001, 0.001])
    assert taus(lambda step: 1.0 + step, 3) == [1, 2, 3]
    assert taus(0.5, 2) == [0.5, 0.5]
    model = plain()
    c = next(Palettizer(model, 2).centroids.buffers())[0, :, 0].sort().values
    gaps = c.diff()
    nearest = torch.minimum(torch.cat([gaps[:1], gaps]), torch.cat([gaps, gaps[-1:]])).mean().item()
    assert taus("auto", 1) == pytest.approx([nearest / 10]) and taus("auto", 1, metric="sqeuclidean") == pytest.approx(
        [(nearest / 10) ** 2]
    )


def test_gap_shrinks_as_tau_does():
    gaps = []
    for tau in (0.1, 0.01, 1e-3, 1e-6):
        palettizer = Palettizer(plain(), 2, tau=tau, iterations=1)
        gaps.append(sum(palettizer.gap().values()))
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-2 < gaps[0]


def test_overrides():
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        palettizer = Palettizer(
            model,
            2,
            overrides={
                "attention*": "skip",
                "attention.in_proj_weight": {"bits": 3},
                "conv": {"bits": 1, "cluster_dim": 2},
            },
        )
    found = {layer.name: layer.options for layer in palettizer.layers}
    assert found.keys() == {"embed.weight", "conv.weight", "attention.in_proj_weight"}
    assert (
        found["embed.weight"].bits,
        found["conv.weight"].bits,
        found["conv.weight"].cluster_dim,
        found["attention.in_proj_weight"].bits,
    ) == (2, 1, 2, 3)


def test_small_layers_stay_dense():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 100))
    with pytest.warns(UserWarning, match=r"0.weight stays dense: it has 9 rows of 1 for 16 centroids"):
        palettizer = Palettizer(model, 4)
    assert [layer.name for layer in palettizer.layers] == ["1.weight"]


def test_model_state_leaves_out_what_is_clustered():
    model = net()
    palettizer = Palettizer(model, 2, overrides={"conv": "skip"})
    assert set(palettizer.model_state()) == {
        "conv.weight",
        "conv.bias",
        "attention.in_proj_bias",
        "attention.out_proj.bias",
    }


BAD = [
    ({"bits": 0}, ValueError, "bits of the model must be an int in 1..8, got 0"),
    ({"bits": 9}, ValueError, "got 9"),
    ({"bits": 2.0}, TypeError, "got 2.0"),
    ({"bits": True}, TypeError, "got True"),
    ({"cluster_dim": 0}, ValueError, "cluster_dim of the model must be an int >= 1, got 0"),
    ({"group_size": 0}, ValueError, "group_size of the model must be an int >= 1, got 0"),
    ({"layout": "rows"}, ValueError, "layout of the model must be one of"),
    ({"lut_dtype": "fp8"}, ValueError, "lut_dtype of the model must be one of"),
    ({"per_channel_scale": 1}, TypeError, "per_channel_scale of the model"),
    ({"tau": 0.0}, ValueError, "tau of the model must be a finite number > 0, got 0"),
    ({"tau": (1.0, 2.0)}, ValueError, r'"auto", a number, \(start, end, steps\)'),
    ({"tau": "soft"}, TypeError, "tau of the model must be a number"),
    ({"metric": "cosine"}, ValueError, "metric must be one of"),
    ({"gradient": "no"}, ValueError, "gradient must be one of"),
    ({"iterations": 0}, ValueError, "iterations must be"),
    ({"overrides": ["conv"]}, TypeError, "overrides must be a dict"),
    ({"overrides": {"0": 3}}, TypeError, r"overrides\['0'\] must be a dict of options or \"skip\", got 3"),
    ({"overrides": {"0": {"bit": 3}}}, ValueError, r"overrides\['0'\] has no option 'bit'; allowed are"),
    ({"overrides": {"0": {"bits": 0}}}, ValueError, "bits of 0.weight must be an int in 1..8, got 0"),
    ({"overrides": {"nothing": "skip"}}, ValueError, r"overrides\['nothing'\] matches no weight"),
    ({"overrides": {"*": "skip"}}, ValueError, "no weight left to cluster"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[str(o) for o, _, _ in BAD])
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        Palettizer(plain(), **{"bits": 2, **options})


def test_two_processes_agree(tmp_path):
    """Under DDP both ranks keep the same centroids, and the same as one process with the whole batch."""
    torch.multiprocessing.spawn(_rank, (tmp_path,), nprocs=2)
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


def _rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = plain()
    palettizer = Palettizer(model, 2)
    wrapped = nn.parallel.DistributedDataParallel(model)
    x, y = images()
    half = slice(rank * 4, rank * 4 + 4)
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        opt.zero_grad()
        nn.functional.cross_entropy(wrapped(x[half]), y[half]).backward()
        opt.step()
        palettizer.step()
    torch.save({**model.state_dict(), **palettizer.state_dict()}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
