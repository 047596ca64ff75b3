"""Palettizer: what its options do and what they may be, layer by layer."""

import warnings

import pytest
import torch
from nn.attached import images, net
from nn.palettized import plain, train
from torch import nn
from torch.testing import assert_close

import r2kernels as r2
from r2kernels import Palettizer
from r2kernels.files.loading import load_palettized
from r2kernels.reference.dkm import spacing


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
        {"lut_dtype": "bf16", "granularity": "channel"},
        {"granularity": (4, 8), "cluster_dim": 2},
        {"granularity": (4, 6), "lut_dtype": "fp8", "per_channel_scale": True},
        {"granularity": (None, 6), "lut_dtype": "int8"},
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
        if not options.get("per_channel_scale") and not {"group_size", "granularity"} & options.keys():
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


def test_tiles_with_tables_of_eight_bits(tmp_path):
    """3 bits, and 8 entries of e4m3 for every 8 x 64 weights: trained, saved, loaded and baked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 16))
    palettizer = Palettizer(
        model, bits=3, granularity=(8, 64), lut_dtype="fp8", overrides={"2": {"granularity": (8, 32)}}
    )
    x, y = torch.randn(64, 128), torch.randn(64, 16)
    opt, losses, before = torch.optim.Adam(model.parameters(), 1e-2), [], palettizer.clustered()["0.weight"].codes
    for _ in range(8):
        opt.zero_grad()
        losses.append((model(x) - y).square().mean())
        losses[-1].backward()
        opt.step()
        palettizer.step()
    assert losses[-1] < 0.8 * losses[0]
    size, clustered = palettizer.sizes()["0.weight"], palettizer.clustered()["0.weight"]
    assert 8 * (size.packed - 4) == 3.125 * model[0].weight.numel()  # and one scale
    assert clustered.entries.dtype == torch.float8_e4m3fn and not torch.equal(clustered.codes, before)
    hard = model.eval()(x)
    r2.save_palettized(palettizer, tmp_path / "f")
    palettizer.remove(bake=True)
    found = load_palettized(tmp_path / "f")
    assert torch.equal(model(x), hard) and all(torch.equal(found[name], p) for name, p in model.state_dict().items())
    tile = model[0].weight.detach()[8:16, 64:].unique()
    grid = tile / clustered.lut_scales.flatten()
    assert len(tile) <= 8 and torch.equal(grid.to(torch.float8_e4m3fn).float(), grid)


@pytest.mark.parametrize("lut_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("granularity", [None, (4, 5), (3, 7)])
def test_rounding_of_every_tile_is_seen_in_training(granularity, lut_dtype):
    """Sharp attention: W_hat are the entries of its own tile's rounded table. All channels are one, times powers of 2:
    so their scales move no centroid."""
    found = []
    for kind in (lut_dtype, "fp32"):
        model = nn.Sequential(nn.Linear(20, 16))
        with torch.no_grad():
            w = torch.randn(20, generator=torch.Generator().manual_seed(0)) * 2.0 ** (torch.arange(16)[:, None] % 5)
            model[0].weight.copy_(w)
        options = {"granularity": granularity, "per_channel_scale": True, "tau": 1e-7, "iterations": 1}
        palettizer = Palettizer(model, 1, lut_dtype=kind, **options)
        soft = palettizer._soft_weights(palettizer.layers)[0]
        soft.square().sum().backward()
        assert_close(soft, palettizer._hard(palettizer.layers)[0])
        assert model[0].weight.grad.abs().min() > 0
        found.append(soft.detach())
    assert not torch.equal(*found)


def test_scales_of_channels_with_outliers():
    """A weight that is 188 times the others costs its channel nothing: no worse than without scales, soft and hard."""
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    w[::8, 3] *= 188 / w[::8, 3].abs()
    w *= torch.logspace(-1, 1, 64)[:, None]
    for bits in (2, 3, 4):
        errors = []
        for scaled in (False, True):
            model = nn.Sequential(nn.Linear(256, 64))
            with torch.no_grad():
                model[0].weight.copy_(w)
            palettizer = Palettizer(model, bits, per_channel_scale=scaled)
            soft, hard = palettizer._soft_weights(palettizer.layers)[0], palettizer._hard(palettizer.layers)[0]
            errors.append([(hat - w).norm().item() for hat in (soft, hard)])
        assert errors[1][0] <= errors[0][0] and errors[1][1] <= errors[0][1]


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


BAD = [
    ({"bits": 0}, ValueError, "bits of the model must be an int in 1..8, got 0"),
    ({"bits": 9}, ValueError, "got 9"),
    ({"bits": 2.0}, TypeError, "got 2.0"),
    ({"bits": True}, TypeError, "got True"),
    ({"cluster_dim": 0}, ValueError, "cluster_dim of the model must be an int >= 1, got 0"),
    ({"group_size": 0}, ValueError, "group_size of the model must be an int >= 1, got 0"),
    ({"granularity": "output"}, ValueError, "granularity of the model must be one of"),
    ({"granularity": 8}, ValueError, "granularity of the model must be one of"),
    (
        {"granularity": (8, 0)},
        ValueError,
        r"granularity of the model must be \(rows, columns\), each >= 1 or None, got",
    ),
    ({"granularity": (8,)}, ValueError, r"granularity of the model must be \(rows, columns\)"),
    ({"granularity": (8, True)}, TypeError, r"granularity of the model must be of ints or None, got \(8, True\)"),
    ({"granularity": "group"}, ValueError, 'granularity="group" of the model needs group_size'),
    ({"granularity": "row", "group_size": 2}, ValueError, "group_size=2 of the model cannot be given with granul"),
    ({"overrides": {"0": {"granularity": (0, 8)}}}, ValueError, r"granularity of 0.weight must be \(rows, columns\)"),
    ({"layout": "rows"}, ValueError, "layout of the model must be one of"),
    ({"lut_dtype": "fp4"}, ValueError, "lut_dtype of the model must be one of"),
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
    ({"overrides": {"*": "skip"}}, ValueError, "Sequential has no weight left after exclude=None and overrides="),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[str(o) for o, _, _ in BAD])
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        Palettizer(plain(), **{"bits": 2, **options})


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
@pytest.mark.parametrize(("clusters", "d"), [(1, 1), (4, 1), (64, 1), (256, 1), (16, 2), (64, 4)])
def test_spacing_is_that_of_differences(clusters, d, metric):
    """Far from zero a product of matrices gives distances that are off by half."""
    c = 1 + 1e-3 * torch.randn(3, clusters, d, generator=torch.Generator().manual_seed(1))
    gaps = (c.double()[:, :, None] - c.double()[:, None]).norm(dim=-1)
    gaps += torch.diag(torch.full((clusters,), torch.inf))
    mean = gaps.amin(-1).mean(-1) if clusters > 1 else torch.ones(3, dtype=torch.float64)
    expected = mean.square() if metric == "sqeuclidean" else mean
    torch.testing.assert_close(spacing(c, metric == "sqeuclidean").double(), expected, rtol=1e-5, atol=0)
