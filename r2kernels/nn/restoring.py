"""The parts of a calibrated quantizer, made again from its state."""

from collections.abc import Mapping

import torch

from ..files.uniform import Grid
from .input_scales import FrozenInput
from .inputs import input_places
from .layers import layer_of
from .options import QuantizationOptions
from .scales import FrozenWeight
from .select import matrices

_NEEDED = {"weights": {"form", "step"}, "inputs": {"form", "step", "signed", "started"}}  # beside them perhaps "zero"


def restored(model, state):
    """(layers, layer's key -> `FrozenWeight`, module's key -> `FrozenInput`) from the state of a calibrated quantizer.

    ValueError names what does not fit.
    """
    parts = _parts(state)
    layers = _layers(list(matrices(model, computed=True)), parts)
    weights = {layer.key: _weight(layer, parts["weights"]) for layer in layers if layer.key in parts["weights"]}
    inputs = {
        key: _input(layers[i], key, parts["inputs"])
        for key, i, _ in input_places(model, layers)
        if key in parts["inputs"]
    }
    for kind, made in (("weights", weights), ("inputs", inputs)):
        lost = parts[kind].keys() - made.keys()
        if lost:
            raise ValueError(f"the state has {kind} of {_name(min(lost))}, which {type(model).__name__} has not")
    return layers, weights, inputs


def _name(key):
    return key.replace("/", ".").strip(".") or "the model"


def _parts(state):
    """kind -> key of a weight or module -> field -> tensor."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be the state_dict of a calibrated Quantizer, got {type(state).__name__}")
    parts = {"weights": {}, "inputs": {}}
    for entry, value in state.items():
        kind, _, rest = entry.partition(".")
        key, _, field = rest.rpartition(".")
        if kind in parts:
            parts[kind].setdefault(key, {})[field] = value
    if not parts["weights"] and not parts["inputs"]:
        raise ValueError("state holds no weights and no inputs; it must be the state_dict of a calibrated Quantizer")
    for kind, found in parts.items():
        for key, fields in found.items():
            wrong = sorted(_NEEDED[kind] ^ (fields.keys() - {"zero"}))
            if wrong:
                has = "has" if wrong[0] in fields else "lacks"
                raise ValueError(
                    f"the state of {_name(key)} {has} {wrong[0]!r}, so it is not of a calibrated Quantizer (make a "
                    "trained one with the options it had, and call load_state_dict)"
                )
    return parts


def _layers(candidates, parts):
    """The layers that have weights in the state, and those that have inputs alone."""
    layers, taken = [], set()
    for found in sorted(candidates, key=lambda c: c.name.replace(".", "/") not in parts["weights"]):
        weight = parts["weights"].get(found.name.replace(".", "/"))
        modules = [c.name.rpartition(".")[0] for c in candidates if c.tensor is found.tensor]
        inputs = [parts["inputs"].get(path.replace(".", "/") or "/") for path in modules if found.attribute == "weight"]
        inputs = [fields for fields in inputs if fields]
        if id(found.tensor) in taken or not (weight or inputs):
            continue
        taken.add(id(found.tensor))
        bits, axis, group_size = weight["form"].tolist() if weight else (None, -1, 0)
        activation_bits = inputs[0]["form"].item() if inputs else None
        axis = None if axis < 0 else axis
        options = QuantizationOptions("lsq", bits, activation_bits, axis, group_size or None).checked(found.name)
        layers.append(layer_of(found, candidates, options))
    return layers


def _weight(layer, parts):
    w, o, fields = layer.weight(), layer.options, parts[layer.key]
    form = Grid(o.weight_bits, o.axis, o.group_size)
    wrong = form.wrong(w.shape)
    if wrong:
        raise ValueError(
            f"the state of {layer.name} has {wrong[0]} {wrong[1]}, but the weight has shape {tuple(w.shape)}"
        )
    step, zero = _values(layer.name, fields, w, () if o.axis is None else (form.channels(w.shape),))
    return FrozenWeight(w, o.weight_bits, o.axis, step, zero, o.group_size)


def _input(layer, key, parts):
    fields, w = parts[key], layer.weight()
    step, zero = _values(f"the input of {_name(key)}", fields, w, ())
    return FrozenInput(w, layer.options, step, zero, bool(fields["signed"]))


def _values(name, fields, w, shape):
    """Copies of the step and zero point of a state, of this shape."""
    made = {"zero": None}
    for field in fields.keys() & {"step", "zero"}:
        value = fields[field]
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
            found = tuple(value.shape) if isinstance(value, torch.Tensor) else value
            raise ValueError(f"{field} of {name} in the state has shape {found}; this model's needs {shape}")
        made[field] = value.to(w.device, copy=True)
    return made["step"], made["zero"]
