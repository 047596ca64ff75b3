"""Quantization after training: steps and zero points from the weights, and from the inputs of the layers."""

import warnings
from collections.abc import Mapping

import torch

from ..reference import checks
from ..reference.columns import accumulator
from .clipping import METHODS, Histogram, histogram_qparams, weight_qparams
from .input_scales import FrozenInput
from .inputs import input_places
from .quantizer import QuantizationOptions, Quantizer, quantizable
from .scales import FrozenWeight


@torch.no_grad()
def calibrate(model, loader, weight_bits=8, activation_bits=8, *, method="mse", axis=0, symmetric=True):
    """A `Quantizer` of the model with frozen steps and zero points, found without training.

    The model keeps its mode; eval() runs on the quantized weights.

    loader: batches for the steps of the activations: a tensor; a tuple or list, of which the first element is the
        input; or a mapping, passed as keyword arguments. They are moved to the model's device; the model runs on them
        in eval(), with its weights quantized. One pass, so an iterator will do. activation_bits=None quantizes the
        weights alone, and needs no loader (None).
    method: "minmax"; or "mse", the clipping of the least mean squared error, searched over one histogram of 4096 bins
        of each tensor or channel.
    axis: of the weights' channels (0: the output channels of conv and linear layers), or None for one step for each
        tensor; activations have one.
    symmetric: LSQ's levels step * code, unsigned for activations without negative values; else 2**bits levels
        step * (code - zero) with an integer zero.

    TypeError or ValueError names the argument, or the layer whose weight or input is not finite.
    """
    options = QuantizationOptions("lsq", weight_bits, activation_bits, axis).checked("the model")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if not isinstance(symmetric, bool):
        raise TypeError(f"symmetric must be True or False, got {symmetric!r}")
    layers, weights = quantizable(model, options, None), {}
    for layer in layers:
        w = layer.weight()
        checks.weights(w, name=layer.name)
        checks.channel_axis(axis, [w], True, layer.name)
        found = weight_qparams(w, weight_bits, axis, method, symmetric)
        if found is None:
            raise ValueError(f"{layer.name} has a NaN or an infinity; it cannot be quantized")
        weights[layer.key] = FrozenWeight(w, weight_bits, axis, *found)
    inputs = {} if activation_bits is None else _inputs(model, loader, layers, weights, method, symmetric)
    return Quantizer._frozen(model, layers, weights, inputs)


def _inputs(model, loader, layers, weights, method, symmetric):
    """key -> `FrozenInput` of every input that the loader's batches reach, seen with quantized weights."""
    if not hasattr(loader, "__iter__") or isinstance(loader, (torch.Tensor, Mapping, str)):
        raise TypeError(
            f"loader must give batches (an iterable of tensors, tuples or mappings), got {type(loader).__name__}"
        )
    seen, modes = {}, [(module, module.training) for module in model.modules()]
    places = input_places(model, layers)
    quantizer = Quantizer._frozen(model, layers, weights, {})
    handles = [
        module.register_forward_pre_hook(_Observer(seen, key, layers[i].name), with_kwargs=True)
        for key, i, module in places
    ]
    try:
        model.eval()
        device, batches = layers[0].weight().device, 0
        for batch in loader:
            _call(model, batch, device)
            batches += 1
    finally:
        for handle in handles:
            handle.remove()
        quantizer.remove(bake=False)
        for module, training in modes:
            module.training = training
    if not batches:
        raise ValueError(
            "loader is empty; calibrate needs at least one batch for activation_bits "
            "(activation_bits=None quantizes the weights alone)"
        )
    made = {}
    for key, i, _ in places:
        w, histogram = layers[i].weight(), seen.get(key)
        if histogram is None:
            warnings.warn(
                f"the input of {layers[i].name} stays as it is: no batch of the loader reached it", stacklevel=4
            )
            continue
        signed, options = bool(histogram.low < 0), layers[i].options
        found = histogram_qparams(histogram, options.activation_bits, method, symmetric, signed)
        step, zero = (None if v is None else v[0].to(w.device, accumulator(w.dtype)) for v in found)
        made[key] = FrozenInput(w, options, step, zero, signed)
    return made


class _Observer:
    """A hook before a layer: adds its input to the histogram under a key."""

    def __init__(self, seen, key, name):
        self.seen, self.key, self.name = seen, key, name

    def __call__(self, module, args, kwargs):
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel():
            if not x.isfinite().all():
                raise ValueError(
                    f"the input of {self.name} has a NaN or an infinity; the loader cannot be used for calibration"
                )
            self.seen.setdefault(self.key, Histogram(1, x.device)).add(x.reshape(1, -1))


def _call(model, batch, device):
    """Runs the model on a batch of the loader."""
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError("loader gave an empty tuple; its first element must be the model's input")
        batch = batch[0]
    if isinstance(batch, Mapping):
        return model(
            **{name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        )
    if not isinstance(batch, torch.Tensor):
        raise TypeError(
            f"loader gave a {type(batch).__name__}; allowed are a tensor, a tuple or list with the input first, "
            "or a mapping of keyword arguments"
        )
    return model(batch.to(device))
