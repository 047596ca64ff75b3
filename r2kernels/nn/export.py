"""Models with attached modules, written for other runtimes."""

import contextlib

import torch

from ..files import onnx
from . import tracing
from .attach import Attached
from .inputs import module_name
from .quantizer import Quantizer

FORMATS = ("onnx",)


def export(attached, path, format, args=(), *, kwargs=None, **options):
    """Writes the model of a `Quantizer` or a `Palettizer`, as it runs in eval(), for another runtime.

    attached: the module, or a list of those that are attached to one model. format: "onnx".
    args, kwargs: what the model is called with, to record it; the numbers do not matter.
    options: those of `torch.onnx.export`, as `dynamic_shapes`, `input_names`, `opset_version` (21, the default, or up).

    "onnx" (needs `r2kernels[onnx]`): quantized weights are the integers of `IntegerWeight`, of 4 bits each where they
    fit, and DequantizeLinear; inputs go through QuantizeLinear, DequantizeLinear and, below 8 bits, Clip; palettized
    weights are codes and Gather of a table. All is computed in float32.

    onnxruntime gives the same outputs up to the rounding of sums (about 1e-6 of their size), but where that rounding
    takes a number to the other side of the middle between two levels: then an activation is one step off. For speed it
    approximates by itself: where weights and inputs have 8 bits, its kernels round biases to multiples of
    scale_x scale_w; a MatMul with weights of 4 or 8 bits may quantize its input on the fly, to 8 bits in blocks. Its
    session option `session.disable_quant_qdq` = "1" turns both off.

    TypeError or ValueError names the argument; RuntimeError where ranges have no values; ImportError says what to
    install.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}")
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"args must be a tuple of what the model is called with, got {type(args).__name__}")
    modules = attached if isinstance(attached, (list, tuple)) else [attached]
    for module in modules:
        if not isinstance(module, Attached):
            raise TypeError(f"attached must be a Quantizer or a Palettizer, got {type(module).__name__}")
    models = {id(module._model[0]): module._model[0] for module in modules}
    if len(models) != 1:
        raise ValueError(f"attached must be modules of one model, got those of {len(models)}")
    (model,) = models.values()
    if model.training:
        raise ValueError("the model of attached must be in eval(); it is in train()")
    _to_onnx(model, modules, path, args, kwargs, options)


@torch.no_grad()
def _to_onnx(model, modules, path, args, kwargs, options):
    opset = options.pop("opset_version", onnx.OPSET)
    if not isinstance(opset, int) or opset < onnx.OPSET:
        raise ValueError(f"opset_version must be an int >= {onnx.OPSET}, got {opset!r}")
    onnx.check_installed()
    weights, inputs = {}, {}
    for module in modules:
        weights |= module.coded() if isinstance(module, Quantizer) else module.clustered()
        if isinstance(module, Quantizer):
            of = {module_name(key): module.layers[i].name for key, i in module._input_keys}
            inputs |= {name: (levels, of[name]) for name, levels in module.levels().items()}

    def weight(layer):
        return onnx.weight_node(layer.name, layer.weight()) if layer.name in weights else None

    def quantized(key, x):
        return onnx.input_node(module_name(key), x) if module_name(key) in inputs else None

    shapes = options.get("dynamic_shapes")
    with tracing.standing_in(weight, quantized), _without_fast_path():
        program = torch.export.export(model, tuple(args), kwargs, dynamic_shapes=shapes, strict=False)
    recorded = torch.onnx.export(program, opset_version=opset, dynamo=True, verbose=False, **options)
    onnx.expand(recorded.model, weights, inputs)
    recorded.save(path)


@contextlib.contextmanager
def _without_fast_path():
    """The fused kernel of nn.TransformerEncoderLayer and nn.MultiheadAttention has no operator in ONNX."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
