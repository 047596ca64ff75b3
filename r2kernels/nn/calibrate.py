"""Quantization after training: steps and zero points from the weights, and from the inputs of the layers."""

import warnings
from typing import NamedTuple

import torch

from ..reference import checks
from ..reference.columns import accumulator
from ..sharding.shards import whole
from .batches import check_loader, evaluating, run
from .clipping import METHODS, PERCENTILE, Histogram, histogram_qparams, weight_qparams
from .importance import importances_of
from .input_scales import FrozenInput
from .inputs import InputHook, input_places
from .layers import layers_of
from .options import QuantizationOptions
from .quantizer import Quantizer
from .ranks import is_distributed, reduce
from .scales import FrozenWeight


class CalibrationOptions(NamedTuple):
    """How a layer is quantized: the arguments of `calibrate` that `overrides` may have too."""

    weight_bits: int | None
    activation_bits: int | None
    axis: int | str | None
    group_size: int | None
    method: str
    symmetric: bool
    percentile: float

    def checked(self, name):
        """These options, or an error that says which of them is not allowed for layer `name`."""
        self.held().checked(name)
        if self.method not in METHODS:
            raise ValueError(f"method of {name} must be one of {METHODS}, got {self.method!r}")
        if not isinstance(self.symmetric, bool):
            raise TypeError(f"symmetric of {name} must be True or False, got {self.symmetric!r}")
        checks.number(f"percentile of {name}", self.percentile, "a number in (50, 100]", lambda v: 50 < v <= 100)
        if self.group_size is not None and self.method == "percentile":
            raise ValueError(f'method of {name} must be "mse" or "minmax" with group_size, got {self.method!r}')
        return self._replace(axis="output") if self.group_size is not None and self.axis is None else self

    def held(self):
        """Those that a `Quantizer` knows."""
        return QuantizationOptions("lsq", self.weight_bits, self.activation_bits, self.axis, self.group_size)


@torch.no_grad()
def calibrate(
    model,
    loader,
    weight_bits=8,
    activation_bits=8,
    *,
    method="mse",
    axis="output",
    group_size=None,
    symmetric=True,
    percentile=PERCENTILE,
    weight=None,
    batches=None,
    forward=None,
    include=None,
    exclude=None,
    overrides=None,
    replace=False,
    process_group=None,
):
    """A `Quantizer` of the model with frozen steps and zero points, found without training.

        quantizer = calibrate(model, loader, batches=16, overrides={"head": {"weight_bits": 4}, "stem": "skip"})
        model.eval()(x)  # quantized
        torch.save(quantizer.state_dict(), "ranges.pt")
        quantizer = Quantizer.from_state(model, torch.load("ranges.pt"))  # the same bits, without a loader

    The model keeps its mode; eval() runs on the quantized weights.

    weight_bits, activation_bits: an int in 1..8, or None for what is not to be quantized. Without activations no loader
        is needed (None).
    method: "minmax", from the least to the greatest number; "mse", the clipping of the least mean squared error;
        "percentile", the clipping at a `percentile` in (50, 100] of |x|, without `symmetric` at that of either tail. Of
        each tensor or channel there is one histogram, of 8192 bins between powers of two, which the order and the size
        of the batches do not change.
    axis: of the weights' channels: "output" for the output channels of each layer (1 for transposed convolutions, else
        0), an int for all layers, or None for one step for each tensor; activations have one.
    group_size: how many numbers of a channel, one after the other, share a step, as in `Quantizer`; found by trying.
    symmetric: LSQ's levels step * code, for activations without negative values unsigned; else 2**bits levels
        step * (code - zero) with an integer zero.
    weight: name -> importances of a weight, as `sensitivity` gives them, by which "mse" counts the squared errors of
        weights. Those without are not weighted.
    include, exclude: as in `select_weights`; overrides: name pattern (of the parameter or its module) -> dict of these
        options, or "skip"; of several that match the last one counts.
    replace: whether to remove what is attached to the layers already, before the first batch; else that is an error.

    loader: batches for the steps of the activations; one pass, so an iterator will do, of at most `batches`. The model
        runs on them in eval(), with quantized weights. A tensor is the input. Of a tuple or list the model is given as
        many elements as its forward has positional parameters without a default, at least one; what follows are
        targets. A mapping, or a tuple that begins with one, becomes keyword arguments, without those that forward does
        not have. Anything else by `forward`, a function of (model, batch). Tensors are moved to the model's device. A
        bar is shown where stderr is a terminal and tqdm is installed.

    An input that no batch reaches, or that is given zeros alone, stays as it is, with a warning. Under
    torch.distributed all ranks of `process_group` (None: those of `fully_shard`, else all) must call this; they take
    the ranges of all ranks' batches, and the first rank's of the weights.
    On CUDA nothing is read back before the last batch. TypeError or ValueError names the argument, or the layer whose
    weight or input is not finite.
    """
    usual = CalibrationOptions(weight_bits, activation_bits, axis, group_size, method, symmetric, percentile)
    usual = usual.checked("the model")
    layers = _layers(model, usual, overrides, include, exclude)
    places = input_places(model, layers)
    if places:
        check_loader(loader, batches, forward)
    held = [layer._replace(options=layer.options.held()) for layer in layers]
    importance = importances_of({layer.name: layer.weight().shape for layer in layers}, weight)
    weights = {layer.key: _frozen_weight(layer, importance) for layer in layers if layer.options.weight_bits}
    inputs = {}
    if places:
        quantizer = Quantizer._frozen(model, held, weights, {}, replace=replace, process_group=process_group)
        histograms = _histograms(model, loader, layers, places, quantizer, batches=batches, forward=forward)
        inputs = _frozen_inputs(layers, places, histograms)
    quantizer = Quantizer._frozen(model, held, weights, inputs, replace=replace, process_group=process_group)
    if is_distributed():
        quantizer._broadcast(quantizer._all_ranks())
    return quantizer


def _layers(model, usual, overrides, include, exclude):
    """The layers to quantize, each with its axis as a number >= 0, or None."""
    layers = []
    for layer in layers_of(model, usual, overrides, include, exclude, stacklevel=6):
        w = layer.gathered().weight()
        checks.weights(w, name=layer.name)
        axis = checks.channel_axis(layer.axis, [w], True, layer.name)
        checks.groups(layer.options.group_size, w, axis, layer.name)
        axis = None if axis is None else axis % w.dim()
        layers.append(layer._replace(options=layer.options._replace(axis=axis)))
    return layers


def _frozen_weight(layer, importance):
    w, o, h = layer.gathered().weight(), layer.options, importance.get(layer.name)
    h = None if h is None else h.to(w.device)
    found = weight_qparams(w, o.weight_bits, o.axis, o.method, o.symmetric, o.group_size, o.percentile, h)
    if found is None:
        raise ValueError(f"{layer.name} has a NaN or an infinity; it cannot be quantized")
    return FrozenWeight(w, o.weight_bits, o.axis, *found, o.group_size)


class _Observer:
    """Key of an input -> histogram of what the layer is given; the owner of `InputHook`s that change nothing."""

    def __init__(self):
        self.histograms = {}

    def _input(self, key, i, module, x):
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel():
            self.histograms.setdefault(key, Histogram(1, x.device)).add(whole(x).reshape(1, -1))
        return x


def _histograms(model, loader, layers, places, quantizer, **options):
    """Key -> `Histogram` of every input, over the loader's batches on all ranks; removes the quantizer."""
    observer, device = _Observer(), layers[0].weight().device
    handles = [
        module.register_forward_pre_hook(InputHook(observer, key, i), with_kwargs=True) for key, i, module in places
    ]
    try:
        with evaluating(model):
            count = torch.tensor(run(model, loader, device, title="calibrate", **options), device=device)
    finally:
        for handle in handles:
            handle.remove()
        quantizer.remove(bake=False)
    seen = {key: observer.histograms.get(key) or Histogram(1, device) for key, _, _ in places}
    if is_distributed():
        _merge(seen.values(), count, quantizer._all_ranks())
    if not count:
        raise ValueError(
            "loader is empty; calibrate needs at least one batch for activation_bits "
            "(activation_bits=None quantizes the weights alone)"
        )
    return seen


def _merge(histograms, count, groups):
    """Gives the histograms, and the count of batches, what those of all ranks hold together."""
    ends = [(h.exponent.double(), -h.low, h.high) for h in histograms]
    reduce([t for some in ends for t in some], "max", groups)
    for h, (exponent, low, high) in zip(histograms, ends, strict=True):
        h.widen(exponent.long())
        h.low, h.high = -low, high
    reduce([count, *(t for h in histograms for t in (h.count, h.strange))], "sum", groups)


def _frozen_inputs(layers, places, histograms):
    """Key -> `FrozenInput` of every input that was given a number other than 0."""
    made = {}
    for key, i, _ in places:
        layer, histogram, o = layers[i], histograms[key], layers[i].options
        if histogram.strange:
            raise ValueError(
                f"the input of {layer.name} has a NaN or an infinity; the loader cannot be used for calibration"
            )
        if not histogram.low < 0 and not histogram.high > 0:
            why = "gave it zeros alone" if histogram.count.any() else "reached it"
            which = "the loader" if histogram.count.any() else "no batch of the loader"
            warnings.warn(f"the input of {layer.name} stays as it is: {which} {why}", stacklevel=4)
            continue
        signed = bool(histogram.low < 0)
        found = histogram_qparams(histogram, o.activation_bits, o.method, o.symmetric, signed, o.percentile)
        w = layer.weight()
        step, zero = (None if v is None else v[0].to(w.device, accumulator(w.dtype)) for v in found)
        made[key] = FrozenInput(w, o, step, zero, signed)
    return made
