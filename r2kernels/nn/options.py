"""How each layer of a model is quantized."""

import math
from typing import NamedTuple

from ..reference import checks
from .input_scales import EWGSInput, LSQInput, PACTInput
from .layers import layers_of
from .scales import DoReFaWeight, EWGSWeight, LSQWeight

METHODS = {"lsq": (LSQWeight, LSQInput), "ewgs": (EWGSWeight, EWGSInput), "pact": (DoReFaWeight, PACTInput)}


class QuantizationOptions(NamedTuple):
    """How a layer is quantized; the fields are the arguments of `Quantizer`, and those that `overrides` alone have."""

    method: str
    weight_bits: int | None
    activation_bits: int | None = None
    axis: int | str | None = None
    group_size: int | None = None
    levels: str = "lsq"
    delta: float | str = 1e-3
    plus: bool = False
    detach_max: bool = False

    def checked(self, name):
        """These options, or an error that says which of them is not allowed for layer `name`."""
        if self.method not in METHODS:
            raise ValueError(f"method of {name} must be one of {tuple(METHODS)}, got {self.method!r}")
        for option in ("weight_bits", "activation_bits"):
            if getattr(self, option) is not None:
                checks.bit_width(getattr(self, option), f"{option} of {name}")
        if self.weight_bits is None and self.activation_bits is None:
            raise ValueError(f'weight_bits and activation_bits of {name} are both None; "skip" leaves a layer out')
        if self.axis not in (None, "output") and (isinstance(self.axis, bool) or not isinstance(self.axis, int)):
            raise TypeError(f'axis of {name} must be an int, "output" or None, got {self.axis!r}')
        if self.axis is not None and self.method != "lsq":
            raise ValueError(
                f"axis of {name} must be None for method {self.method!r}, which has one range for each tensor, "
                f"got {self.axis!r}"
            )
        if self.group_size is not None:
            checks.count(f"group_size of {name}", self.group_size)
        for option, usual in (("group_size", None), ("levels", "lsq")):
            if getattr(self, option) != usual and (self.method != "lsq" or self.weight_bits is None):
                raise ValueError(
                    f'{option} of {name} needs method "lsq" and weight_bits, got {getattr(self, option)!r} for method '
                    f"{self.method!r} and weight_bits={self.weight_bits}"
                )
        checks.level_kind(self.levels, self.weight_bits, of=f" of {name}")
        if self.delta != "hessian":
            checks.number(
                f"delta of {name}", self.delta, 'a finite number >= 0 or "hessian"', lambda v: 0 <= v < math.inf
            )
        for option in ("plus", "detach_max"):
            if not isinstance(getattr(self, option), bool):
                raise TypeError(f"{option} of {name} must be True or False, got {getattr(self, option)!r}")
        return self._replace(axis="output") if self.group_size is not None and self.axis is None else self

    @property
    def has_zero(self):
        """Whether 0 is one of the levels of a weight."""
        return self.method == "lsq" and self.levels != "seq" and self.weight_bits > 1


def quantizable(model, usual, overrides, include=None, exclude=None):
    """The layers to quantize, checked."""
    layers = []
    for layer in layers_of(model, usual, overrides, include, exclude, stacklevel=5):
        o, w = layer.options, layer.gathered().weight()
        checks.weights(w, name=layer.name)
        axis = checks.channel_axis(layer.axis, [w], True, layer.name)
        checks.groups(o.group_size, w, axis, layer.name)
        if not w.isfinite().all():
            raise ValueError(f"{layer.name} has a NaN or an infinity; it cannot be quantized")
        if layer.is_pruned and o.weight_bits is not None and not o.has_zero:
            raise ValueError(
                f'{layer.name} is pruned, but method "{o.method}" with weight_bits={o.weight_bits} and '
                f'levels="{o.levels}" has no level 0 for its zeros; use "lsq" with 2 bits or more, or skip the layer'
            )
        layers.append(layer._replace(options=o._replace(axis=axis if o.method == "lsq" else None)))
    return layers
