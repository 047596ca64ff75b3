"""calibrate: ranges without training, against brute force; what the loader may give; and files of quantized weights."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_io import assert_same
from test_io_wrong import parsed, put, refused, sealed, weight
from torch import nn
from torch.testing import assert_close

import r2kernels as r2
from r2kernels import Quantizer, calibrate
from r2kernels.files import format as io
from r2kernels.files.format import Palettized, load_palettized, save_clustered, save_quantized
from r2kernels.files.uniform import Grid, Uniform
from r2kernels.nn.clipping import BINS, Histogram, affine_of, nearest, step_of, weight_range
from r2kernels.reference.parameters import levels

pytestmark = pytest.mark.usefixtures("one_thread")


def plain(seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))
    return model.to(**options)


def images(seed=1, count=32):
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def sample(kind, n=4000, seed=0):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {
        "normal": x,
        "outlier": torch.cat([x, torch.tensor([15.0], dtype=torch.float64)]),
        "skewed": x.abs().pow(1.5) - 0.3,
        "positive": x.abs(),
        "negative": -x.abs(),
        "cubed": x.pow(3),
    }[kind]


def symmetric_error(x, step, bits, signed):
    return (x - r2.reference.lsq(x, step, bits, signed=signed)).square().sum().item()


def affine_error(x, step, zero, bits):
    return (x - step * (x / step).round().clamp(-zero, 2**bits - 1 - zero)).square().sum().item()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "outlier", "skewed", "positive", "cubed"])
def test_symmetric_clipping_against_brute_force(kind, bits):
    x = sample(kind)
    histogram = Histogram(1)
    histogram.add(x[None])
    for signed in (True, False) if kind == "positive" else (True,):
        found = step_of(histogram, bits, signed, "mse")
        above = levels(bits, signed)[1]
        best = min(
            symmetric_error(x, s, bits, signed)
            for s in torch.linspace(2e-3, 1, 500, dtype=torch.float64) * (x.abs().max() / above).item()
        )
        assert symmetric_error(x, found[0], bits, signed) <= 1.02 * best
        assert symmetric_error(x, found[0], bits, signed) <= symmetric_error(
            x, step_of(histogram, bits, signed, "minmax")[0], bits, signed
        )


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "skewed", "positive", "negative"])
def test_asymmetric_clipping_against_brute_force(kind, bits):
    x, n = sample(kind), 2**bits - 1
    histogram = Histogram(1)
    histogram.add(x[None])
    step, zero = (v[0] for v in affine_of(histogram, bits, "mse"))
    assert zero == zero.round() and 0 <= zero <= n
    low, high, best = x.min().clamp(max=0).item(), x.max().clamp(min=0).item(), math.inf
    for a in torch.linspace(0.1, 1, 19).tolist():
        for b in torch.linspace(0.1, 1, 19).tolist():
            s = (b * high - a * low) / n
            best = min(best, affine_error(x, s, min(max(round(-a * low / s), 0), n), bits))
    assert affine_error(x, step, zero, bits) <= 1.03 * best


@given(
    st.lists(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20), min_size=1, max_size=6), st.booleans()
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_a_histogram_that_widens(batches, zeros_first):
    """Batch by batch or at once: the same sums, and bins as fine as half of those at once."""
    batches = [torch.zeros(1, 3)] * zeros_first + [torch.tensor([batch]) for batch in batches]
    parts, whole = Histogram(1), Histogram(1)
    for batch in batches:
        parts.add(batch)
    x = torch.cat(batches, 1)
    whole.add(x)
    assert (parts.low, parts.high, parts.count.sum()) == (x.min(), x.max(), x.numel())
    assert_close(parts.sum.sum(), x.double().sum())
    assert_close(parts.square[0], x.double().square().sum())
    assert whole.top <= parts.top * (1 + 1e-9) and parts.top <= 2 * max(whole.top.item(), 1e-300)
    edges = torch.linspace(-1, 1, BINS + 1).double() * parts.top
    inside = (parts.sum >= edges[:-1] * parts.count - 1e-6) & (parts.sum <= edges[1:] * parts.count + 1e-6)
    assert inside.all()


def test_min_max_ranges():
    w = torch.tensor([[-1.0, 0.5, 0.25], [3.0, -0.3, 0.0], [0.0, 0.0, 0.0]])
    step, zero = weight_range(w, 3, 0, "minmax", True)
    assert_close(step, torch.tensor([0.25, 1.0, 1.0])) and zero is None
    step, zero = weight_range(w, 3, 0, "minmax", False)
    assert_close(step, torch.tensor([1.5 / 7, 3.3 / 7, 1.0]))
    assert zero.tolist() == [5, 1, 0]
    coded = nearest(w, Grid(3, 0), step, zero)
    assert (coded.decoded() == 0).equal(w == 0)  # exact zeros stay
    assert weight_range(w, 3, None, "minmax", True)[0].item() == 1.0
    assert weight_range(w / 0, 3, 0, "mse", True) is None


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
        assert_close(quantizer._soft_all(), quantizer._hard(quantizer.layers), rtol=1e-5, atol=1e-6)
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
        ({"method": "entropy"}, ValueError, r"method must be one of \('mse', 'minmax'\), got 'entropy'"),
        ({"axis": 2}, ValueError, r"axis=2 does not exist: a.weight has shape \(4, 4\)"),
        ({"axis": 0.0}, TypeError, "axis of the model must be an int or None, got 0.0"),
        ({"symmetric": "no"}, TypeError, "symmetric must be True or False, got 'no'"),
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


def test_the_file(tmp_path):
    """Byte for byte."""
    w = torch.tensor([[0.0, 0.5, -1.0], [3.0, 0.0, -4.0]])
    made = Uniform.of(torch.tensor([[4.0, 5, 2], [7, 4, 0]]), torch.float32, Grid(3, 0), torch.tensor([0.5, 1.0]), 8)
    assert torch.equal(made.decoded(), w)
    save_clustered({"w": made}, {"w": w, "b": torch.tensor([7], dtype=torch.int16)}, tmp_path / "f")
    header, data = parsed((tmp_path / "f").read_bytes())
    assert header["__metadata__"]["weights"] == {
        "w": {"shape": [2, 3], "dtype": "F32", "bits": 3, "axis": 0, "kind": "uniform"}
    }
    codes = sum(code << 3 * i for i, code in enumerate([4, 5, 2, 7, 4, 0])).to_bytes(3, "little")
    at = {name: slice(*entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"}
    assert data[at["w:scale"]] == torch.tensor([0.5, 1.0]).numpy().tobytes() and data[at["w:codes"]][:3] == codes
    assert (
        data[at["w:zero"]] == bytes([8, 0, 8, 0])
        and header["w:zero"]["dtype"] == "I16"
        and set(at) == {"w:scale", "w:zero", "w:codes", "b"}
    )


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    bits=st.integers(1, 8),
    axis=st.none() | st.integers(0, 3),
    seed=st.integers(0, 9),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    entropy=st.sampled_from(io.ENTROPIES),
)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_round_trip_of_anything(tmp_path_factory, shape, bits, axis, seed, dtype, entropy):
    if axis is not None and axis >= len(shape):
        return
    g, path = torch.Generator().manual_seed(seed), tmp_path_factory.mktemp("any") / "f"
    form = Grid(bits, axis)
    codes = torch.randint(2**bits, shape, generator=g).double()
    channels = (form.channels(shape),)
    made = Uniform.of(
        codes, dtype, form, torch.rand(channels, generator=g), torch.randint(2 ** (bits + 1), channels, generator=g)
    )
    save_clustered({"w": made}, {"w": made.decoded(), "other": torch.arange(seed)}, path, entropy=entropy)
    assert_same(load_palettized(path), {"w": made.decoded(), "other": torch.arange(seed)})
    with Palettized(path) as file:
        again = file.clustered("w").unpacked()
    assert torch.equal(again.codes[: codes.numel()], codes.reshape(-1).to(torch.uint8)) and again.size() == made.size()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "f"
    g = torch.Generator().manual_seed(0)
    state = {name: torch.randn(9, 40, generator=g).pow(3) for name in ("a", "h")}
    forms = {"a": Grid(4, 0), "h": Grid(4)}
    made = {
        name: nearest(w, forms[name], *weight_range(w, 4, forms[name].axis, "minmax", False))
        for name, w in state.items()
    }
    save_clustered(made, {**state, "s": torch.ones(3)}, path, entropy="huffman")
    return path.read_bytes()


EDITS = {
    "bits 0": (weight("a", "bits", 0), "a has bits 0, which is not allowed"),
    "bits 9": (weight("h", "bits", 9), "h has bits 9, which is not allowed"),
    "bits 5": (weight("a", "bits", 5), "a has .* does not agree"),
    "bits true": (weight("a", "bits", True), "a has bits True, which is not allowed"),
    "axis 2": (weight("a", "axis", 2), "a has axis 2, which is not allowed"),
    "axis -1": (weight("a", "axis", -1), "a has axis -1, which is not allowed"),
    "axis 1": (weight("a", "axis", 1), "a has a part 'scale' of .* does not agree"),
    "axis text": (weight("a", "axis", "0"), "a has axis '0', which is not allowed"),
    "axis true": (weight("a", "axis", True), "a has axis True, which is not allowed"),
    "no axis": (weight("a", "axis", None), "a has a part 'scale' of .* does not agree"),
    "kind": (weight("a", "kind", "odd"), "a is not described as"),
    "kind list": (weight("a", "kind", []), "a is not described as"),
    "kind clustered": (weight("a", "kind", "clustered"), "a is not described as"),
    "kind gone": (weight("h", "kind", KeyError), "h has no part 'lut'"),
    "cluster_dim": (weight("a", "cluster_dim", 1), "a is not described as"),
    "shape": (weight("a", "shape", [9, 41]), "a has .* does not agree|a is corrupt"),
    "shape huge": (weight("h", "shape", [2**20, 2**20]), "h has .* does not agree"),
    "shape empty": (weight("h", "shape", [0, 3]), "h has shape"),
    "dtype": (weight("a", "dtype", "F64"), "a has a part 'scale' of torch.float32"),
    "zero of another dtype": (put("a:zero", "dtype", "F16"), "a has a part 'zero' of torch.float16"),
    "zero renamed": (lambda header: header.update({"a:one": header.pop("a:zero")}), "a has no part 'zero'"),
    "entropy": (weight("a", "entropy", "zip"), "a has entropy 'zip'"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_wrong_headers(tmp_path, small, kind):
    edit, message = EDITS[kind]
    header, data = parsed(small)
    edit(header)
    refused(tmp_path / "f", sealed(header, data), message)


def test_changed_and_truncated_files(tmp_path, small):
    for at in range(len(small) - 700, len(small), 7):
        refused(tmp_path / "f", small[:at] + bytes([small[at] ^ 4]) + small[at + 1 :])
        refused(tmp_path / "f", small[:at])
