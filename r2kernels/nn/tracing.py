"""An attached model in eval() whose graph torch.jit.trace, torch.export or torch.onnx.export is recording.

Weights become constants of the graph, inputs are quantized by plain operations. Where torch.export (strict=False) has
put stand-ins in the places of the parameters, the graph computes the hard weights from them.
"""

import contextlib
import contextvars

import torch

_stand_ins = contextvars.ContextVar("what `standing_in` put in the places of weights and inputs", default=None)


def is_recorded():
    """Whether a graph is being recorded."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def refuse_train(name):
    """An error where the graph of a layer in train() is recorded."""
    if is_recorded():
        raise RuntimeError(
            f"{name} is in train(); torch.jit.trace, torch.export and torch.onnx.export record an attached model in "
            "eval(): call eval() first"
        )


def is_strict():
    """Whether it is torch.export (strict=True)."""
    return torch.compiler.is_exporting() and torch.compiler.is_dynamo_compiling()


@contextlib.contextmanager
def standing_in(weight, quantized):
    """Has a recorded graph made of other operations: `weight(layer)` and `quantized(key of the module, input)`.

    Either may give None, for what stands there anyway.
    """
    token = _stand_ins.set((weight, quantized))
    try:
        yield
    finally:
        _stand_ins.reset(token)


@contextlib.contextmanager
def _unrecorded():
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)


def _constant(function):
    """The function of modules and numbers, whose result is a constant of the recorded graph."""

    def marked(*args):
        with _unrecorded(), torch.no_grad():
            return function(*args)

    marked.__name__ = function.__name__  # that of the constant
    marked._dynamo_marked_constant = True  # torch.compiler.assume_constant_result would import torch._dynamo
    return marked


@_constant
def hard_weight(attached, i):
    return attached._hard([attached.layers[i]])[0].detach()


@_constant
def find_units(attached):
    """Once for a compiled graph: `fully_shard` changes classes, which its guards see."""
    return bool(attached._units.find())


@_constant
def levels(attached, key):
    return attached.inputs._modules[key].integers()


def visit(module):
    """Has torch.export (strict=True) know the modules inside by their own names, not by their ways through hooks.

    RuntimeError for what it cannot record with other weights in place."""
    if isinstance(module, torch.nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise RuntimeError(
            "torch.export (strict=True) cannot record the fused kernel of nn.TransformerEncoderLayer with attached "
            "weights; give strict=False, or call torch.backends.mha.set_fastpath_enabled(False)"
        )
    for part in module._modules.values():
        if part is not None:
            visit(part)


def _stand_in(i, *args):
    """What `standing_in` gives; not in torch.export (strict=True), which cannot read a context variable."""
    given = None if is_strict() else _stand_ins.get()
    return given and given[i](*args)


def weight(attached, i):
    """What stands in a recorded graph for the hard weight of a layer."""
    found = _stand_in(0, attached.layers[i])
    if found is not None:
        return found
    if torch.compiler.is_exporting() and not is_strict():
        return attached._hard([attached.layers[i]])[0]
    return hard_weight(attached, i)


def quantized(attached, key, x):
    """What stands in a recorded graph for the quantized input of a module."""
    found = _stand_in(1, key, x)
    return levels(attached, key).quantized(x) if found is None else found
