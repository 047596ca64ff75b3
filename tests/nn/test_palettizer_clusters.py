"""Palettizer: zero channels and zeros, centroids that coincide or are left behind, weights that are not finite."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import r2kernels as r2
from r2kernels import Palettizer
from r2kernels.files.loading import load_palettized


def linear(w):
    model = nn.Linear(w.shape[1], w.shape[0], bias=False)
    model.weight.data.copy_(w)
    return model


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fit(model, palettizer, target, steps=60, lr=0.05, evaluate=True):
    """Trains a Linear to be another one; the mean squared error, of the hard weights."""
    x = draw(64, target.shape[1], seed=9)
    opt = torch.optim.Adam(model.parameters(), lr)
    model.train()
    for _ in range(steps):
        opt.zero_grad()
        (model(x) - x @ target.t()).square().mean().backward()
        opt.step()
        palettizer.step()
    with torch.no_grad():
        return (model.eval()(x) - x @ target.t()).square().mean().item()


def layer_of(palettizer):
    return next(palettizer.centroids.buffers()), next(palettizer.taus.buffers())


# zero channels


@pytest.mark.parametrize("options", [{}, {"lut_dtype": "int8"}, {"group_size": 3}, {"cluster_dim": 2}], ids=str)
def test_a_channel_of_zeros_stays_zero(tmp_path, options):
    """Soft, hard, baked and in files; and trains as any other."""
    w = draw(6, 16)
    w[2] = w[5] = 0
    model = linear(w)
    palettizer = Palettizer(model, 2, per_channel_scale=True, **options)
    ((hat, _),) = palettizer._soft(palettizer.layers)
    (hard,) = palettizer._hard(palettizer.layers)
    for found in (hat, hard):
        assert (found[[2, 5]] == 0).all() and (found - w).norm() / w.norm() < 0.6
    r2.save_palettized(palettizer, tmp_path / "f")
    assert torch.equal(load_palettized(tmp_path / "f")["weight"], hard)
    assert palettizer.clustered()["weight"].scales[[2, 5]].tolist() == [0, 0]
    (hat * draw(6, 16, seed=1)).sum().backward()
    assert torch.equal(model.weight.grad[2], draw(6, 16, seed=1)[2])  # a channel of zeros is not clustered
    palettizer.remove()
    assert torch.equal(model.weight, hard)


# centroids that coincide


@pytest.mark.parametrize("options", [{}, {"cluster_dim": 2}, {"per_channel_scale": True}, {"group_size": 4}], ids=str)
def test_a_layer_that_starts_at_zero_trains(options):
    target = draw(8, 8)
    model = linear(torch.zeros(8, 8))
    palettizer = Palettizer(model, 2, **options)
    assert layer_of(palettizer)[1].isinf().all() and palettizer.gap() == {"weight": 0}
    assert fit(model, palettizer, target, steps=64) < 0.45 * target.square().sum(1).mean()
    assert layer_of(palettizer)[1].isfinite().all()
    centroids = layer_of(palettizer)[0]
    assert all(len(table.unique(dim=0)) == 4 for table in centroids)


def test_more_bits_for_a_weight_of_one_bit():
    """Frozen at two values the error would stay that of one bit."""
    target = draw(16, 16)
    two = target.sign() * target.abs().mean()
    model = linear(two)
    one_bit = (two - target).square().sum(1).mean().item()
    assert fit(model, Palettizer(model, 4), target) < 0.2 * one_bit


def test_until_they_differ_the_weights_are_dense():
    """The gradient is that of the dense weight, and the centroids wait; a step that changes nothing leaves them."""
    model = linear(torch.zeros(4, 4))
    palettizer = Palettizer(model, 1)
    x = draw(3, 4)
    for _ in range(3):
        model(x).square().sum().backward()
        palettizer.step()
    assert layer_of(palettizer)[1].isinf().all() and (layer_of(palettizer)[0] == 0).all()
    (model(x) * draw(3, 4, seed=1)).sum().backward()
    torch.testing.assert_close(model.weight.grad, draw(3, 4, seed=1).t() @ x)
    with torch.no_grad():
        model.weight.copy_(draw(4, 4))
    palettizer.step()  # the fourth: 1, 2, 4, 8 look
    torch.testing.assert_close(layer_of(palettizer)[0][0, :, 0], r2.kmeans(model.weight, 2))


def test_when_spare_centroids_are_sought():
    palettizer = Palettizer(linear(draw(8, 8)), 2)
    sought, looked = [], palettizer._renew
    palettizer._renew = lambda *found: sought.append(palettizer._count) or looked(*found)
    for _ in range(200):
        palettizer.step()
    assert sought == [1, 2, 4, 8, 16, 32, 64, 128, 192]


@pytest.mark.parametrize(
    "spoilt", [[0.5, 0.5, 0.5, 0.5], [-1, 0, 1, 50], [-1, -1, 0, 1], [-1, -1 + 1e-6, 0, 1]], ids=str
)
def test_spare_centroids_start_anew(spoilt):
    """Those that coincide, to rounding too, and one that was left behind by the weights."""
    model = linear(draw(16, 16))
    palettizer = Palettizer(model, 2)
    best = layer_of(palettizer)[0].clone()
    layer_of(palettizer)[0].copy_(torch.tensor(spoilt, dtype=torch.float32).reshape(1, 4, 1))
    palettizer.step()
    assert torch.equal(layer_of(palettizer)[0], best) and layer_of(palettizer)[1].isfinite().all()


def test_centroids_that_serve_stay():
    model = linear(draw(16, 16))
    palettizer = Palettizer(model, 2)
    c = torch.tensor([-2.0, -0.1, 0.1, 2.0]).reshape(1, 4, 1)
    layer_of(palettizer)[0].copy_(c)
    palettizer.step()
    assert torch.equal(layer_of(palettizer)[0], c)


def test_waiting_groups_are_in_the_state():
    """A training that is cut and resumed while a layer waits gives the same as one that is not."""
    models, found = [linear(torch.zeros(8, 8)) for _ in range(2)], []
    first, second = (Palettizer(model, 2) for model in models)
    first.step()
    models[0].weight.data.copy_(draw(8, 8))
    first.step()
    models[1].load_state_dict(models[0].state_dict())
    assert second._waiting == {"weight": {0}} and first._waiting == {"weight": set()}
    second.load_state_dict(first.state_dict())
    assert second._waiting == {"weight": set()}
    for model, palettizer in zip(models, (first, second), strict=True):
        found.append(fit(model, palettizer, draw(8, 8, seed=3), steps=5))
    assert found[0] == found[1]


# weights that are not finite


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused(number):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[1].weight[2, 3] = number
    with pytest.raises(ValueError, match=r"1\.weight has a NaN or an infinity; only finite weights can be clustered"):
        Palettizer(model, 2)
    assert not model._forward_pre_hooks and Palettizer(model, 2, overrides={"1": "skip"})


def test_a_step_with_a_weight_that_is_not_finite(tmp_path):
    """Leaves its centroids, and those of no other layer; saving keeps it dense."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    palettizer = Palettizer(model, 2)
    before = [c.clone() for c in palettizer.centroids.buffers()]
    with torch.no_grad():
        model[1].weight[2, 3] = torch.inf
    for i in range(3):
        model(draw(2, 8))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            palettizer.step()
        assert [str(w.message) for w in caught] == ["1.weight is not finite; its centroids stay as they are"] * (i == 0)
    after = list(palettizer.centroids.buffers())
    assert torch.equal(after[1], before[1]) and not torch.equal(after[0], before[0]) and after[0].isfinite().all()
    with pytest.warns(UserWarning, match=r"1\.weight is stored dense: it has a NaN or an infinity"):
        r2.save_palettized(palettizer, tmp_path / "f")
    found = load_palettized(tmp_path / "f")
    assert torch.equal(found["1.weight"], model[1].weight) and found["0.weight"].unique().numel() <= 4


# zeros


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_channel_scale": True},
        {"lut_dtype": "fp16"},
        {"lut_dtype": "int8", "group_size": 4},
        {"metric": "sqeuclidean"},
    ],
    ids=str,
)
def test_zeros_stay(tmp_path, bits, options):
    """Soft and hard, through training with SGD, and in files; a centroid is exactly 0."""
    w = draw(8, 8)
    w[w.abs() < 0.8] = 0
    model = linear(w)
    palettizer = Palettizer(model, bits, preserve_zeros=True, **options)
    x, opt = draw(32, 8, seed=1), torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(5):
        opt.zero_grad()
        (model(x) - x).square().mean().backward()
        assert (model.weight.grad[w == 0] == 0).all() and (model.weight.grad != 0).any()
        opt.step()
        palettizer.step()
        assert all((c == 0).all(-1).sum() >= 1 for c in layer_of(palettizer)[0])
    ((hat, _),), (hard,) = palettizer._soft(palettizer.layers), palettizer._hard(palettizer.layers)
    for found in (model.weight, hat, hard):
        assert (found[w == 0] == 0).all() and (found != 0).any()
    r2.save_palettized(palettizer, tmp_path / "f")
    assert (load_palettized(tmp_path / "f")["weight"][w == 0] == 0).all()


def test_zeros_in_rows():
    """Rows of zeros stay, and a warning counts the zeros that do not."""
    w = draw(8, 6)
    w[2:4], w[0, 0] = 0, 0
    model = linear(w)
    with pytest.warns(
        UserWarning, match="weight: 1 of its 13 zeros do not stay: they share a row of 2 with other weights"
    ):
        palettizer = Palettizer(model, 2, cluster_dim=2, preserve_zeros=True)
    model(draw(3, 6)).sum().backward()
    assert (model.weight.grad[2:4] == 0).all()
    for found in (palettizer._soft(palettizer.layers)[0][0], palettizer._hard(palettizer.layers)[0]):
        assert (found[2:4] == 0).all() and (found[0] != 0).any()


def test_pruned_weights_stay_pruned():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    prune.l1_unstructured(model[0], "weight", 0.75)
    mask = model[0].weight_mask.clone()
    palettizer = Palettizer(model, 2)
    assert [layer.options.preserve_zeros for layer in palettizer.layers] == [True, False]
    opt = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        opt.zero_grad()
        model(draw(4, 16)).square().mean().backward()
        opt.step()
        palettizer.step()
    palettizer.remove()
    assert (model[0].weight[mask == 0] == 0).all() and len(model[0].weight.unique()) == 4


@pytest.mark.parametrize("options", [{}, {"cluster_dim": 2, "layout": "contiguous"}], ids=str)
def test_padding_rows_stay_zero(options):
    model = nn.Embedding(12, 8, padding_idx=3)
    palettizer = Palettizer(model, 2, **options)
    for found in (palettizer._soft(palettizer.layers)[0][0], palettizer._hard(palettizer.layers)[0]):
        assert (found[3] == 0).all() and (found[2] != 0).any()
    filled = nn.Embedding(12, 8, padding_idx=3)
    nn.init.normal_(filled.weight)
    assert not Palettizer(filled, 2).layers[0].options.preserve_zeros


def test_zeros_after_a_state_without_them():
    """A state of centroids none of which is 0."""
    w = draw(8, 8).relu()
    first, second = Palettizer(linear(w), 2), Palettizer(linear(w), 2, preserve_zeros=True)
    first.centroids._buffers["weight"].add_(0.01)
    second.load_state_dict(first.state_dict())
    assert (second._hard(second.layers)[0][w == 0] == 0).all()


def test_options_that_clash():
    for options in ({"iterations": "converge"}, {"gradient": "implicit"}):
        with pytest.raises(ValueError, match=r"preserve_zeros of the model .* needs a number of iterations"):
            Palettizer(linear(draw(4, 4)), 2, preserve_zeros=True, **options)
        with pytest.raises(
            ValueError, match=r"preserve_zeros of weight \(also of a pruned weight, or one with a padding"
        ):
            Palettizer(nn.Embedding(12, 8, padding_idx=3), 2, **options)
    with pytest.raises(TypeError, match="preserve_zeros of the model must be True or False, got 1"):
        Palettizer(linear(draw(4, 4)), 2, preserve_zeros=1)
    with pytest.warns(UserWarning, match="weight: it is 0 everywhere, and preserve_zeros keeps it so"):
        Palettizer(linear(torch.zeros(4, 4)), 2, preserve_zeros=True)


# scales of numbers


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
@pytest.mark.parametrize("d", [1, 2])
def test_tiny_weights(metric, d):
    """Weights of 1e-30 give the same as those of 1, soft, hard and temperature."""
    w, found = draw(8, 8), []
    for factor in (1.0, 2.0**-100):
        palettizer = Palettizer(linear(w * factor), 2, cluster_dim=d, metric=metric)
        for _ in range(2):
            ((hat, c),) = palettizer._soft(palettizer.layers)
            palettizer.step()
        unit = factor ** (2 if metric == "sqeuclidean" else 1)
        found.append(
            (hat / factor, c / factor, layer_of(palettizer)[1] / unit, palettizer._hard(palettizer.layers)[0] / factor)
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


LOST = [
    (1e6, "fp16", "weight: lut_dtype='fp16' leaves 2 of 4 different values and cuts off 4 numbers above 65504"),
    (1e-9, "fp16", "weight: lut_dtype='fp16' leaves 1 of 4 different values"),
    (None, "int8", "weight: lut_dtype='int8' leaves 2 of 4 different values"),
]


@pytest.mark.parametrize(("factor", "dtype", "message"), LOST, ids=["overflow", "underflow", "outlier"])
def test_values_that_a_table_loses(factor, dtype, message):
    """One warning for each layer, with the number of values left."""
    w = draw(8, 8)
    w = w.sign() * (w.abs() + 0.5) * (factor or 1)
    if factor is None:
        w[0, 0] = 1e4
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        palettizer = Palettizer(linear(w), 2, lut_dtype=dtype)
        palettizer.step()
    assert [str(c.message) for c in caught] == [message]


def test_tables_that_lose_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in ("fp32", "fp16", "int8"):
            Palettizer(linear(draw(16, 16)), 4, lut_dtype=dtype)
