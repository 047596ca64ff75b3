"""Attached models under torch.jit.trace, torch.export and both ONNX exporters: what is recorded holds for any input."""

import pytest
import torch
from nn.attached import images
from nn.quantized import quantized
from torch import nn

from r2kernels import Palettizer, Quantizer, calibrate

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of jit.trace and the older exporter, about themselves
]
BATCH = ({0: torch.export.Dim("batch")},)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(4 * 25, 10)
    )


ATTACH = {
    "lsq": quantized("lsq", 4, 4, axis=0),
    "one bit": quantized("lsq", 1, 1),
    "ewgs": quantized("ewgs", 3, 4),
    "pact": quantized("pact", 2, 4),
    "asymmetric": lambda model: calibrate(model, [images()[0]], 4, 4, symmetric=False),
    "palettes": lambda model: Palettizer(model, 2),
    "rows": lambda model: Palettizer(model, 2, cluster_dim=2, group_size=4, per_channel_scale=True, lut_dtype="fp16"),
}
TWO = ("lsq", "rows")


def attached(name):
    model = network().eval()
    return model, ATTACH[name](model)


def assert_close(found, expected):
    """The same but for the last bits, where a quotient is rounded twice: no number lies next to the middle of two
    levels here."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def names_of(graph):
    return {str(node.target) for node in graph.nodes}


@pytest.mark.parametrize("name", ATTACH)
def test_jit_trace(name):
    model, _owner = attached(name)
    x = images()[0]
    traced = torch.jit.trace(model, x[:3])
    assert_close(traced(x), model(x))
    assert {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()} == {"aten", "prim"}
    assert "prim::PythonOp" not in {node.kind() for node in traced.inlined_graph.nodes()}
    assert model[0].weight is model[0]._parameters["weight"]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", TWO)
def test_torch_export(name, strict):
    model, _owner = attached(name)
    x = images()[0]
    program = torch.export.export(model, (x[:3],), strict=strict, dynamic_shapes=BATCH)
    assert_close(program.module()(x), model(x))
    assert not any("r2kernels" in target for target in names_of(program.graph))
    assert all("weight" not in module.__dict__ for module in model)
    assert {"0.bias", "2.bias", "4.bias"} <= program.state_dict.keys() <= model.state_dict().keys()


def test_torch_export_keeps_up_with_the_weights():
    """strict=False records how hard weights come from the dense ones; they may be loaded later."""
    model, owner = attached("lsq")
    x = images()[0]
    program = torch.export.export(model, (x,), strict=False)
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    program.module().load_state_dict(model.state_dict())
    assert len(owner.layers) == 3
    assert_close(program.module()(x), model(x))


@pytest.mark.parametrize(
    ("name", "dynamo"), [(name, False) for name in ("lsq", "palettes")] + [(name, True) for name in TWO]
)
def test_onnx_exporters(name, dynamo, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, _owner = attached(name)
    x = images()[0]
    torch.onnx.export(model, (x,), tmp_path / "m.onnx", dynamo=dynamo, verbose=False, external_data=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.flip(0).numpy()})
    assert_close(torch.from_numpy(found), model(x.flip(0)).detach())


def test_inputs_are_no_constants():
    """Twice the input, where one bit more is clipped: by the recorded graph as by the model."""
    model, _owner = attached("lsq")
    x = images()[0]
    traced = torch.jit.trace(model, x)
    assert not torch.equal(model(2 * x), model(x))
    assert_close(traced(2 * x), model(2 * x))


def test_what_surrounds_the_model_and_parts_of_it():
    model, _owner = attached("lsq")
    x = images()[0]
    for whole in (nn.Sequential(model, nn.Tanh()).eval(), nn.Sequential(model[0], model[1]).eval()):
        assert_close(torch.jit.trace(whole, x)(x), whole(x))


def test_a_palettizer_beside_a_quantizer_of_activations():
    model = network().eval()
    owners = Palettizer(model, 2), Quantizer(model, "lsq", None, 4)
    x = images()[0]
    owners[1].initialize(x)
    assert_close(torch.jit.trace(model, x)(x), model(x))


@pytest.mark.parametrize("record", [torch.jit.trace, lambda model, x: torch.export.export(model, (x,))])
def test_train_and_missing_ranges_raise_one_line(record):
    model = network()
    x = images()[0]
    owner = Palettizer(model, 2)
    with pytest.raises(RuntimeError, match=r"^0\.weight is in train\(\); .* call eval\(\) first$"):
        record(model, x)
    owner.remove()
    owner = Quantizer(model.eval(), "lsq", 4, 4)
    with pytest.raises(RuntimeError, match=r"^the ranges of 0\.weight have no values .* with a batch$"):
        record(model, x)
    assert model[0].weight is model[0]._parameters["weight"]


class Owning(nn.Module):
    """A Quantizer that is a part of the model it is attached to."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.quantizer = Quantizer(self, "lsq", 4, 4)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("strict", [True, False])
def test_torch_export_of_a_model_that_holds_its_quantizer(strict):
    model, x = Owning().eval(), images()[0]
    model.quantizer.initialize(x)
    program = torch.export.export(model, (x[:3],), strict=strict, dynamic_shapes=BATCH)
    assert_close(program.module()(x), model(x))
    assert program.state_dict.keys() == model.state_dict().keys()


def test_torch_export_of_a_transformer():
    """Its fused kernel asks every weight whether it requires a gradient, which strict=True cannot tell of ours."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 1).eval()
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    _owner = Palettizer(model, 2)
    line = r"fused kernel of nn\.TransformerEncoderLayer with attached weights; give strict=False, or call torch"
    with pytest.raises(Exception, match=line):
        torch.export.export(model, (x,), strict=True)
    expected = model(x)
    for strict in (True, False):
        torch.backends.mha.set_fastpath_enabled(not strict)
        try:
            program = torch.export.export(model, (x,), strict=strict)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        assert_close(program.module()(x), expected)
