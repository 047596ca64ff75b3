"""Steps of groups of a weight's inputs, and levels without LSQ's: found by trying, learned, frozen, and stored."""

import math

import pytest
import torch
from nn.attached import images
from nn.quantized import assert_equal, plain, train
from torch import nn
from torch.testing import assert_close

import r2kernels as r2
from r2kernels import Quantizer
from r2kernels.files.uniform import Grid
from r2kernels.nn.clipping import coded, nearest, weight_qparams
from r2kernels.nn.groups import group_qparams
from r2kernels.nn.scales import FrozenWeight
from r2kernels.reference.parameters import levels

pytestmark = pytest.mark.usefixtures("one_thread")

LEVELS = [("lsq", 1), ("lsq", 4), ("ternary", 2), ("seq", 2), ("seq", 4)]


def sample(kind, rows=20, n=128):
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, -1] = 15.0 if kind == "outlier" else x[:, -1]
    return x.pow(3) if kind == "cubed" else x.abs().pow(1.5) - 0.3 if kind == "skewed" else x


@pytest.mark.parametrize(("kind", "bits"), LEVELS)
@pytest.mark.parametrize("what", ["normal", "outlier", "cubed", "skewed"])
def test_steps_against_brute_force(what, kind, bits):
    x = sample(what)
    step, zero = group_qparams(x, Grid(bits, 0), "mse", True, kind)
    assert zero is None
    shares = torch.linspace(2e-3, 1, 300, dtype=torch.float64)[:, None]
    tried = (shares * x.abs().amax(1) / levels(bits, True, kind)[1]).reshape(-1)
    ys = r2.lsq(x.repeat(len(shares), 1), tried, bits, axis=0, levels=kind)
    best = (ys - x.repeat(len(shares), 1)).square().sum(1).view(-1, len(x)).amin(0)
    assert ((r2.lsq(x, step, bits, axis=0, levels=kind) - x).square().sum(1) <= 1.06 * best).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("what", ["normal", "outlier", "skewed"])
def test_zero_points_against_brute_force(what, bits):
    x, n = sample(what), 2**bits - 1
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)

    def error(step, zero):
        step, zero = step[:, None], zero[:, None]
        return (x - step * (x / step).round().clamp(-zero, n - zero)).square().sum(1)

    step, zero = group_qparams(x, Grid(bits, 0), "mse", False)
    assert torch.equal(zero, zero.round()) and zero.min() >= 0 and zero.max() <= n
    best = torch.full_like(low, math.inf)
    for a in torch.linspace(0.1, 1, 19).tolist():
        for b in torch.linspace(0.1, 1, 19).tolist():
            s = (b * high - a * low) / n
            best = torch.minimum(best, error(s, (-a * low / s).round().clamp(0, n)))
    assert (error(step, zero) <= 1.05 * best).all()


def test_ranges_of_groups():
    w = torch.tensor([[-1.0, 0.5, 3.0, -0.3], [0.0, 0.0, 7.0, 1.0]])
    step, zero = weight_qparams(w, 3, 0, "minmax", True, group_size=2)
    assert_close(step, torch.tensor([0.25, 1.0, 1.0, 7 / 3]))
    assert zero is None
    step, zero = weight_qparams(w, 3, -2, "minmax", False, group_size=2)
    assert_close(step, torch.tensor([1.5 / 7, 3.3 / 7, 1.0, 1.0]))
    assert zero.tolist() == [5, 1, 0, 0]
    assert (coded(w, Grid(3, 0, 2), "mse", False).decoded() == 0).equal(w == 0)  # exact zeros stay
    across = weight_qparams(w.t().contiguous(), 3, 1, "minmax", True, group_size=2)[0]
    assert torch.equal(across, weight_qparams(w, 3, 0, "minmax", True, group_size=2)[0])
    assert torch.equal(weight_qparams(w, 3, 0, "minmax", True, group_size=8)[0], torch.tensor([1.0, 7 / 3]))
    assert weight_qparams(w / 0, 3, 0, "mse", True, group_size=2) is None
    with pytest.raises(ValueError, match='method must be "mse" or "minmax" with group_size, got \'percentile\''):
        weight_qparams(w, 3, 0, "percentile", True, group_size=2)


@pytest.mark.parametrize(("kind", "bits"), LEVELS)
@pytest.mark.parametrize("method", ["mse", "minmax"])
def test_zeros_stay_near_zero(kind, bits, method):
    """Also where the levels have no 0."""
    step, _ = group_qparams(torch.zeros(2, 4), Grid(bits, 0, 2), method, True, kind)
    stored = nearest(torch.zeros(2, 4), Grid(bits, 0, 2), step, None, kind)
    assert stored.decoded().abs().max() <= 1.01e-30


@pytest.mark.parametrize(("kind", "bits"), LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("axis", "group_size"), [(None, None), (0, None), (0, 5), (1, 21), (2, 6)])
def test_the_nearest_levels_are_those_of_lsq(axis, group_size, dtype, kind, bits):
    """Stored, and frozen: the same bits."""
    w, form = torch.randn(6, 5, 7).to(dtype), Grid(bits, axis, group_size)
    step = torch.rand(() if axis is None else (form.channels(w.shape),)) + 0.1
    stored = nearest(w, form, step, None, kind)
    frozen = FrozenWeight(w, bits, axis, step, None, group_size, kind)
    (hat,) = FrozenWeight.soft([frozen], [w])
    assert torch.equal(stored.decoded(), hat) and torch.equal(frozen.coded(w).decoded(), hat)
    assert hat.shape == w.shape and hat.dtype == dtype
    code = stored.codes.reshape(w.shape) - stored.zero[0] / 2
    low, high = levels(bits, True, kind)
    assert code.min() >= -low and code.max() <= high
    if kind != "lsq":
        assert int(stored.zero[0]) == (2 if kind == "ternary" else 2**bits - 1)


@pytest.mark.parametrize(("axis", "group_size"), [(0, 5), (1, 3)])
def test_frozen_zero_points(axis, group_size):
    w = torch.randn(6, 15).pow(3)
    step, zero = weight_qparams(w, 4, axis, "mse", False, group_size=group_size)
    frozen = FrozenWeight(w, 4, axis, step, zero, group_size)
    (hat,) = FrozenWeight.soft([frozen], [w])
    assert_close(hat, frozen.coded(w).decoded(), rtol=1e-5, atol=1e-5)
    one = w.movedim(axis, 0).reshape(-1)[:group_size]  # the first group
    n, s, z = 15, step[0], zero[0]
    expected = s * ((one / s).round() + z).clamp(0, n) - s * z
    assert_close(hat.movedim(axis, 0).reshape(-1)[:group_size], expected)


def test_learned_steps_of_groups():
    """By hand: the step of each group, its value, its gradient and that of the weight."""
    model = nn.Linear(8, 3, bias=False)
    quantizer = Quantizer(model, "lsq", 3, group_size=4)
    x = torch.randn(2, 8)
    y = model(x)
    w, q = model.weight.detach(), quantizer.weights._modules["weight"]
    assert_close(q.step, 2 * w.reshape(6, 4).abs().mean(1) / math.sqrt(3))
    y.sum().backward()
    step = (q.step.detach().abs() + 1e-8).requires_grad_()
    rows = w.reshape(6, 4).clone().requires_grad_()
    hat = r2.reference.lsq(rows, step, 3, axis=0)
    assert_close(y, x @ hat.reshape(3, 8).t())
    (x @ hat.reshape(3, 8).t()).sum().backward()
    assert_close(q.step.grad, step.grad)
    assert_close(model.weight.grad, rows.grad.reshape(3, 8))
    quantizer.remove()
    assert torch.equal(model.weight, hat.detach().reshape(3, 8))


def test_groups_lie_along_the_inputs():
    """Of a transposed convolution too, whose output channels are its second axis."""
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.Conv2d(6, 2, 3))
    quantizer = Quantizer(model, "lsq", 4, group_size=18, overrides={"0": {"group_size": 12}})
    model(torch.randn(1, 4, 5, 5)).sum().backward()
    assert [len(quantizer.weights._modules[f"{i}/weight"].step) for i in (0, 1)] == [6 * 3, 2 * 3]
    stored = quantizer.coded()["0.weight"]
    assert stored.form == Grid(4, 1, 12)
    rows = stored.decoded().movedim(1, 0).reshape(18, 12)
    assert all(len(row.unique()) <= 16 for row in rows)
    assert model[0].weight.grad.isfinite().all() and quantizer.weights._modules["0/weight"].step.grad.shape == (18,)


GROUPS = {"group_size": 32, "overrides": {"0": {"group_size": 9}}}


@pytest.mark.parametrize(
    "options", [GROUPS, {"levels": "ternary"}, {"levels": "seq", "axis": 0}, {"levels": "seq", **GROUPS}]
)
def test_training_saving_and_loading(tmp_path, options):
    model = plain()
    quantizer = Quantizer(model, "lsq", 2, **options)
    losses = train(model, quantizer, 25, lr=0.05)
    assert losses[-1] < 0.7 * losses[0]
    again = Quantizer(plain(1), "lsq", 2, **options)
    again.load_state_dict(quantizer.state_dict())
    assert_equal(dict(again.state_dict()), dict(quantizer.state_dict()))
    x, _ = images()
    hats = quantizer._hard(quantizer.layers)
    levels_of_first = hats[0].reshape(-1, 9 if "group_size" in options else 18)[0].unique()
    assert len(levels_of_first) <= (3 if options.get("levels") == "ternary" else 4)
    assert options.get("levels") != "seq" or 0 not in levels_of_first
    r2.save_quantized(quantizer, tmp_path / "f")
    y = model.eval()(x)
    quantizer.remove()
    found = r2.load_palettized(tmp_path / "f")
    assert_equal(found, dict(model.state_dict()))
    assert_close(y, model(x))


BAD = [
    ({"group_size": 0}, ValueError, "group_size of the model must be an int >= 1, got 0"),
    ({"group_size": 2.0}, TypeError, "group_size of the model must be an int >= 1, got 2.0"),
    ({"group_size": True}, TypeError, "group_size of the model must be an int >= 1, got True"),
    ({"group_size": 4}, ValueError, r"group_size=4 of 0.weight does not divide the 18 inputs .* shape \(8, 2, 3, 3\)"),
    (
        {"group_size": 4, "method": "pact"},
        ValueError,
        "group_size of the model needs method \"lsq\" .* got 4 .* 'pact'",
    ),
    ({"group_size": 4, "weight_bits": None, "activation_bits": 4}, ValueError, "group_size of the model needs .*=None"),
    ({"levels": "even"}, ValueError, r"levels of the model must be one of \('lsq', 'ternary', 'seq'\), got 'even'"),
    ({"levels": "seq", "method": "ewgs"}, ValueError, "levels of the model needs method \"lsq\" .*got 'seq'.*'ewgs'"),
    (
        {"levels": "ternary", "weight_bits": 4},
        ValueError,
        'levels="ternary" of the model has the codes -1, 0, 1.* got 4',
    ),
    ({"overrides": {"0": {"levels": "ternary", "weight_bits": 1}}}, ValueError, 'levels="ternary" of 0.weight'),
    ({"levels": ["seq"]}, ValueError, r"levels of the model must be one of .* got \['seq'\]"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[str(o) for o, _, _ in BAD])
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        Quantizer(**{"model": plain(), "method": "lsq", "weight_bits": 2, **options})
