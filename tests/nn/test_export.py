"""Integers of attached models, in memory and in ONNX."""

import sys

import pytest
import torch
from nn.attached import images, net, tokens
from nn.quantized import quantized
from torch import nn

import r2kernels
from r2kernels import Palettizer, Quantizer, calibrate
from r2kernels.files import onnx

pytestmark = pytest.mark.usefixtures("one_thread")


def linear(weight):
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
    return nn.Sequential(layer).eval()


def started(model, method, *bits, x=None, **ranges):
    """A quantizer with these values of its parameters."""
    quantizer = Quantizer(model, method, *bits)
    quantizer.initialize(torch.tensor([[-1.0, 1.0]]) if x is None else x)
    with torch.no_grad():
        for name, value in quantizer.named_parameters():
            value.fill_(ranges.get(name.rpartition(".")[2], 1.0))
    return quantizer


def test_lsq_codes_are_signed_with_a_zero_point_of_0():
    quantizer = started(linear([[0.5, -0.3], [9.0, -9.0]]), "lsq", 4, 3, step=0.25)
    w, x = quantizer.export().weights["0.weight"], quantizer.export().inputs["0"]
    assert w.codes.tolist() == [[2, -1], [7, -8]] and w.codes.dtype == torch.int8
    assert (w.scale.tolist(), w.zero_point.tolist(), w.axis, w.bits) == ([0.25], [0], None, 4)
    assert x == (3, 0.25, 0, True, 0.0) and x.range() == (-4, 3)
    assert x.quantized(torch.tensor([0.1, 0.125, 0.375, -7.0, 7.0])).tolist() == [0.0, 0.0, 0.5, -1.0, 0.75]


def test_levels_without_a_zero_are_odd_codes_and_half_a_step():
    """EWGS's four levels -1, -1/3, 1/3, 1 times the scale."""
    quantizer = started(linear([[0.9, 0.2], [-0.2, -5.0]]), "ewgs", 2, 2, lower=-1.0, upper=1.0, scale=3.0)
    w, x = quantizer.export().weights["0.weight"], quantizer.export().inputs["0"]
    assert w.codes.tolist() == [[3, 1], [-1, -3]] and w.codes.dtype == torch.int8 and w.bits == 2
    assert torch.equal(w.scale, torch.tensor([1.0])) and torch.equal(w.decoded(), torch.tensor([[3.0, 1], [-1, -3]]))
    assert x == (2, pytest.approx(2 / 3), 0, False, -1.0)
    torch.testing.assert_close(
        x.quantized(torch.tensor([-9.0, -0.4, 0.3, 2])), torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0])
    )


def test_one_bit_and_eight_bits_without_a_zero():
    quantizer = started(linear([[0.9, 0.2], [-0.2, -5.0]]), "lsq", 1, 1, step=0.5)
    w, x = quantizer.export().weights["0.weight"], quantizer.export().inputs["0"]
    assert w.codes.tolist() == [[1, 1], [-1, -1]] and w.scale.tolist() == [0.5]
    assert x.quantized(torch.tensor([-3.0, 0.0, 0.1])).tolist() == [-0.5, 0.5, 0.5]
    quantizer = started(linear([[1.0, -1.0]]), "ewgs", 8, lower=-1.0, upper=1.0)
    w = quantizer.export().weights["0.weight"]
    assert w.codes.tolist() == [[255, -255]] and w.codes.dtype == torch.int16


def test_groups_ternary_and_half_integer_levels():
    model = linear([[0.5, -0.3, 8.0, -8.0]])
    for levels, codes in (("ternary", [[1, 0, 1, -1]]), ("seq", [[1, -1, 3, -3]]), ("lsq", [[1, 0, 1, -2]])):
        quantizer = Quantizer(model, "lsq", 2, axis=0, group_size=2, levels=levels)
        quantizer.initialize(torch.ones(1, 4))
        with torch.no_grad():
            quantizer.weights._modules["0/weight"].step.copy_(torch.tensor([0.8, 4.0]))
        w = quantizer.export().weights["0.weight"]
        assert w.codes.tolist() == codes and w.zero_point.tolist() == [0, 0] and w.group_size == 2
        quantizer.remove(bake=False)
        assert torch.equal(w.scale, torch.tensor([0.8, 4.0]) / (2 if levels == "seq" else 1))


def test_pact_and_unsigned_inputs():
    x = torch.tensor([[0.0, 1.0]])
    quantizer = started(linear([[0.5, -0.3]]), "pact", 2, 2, x=x, alpha=1.5)
    assert quantizer.export().inputs == {"0": (2, 0.5, 0, False, 0.0)}


def test_asymmetric_ranges_are_unsigned_with_a_zero_point():
    model = linear([[-0.5, 1.0]])
    quantizer = calibrate(model, [torch.tensor([[-1.0, 2.0]])], 8, 8, symmetric=False, method="minmax")
    w, x = quantizer.export().weights["0.weight"], quantizer.export().inputs["0"]
    assert w.codes.tolist() == [[0, 255]] and w.codes.dtype == w.zero_point.dtype == torch.uint8
    assert w.zero_point.tolist() == [85] and w.axis == 0
    assert x == (8, pytest.approx(3 / 255), 85, False, 0.0)
    assert x.quantized(torch.tensor([-1.0, 2.0])).tolist() == pytest.approx([-1.0, 2.0])


@pytest.mark.parametrize("method", ["lsq", "ewgs", "pact"])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_integers_are_the_hard_weights_bit_for_bit(method, bits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(128, 10)).half().float()
    quantizer = Quantizer(model, method, bits)
    quantizer.initialize(images()[0])
    found = quantizer.export().weights
    quantizer.remove()
    for name, w in found.items():
        assert torch.equal(w.decoded(), model.get_parameter(name)), name


def test_palettes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    palettizer = Palettizer(model, 1, group_size=3, overrides={"1": {"cluster_dim": 2}})
    (first, second), inputs = palettizer.export().weights.values(), palettizer.export().inputs
    palettizer.remove()
    assert inputs == {} and first.codes.shape == (6, 8) and second.codes.shape == (12,)
    assert torch.equal(first.lut[0, :, 0][first.codes[:3].long()], model[0].weight[:3])
    assert torch.equal(first.lut[1, :, 0][first.codes[3:].long()], model[0].weight[3:])


# ONNX: run by onnxruntime


def run(path, *inputs, exact=False):
    """exact: without onnxruntime's own approximations for 8 bits."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(path, options)
    names = [value.name for value in session.get_inputs()]
    return torch.from_numpy(session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})[0])


def graph_of(path):
    return pytest.importorskip("onnx").load(path).graph


def kinds(path):
    return {node.op_type for node in graph_of(path).node}


def stored(path):
    """name -> ONNX's number of the data type, of the codes."""
    return {value.name: value.data_type for value in graph_of(path).initializer if value.name.endswith(":codes")}


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 10)
    )


INT8, UINT8, INT16, UINT4, INT4 = 3, 2, 5, 21, 22
CASES = {
    "lsq": (quantized("lsq", 4, 4, axis=0), INT4),
    "one bit": (quantized("lsq", 1, 1), INT4),
    "ewgs": (quantized("ewgs", 4, 4), INT8),
    "ewgs of 8 bits": (quantized("ewgs", 8, 4), INT16),
    "pact": (quantized("pact", 2, 3), INT4),
    "asymmetric": (lambda model: calibrate(model, [images()[0]], 4, 4, symmetric=False), UINT4),
    "ternary": (quantized("lsq", 2, 4, axis="output", levels="ternary"), INT4),
    "quantized groups": (quantized("lsq", 8, 4, axis="output", group_size=2), INT8),
    "asymmetric groups": (lambda m: calibrate(m, [images()[0]], 3, 4, symmetric=False, group_size=2), UINT4),
    "palettes": (lambda model: Palettizer(model, 2), UINT4),
    "groups": (lambda model: Palettizer(model, 5, group_size=3, lut_dtype="int8", per_channel_scale=True), UINT8),
    "tiles": (lambda model: Palettizer(model, 2, granularity=(3, 7), lut_dtype="fp8", per_channel_scale=True), UINT4),
    "tables of inputs": (lambda model: Palettizer(model, 5, granularity=(None, 9), lut_dtype="int8"), UINT8),
    "channels": (lambda model: Palettizer(model, 3, granularity="channel", lut_dtype="bf16"), UINT4),
}


def assert_same_outputs(found, expected):
    """Equal up to the sums' rounding, but for numbers that a flipped code has moved: at most 1 % of them."""
    off = (found - expected).abs() > 1e-5 * expected.abs().max()
    assert off.double().mean() <= 0.01, f"{off.sum()} of {off.numel()} differ by up to {(found - expected).abs().max()}"


@pytest.mark.parametrize("name", CASES)
def test_onnx_of_a_convolutional_network(name, tmp_path):
    attach, kind = CASES[name]
    model = convolutions().eval()
    owner, x = attach(model), images(5, 64)[0]
    shapes = ({0: torch.export.Dim("batch")},)
    r2kernels.export(owner, tmp_path / "m.onnx", "onnx", (images()[0],), dynamic_shapes=shapes)
    assert_same_outputs(run(tmp_path / "m.onnx", x), model(x).detach())
    assert set(stored(tmp_path / "m.onnx").values()) == {kind}
    wanted = {"Gather"} if isinstance(owner, Palettizer) else {"QuantizeLinear", "DequantizeLinear", "Clip"}
    wanted = {"Where"} if name == "one bit" else wanted
    assert wanted <= kinds(tmp_path / "m.onnx")
    weights = {value.name for value in graph_of(tmp_path / "m.onnx").initializer}
    assert not {"0.weight", "2.weight", "5.weight"} & weights


def test_onnx_of_eight_bits(tmp_path):
    """onnxruntime's kernels round the bias, to half of scale_x scale_w; without them nothing differs."""
    model = convolutions().eval()
    quantizer, x = calibrate(model, [images()[0]], 8, 8), images(5, 64)[0]
    r2kernels.export(quantizer, tmp_path / "m.onnx", "onnx", (x,))
    expected = model(x).detach()
    assert_same_outputs(run(tmp_path / "m.onnx", x, exact=True), expected)
    assert (run(tmp_path / "m.onnx", x) - expected).abs().max() < 2e-3 * expected.abs().max()
    assert "Clip" not in kinds(tmp_path / "m.onnx")


@pytest.mark.parametrize("bits", [(4, 4), (8, 8), (None, 8)])
def test_onnx_of_linear_layers_with_more_than_two_dimensions(bits, tmp_path):
    """onnxruntime joins MatMul and Add here, and fails where signed inputs are int8."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 5)).eval()
    quantizer, x = Quantizer(model, "lsq", *bits), torch.randn(16, 1, 12)
    quantizer.initialize(x)
    r2kernels.export(quantizer, tmp_path / "m.onnx", "onnx", (x,))
    assert_same_outputs(run(tmp_path / "m.onnx", x), model(x).detach())


def test_onnx_of_half_precision(tmp_path):
    """Levels are computed in float32, as here; onnxruntime adds in another precision."""
    model = convolutions().half().eval()
    quantizer, x = Quantizer(model, "lsq", 4, 4), images()[0].half()
    quantizer.initialize(x)
    r2kernels.export(quantizer, tmp_path / "m.onnx", "onnx", (x,))
    expected = model(x).detach()
    off = (run(tmp_path / "m.onnx", x) - expected).abs()
    assert off.median() <= 2e-3 * expected.abs().max()


def test_onnx_of_a_transformer_layer(tmp_path):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    quantizer, x = Quantizer(model, "lsq", 4, 8, axis=0), torch.randn(9, 5, 16)
    quantizer.initialize(x)
    model.eval()
    r2kernels.export(quantizer, tmp_path / "m.onnx", "onnx", (x,))
    assert_same_outputs(run(tmp_path / "m.onnx", x, exact=True), model(x).detach())
    assert set(stored(tmp_path / "m.onnx")) == {
        "self_attn.in_proj_weight:codes",
        "self_attn.out_proj.weight:codes",
        "linear1.weight:codes",
        "linear2.weight:codes",
    }


def test_onnx_of_tied_weights_and_rows(tmp_path):
    """An embedding that is the head as well is stored once."""
    model = net().eval()
    palettizer = Palettizer(model, 3, cluster_dim=3, group_size=8, lut_dtype="fp16", overrides={"conv": "skip"})
    r2kernels.export(palettizer, tmp_path / "m.onnx", "onnx", (tokens(),))
    assert_same_outputs(run(tmp_path / "m.onnx", tokens()), model(tokens()).detach())
    names = [value.name for value in graph_of(tmp_path / "m.onnx").initializer]
    assert [name for name in names if "codes0" in name and "first" not in name and "attention" not in name] == [
        "embed.weight:codes0"
    ]


def test_onnx_of_tiles_of_rows(tmp_path):
    model = net().eval()
    palettizer = Palettizer(model, 1, cluster_dim=2, granularity=(4, 4))
    with pytest.raises(ValueError, match=r"weight has tiles \(4, 4\) of rows of 2; an ONNX file holds tiles of single"):
        r2kernels.export(palettizer, tmp_path / "m.onnx", "onnx", (tokens(),))


def test_onnx_of_palettes_with_quantized_activations(tmp_path):
    model = convolutions().eval()
    both = [Palettizer(model, 2), Quantizer(model, "lsq", None, 4)]
    x = images()[0]
    both[1].initialize(x)
    r2kernels.export(both, tmp_path / "m.onnx", "onnx", (x,))
    assert {"Gather", "QuantizeLinear"} <= kinds(tmp_path / "m.onnx")
    assert_same_outputs(run(tmp_path / "m.onnx", x), model(x).detach())


def test_nodes_are_on_the_device_of_what_they_stand_for():
    like = torch.empty(2, 3, device="meta")
    assert onnx.weight_node("w", like).device == onnx.input_node("x", like).device == like.device


def test_the_model_is_as_before(tmp_path):
    model = convolutions().eval()
    quantizer, x = calibrate(model, [images()[0]], 4, 4), images()[0]
    before = model(x)
    r2kernels.export(quantizer, tmp_path / "m.onnx", "onnx", (x,))
    assert torch.equal(model(x), before) and torch.backends.mha.get_fastpath_enabled()


def test_wrong_calls(tmp_path, monkeypatch):
    model, x = linear([[0.5, -0.3]]), torch.ones(1, 2)
    quantizer = started(model, "lsq", 4, 4)
    export, path = r2kernels.export, tmp_path / "m.onnx"
    with pytest.raises(ValueError, match=r"^format must be one of \('onnx',\), got 'tflite'$"):
        export(quantizer, path, "tflite", (x,))
    with pytest.raises(TypeError, match=r"^attached must be a Quantizer or a Palettizer, got Sequential$"):
        export(model, path, "onnx", (x,))
    with pytest.raises(ValueError, match=r"^attached must be modules of one model, got those of 2$"):
        export([quantizer, started(linear([[0.5, -0.3]]), "lsq", 4)], path, "onnx", (x,))
    with pytest.raises(TypeError, match=r"^args must be a tuple of what the model is called with, got Tensor$"):
        export(quantizer, path, "onnx", x)
    with pytest.raises(ValueError, match=r"^opset_version must be an int >= 21, got 17$"):
        export(quantizer, path, "onnx", (x,), opset_version=17)
    with pytest.raises(ValueError, match=r"^the model of attached must be in eval\(\)"):
        export(quantizer, path, "onnx", (x,)) if model.train() else None
    with pytest.raises(RuntimeError, match=r"^the ranges of 0\.weight have no values"):
        export(Quantizer(linear([[0.5, -0.3]]), "lsq", 4), path, "onnx", (x,))
    model.eval()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r'pip install "r2kernels\[onnx\]"'):
        export(quantizer, path, "onnx", (x,))
    assert not path.exists()
