"""calibrate: quantization without training, what the loader may give, and what it refuses."""

import copy
import math

import pytest
import torch
from files.stored import assert_same
from torch import nn
from torch.testing import assert_close

from r2kernels import Quantizer, calibrate
from r2kernels.files.loading import load_palettized
from r2kernels.files.saving import save_quantized

pytestmark = pytest.mark.usefixtures("one_thread")


def plain(seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))
    return model.to(**options)


def images(seed=1, count=32):
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("axis", [0, 1, -1, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["mse", "minmax"])
def test_a_model(method, symmetric, axis):
    """The more bits the closer; frozen; a plain model again afterwards."""
    model, x = plain().eval(), images()
    full, before = model(x), copy.deepcopy(model.state_dict())
    errors = []
    for bits in (2, 4, 8):
        quantizer = calibrate(
            model, [(x[:16], 0), [x[16:], 1]], bits, bits, method=method, axis=axis, symmetric=symmetric
        )
        out = model(x)
        errors.append(((out - full).norm() / full.norm()).item())
        assert (
            isinstance(quantizer, Quantizer)
            and not list(quantizer.parameters())
            and quantizer.param_groups() == []
            and not model.training
        )
        assert torch.equal(model(x), out)
        model.train()
        assert_close(quantizer._soft(quantizer.layers), quantizer._hard(quantizer.layers), rtol=1e-5, atol=1e-6)
        model.eval()
        quantizer.remove(bake=False)
        assert torch.equal(model(x), full)
    assert errors[0] > 4 * errors[1] or errors[0] > 0.3
    assert errors[1] > 4 * errors[2] and errors[2] < 0.03
    assert_same(dict(model.state_dict()), dict(before))


def test_mse_is_not_worse_than_min_max():
    model = plain().eval()
    with torch.no_grad():
        model[4].weight[0, 0] = 0.6
    errors = {}
    for method in ("mse", "minmax"):
        for axis in (0, None):
            quantizer = calibrate(model, None, 3, None, method=method, axis=axis)
            errors[method, axis] = quantizer.errors()
            quantizer.remove(bake=False)
    for name in ("0.weight", "4.weight"):
        assert (
            errors["mse", 0][name] <= errors["minmax", 0][name]
            and errors["mse", None][name] <= errors["minmax", None][name]
        )
        assert errors["mse", 0][name] < errors["mse", None][name]
    assert errors["mse", None]["4.weight"] < 0.6 * errors["minmax", None]["4.weight"]


def test_activations():
    """Unsigned behind a ReLU, seen with quantized weights, one range for all batches."""
    model, x = plain().eval(), images()
    quantizer = calibrate(model, iter([x[:8], 2 * x[8:]]), 4, 4, method="minmax")
    first, second = quantizer.inputs._modules["0"], quantizer.inputs._modules["4"]
    assert first.is_signed and not second.is_signed
    low, high = torch.cat([x[:8], 2 * x[8:]]).aminmax()
    assert_close(first.step, torch.maximum(high / 7, -low / 8))
    weights_only = copy.deepcopy(model)
    with torch.no_grad():
        hidden = nn.functional.conv2d(
            torch.cat([x[:8], 2 * x[8:]]), quantizer._hard(quantizer.layers)[0], weights_only[0].bias
        )
    assert_close(second.step, weights_only[1](hidden).relu().max() / 15)
    quantizer.remove(bake=False)
    quantizer = calibrate(model, [x], 8, 8, symmetric=False)
    zero = quantizer.inputs._modules["4"].zero
    assert zero == 0 and quantizer.inputs._modules["0"].zero > 0
    padded = torch.zeros(3, 2, 6, 6)
    assert torch.equal(quantizer.inputs._modules["0"](padded), padded)  # zero is a level


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_other_dtypes(tmp_path, dtype, symmetric):
    model, x = plain(dtype=dtype).eval(), images().to(dtype)
    full = model(x)
    quantizer = calibrate(model, [x], 8, 8, symmetric=symmetric)
    out = model(x)
    assert out.dtype == dtype and (out - full).norm() / full.norm() < 0.05
    save_quantized(quantizer, tmp_path / "f")
    found = load_palettized(tmp_path / "f")
    quantizer.remove()
    assert_same(found, dict(model.state_dict()))


def test_gradients_pass_through_frozen_ranges():
    for symmetric in (True, False):
        model, x = plain(), images()
        calibrate(model, [x], 8, 8, symmetric=symmetric)
        assert model.training
        model(x).square().mean().backward()
        reference = plain()
        reference(x).square().mean().backward()
        for a, b in zip(model.parameters(), reference.parameters(), strict=True):
            assert (
                a.grad * b.grad
            ).sum() > 0.9 * a.grad.norm() * b.grad.norm() or b.grad.norm() < 1e-6  # a bias before a norm has none


def test_copies_and_state():
    model, x = plain().eval(), images()
    quantizer = calibrate(model, [x], 4, 4, symmetric=False)
    out = model(x)
    both = copy.deepcopy((model, quantizer))
    assert torch.equal(both[0](x), out)
    other = plain().eval()
    second = calibrate(other, [3 * x + 1], 4, 4, symmetric=False)
    assert not torch.equal(other(x), out)
    second.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(x), out)
    torch._dynamo.reset()
    assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), out)


@pytest.mark.parametrize("bits", [(4, 4), (None, 4)], ids=str)
def test_frozen_ranges_do_not_start_again(bits):
    model, x = plain(), images()
    quantizer = calibrate(model, [x], *bits)
    state = copy.deepcopy(quantizer.state_dict())
    with pytest.raises(
        RuntimeError, match="ranges that `calibrate` found do not start again; find others by calibrate"
    ):
        quantizer.initialize(3 * x)
    assert_same(dict(quantizer.state_dict()), dict(state))


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(self, x, mask=None, labels=None):
        return self.b(self.a(x).relu()) * (1 if mask is None else mask)


def test_what_a_loader_may_give():
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    steps = []
    for loader in (
        [x],
        (x,),
        [(x, 1)],
        [[x, 1]],
        [{"x": x, "labels": 3}],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4),
    ):
        torch.manual_seed(1)
        model = Keyword()
        with pytest.warns(
            UserWarning, match="the input of unused.weight stays as it is: no batch of the loader reached it"
        ):
            quantizer = calibrate(model, loader, 8, 8)
        steps.append(torch.stack([q.step for q in quantizer.inputs.children()]))
        assert set(quantizer.inputs._modules) == {"a", "b"} and model.training
        model(x)
    for step in steps:
        assert_close(step, steps[0], rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "loader is empty; calibrate needs at least one batch for activation_bits"),
        (iter(()), ValueError, "loader is empty"),
        (None, TypeError, r"loader must give batches \(an iterable of tensors, tuples or mappings\), got NoneType"),
        (torch.randn(3, 4), TypeError, "loader must give batches .* got Tensor"),
        ({"x": torch.randn(3, 4)}, TypeError, "loader must give batches .* got dict"),
        (["text"], TypeError, "loader gave a str; allowed are a tensor, a tuple or list"),
        ([()], ValueError, "loader gave an empty tuple"),
        ([torch.full((3, 4), math.nan)], ValueError, "the input of a.weight has a NaN or an infinity"),
    ],
    ids=range(8),
)
def test_loaders_that_cannot_be_used(loader, error, message):
    model = Keyword()
    with pytest.raises(error, match=message):
        calibrate(model, loader)
    assert model.training and not model._forward_pre_hooks and not model.a._forward_pre_hooks
    calibrate(model, loader, 4, None)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight_bits": 0}, ValueError, "weight_bits of the model must be an int in 1..8, got 0"),
        ({"activation_bits": 9}, ValueError, "activation_bits of the model must be an int in 1..8, got 9"),
        (
            {"method": "entropy"},
            ValueError,
            r"method of the model must be one of \('mse', 'minmax', 'percentile'\), got",
        ),
        ({"axis": 2}, ValueError, r"axis=2 does not exist: a.weight has shape \(4, 4\)"),
        ({"axis": 0.0}, TypeError, 'axis of the model must be an int, "output" or None, got 0.0'),
        ({"symmetric": "no"}, TypeError, "symmetric of the model must be True or False, got 'no'"),
        ({"percentile": 50}, ValueError, r"percentile of the model must be a number in \(50, 100\], got 50"),
        ({"group_size": 3}, ValueError, "group_size"),
        ({"group_size": 2, "method": "percentile"}, ValueError, 'must be "mse" or "minmax" with group_size'),
        ({"batches": 0}, ValueError, "batches must be an int >= 1, got 0"),
        ({"forward": 3}, TypeError, r"forward must be a function of \(model, batch\) or None, got 3"),
        ({"overrides": {"a": {"bits": 2}}}, ValueError, r"overrides\['a'\] has no option 'bits'; allowed are"),
        ({"overrides": {"a": {"method": "kl"}}}, ValueError, r"method of a.weight must be one of .* got 'kl'"),
        ({"overrides": {"z": "skip"}}, ValueError, r"overrides\['z'\] matches no weight"),
        ({"model": nn.ReLU()}, ValueError, "ReLU has no conv, linear or attention weight"),
    ],
    ids=str,
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        calibrate(**{"model": Keyword(), "loader": [torch.ones(2, 4)], **options})


def test_weights_that_are_not_finite():
    model = Keyword()
    with torch.no_grad():
        model.b.weight[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"b.weight has a NaN or an infinity; it cannot be quantized"):
        calibrate(model, [torch.ones(2, 4)])
    assert not model._forward_pre_hooks
