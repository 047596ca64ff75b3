"""The layers of a model that something attaches to, with their options."""

from typing import NamedTuple

from torch import nn

from ..reference.checks import is_dtensor
from ..sharding.shards import whole
from .places import ComputedPlace, HeldPlace, place_of
from .select import is_conv1d, is_experts, is_weight, matches, matrices, none_left, selected, warn_of_coverage
from .sharded import refuse_flattened


class Layer(NamedTuple):
    """A weight of the model, where it is, and its options."""

    name: str
    places: list  # a `Place` for each module that reads the weight
    options: tuple
    output_axis: int = 0  # the dimension of the output channels
    experts: bool = False  # whether the first dimension counts the experts of a mixture

    @property
    def key(self):
        return self.name.replace(".", "/")

    @property
    def module(self):
        """The first module that reads the weight."""
        return self.places[0].module

    @property
    def axis(self):
        """The axis of the options as a number, or None: "output" is that of the output channels; experts are at least
        channels of their own."""
        axis = self.options.axis
        return self.output_axis if axis == "output" else 0 if axis is None and self.experts else axis

    @property
    def is_pruned(self):
        place = self.places[0]
        return isinstance(place, ComputedPlace) and place.is_pruned

    def weight(self):
        return self.places[0].value()

    def gathered(self):
        """This layer with its whole weight where that is a DTensor now; a collective then, which all ranks call."""
        w = self.weight()
        refuse_flattened(self.name, w)
        return self.holding(whole(w.detach())) if is_dtensor(w) else self

    def holding(self, w):
        """This layer with another weight, outside of a forward."""
        return self._replace(places=[HeldPlace(self.places[0], w)])


def output_axis(module, attribute="weight"):
    """The dimension of the output channels of a module's weight."""
    turned = is_conv1d(module) or isinstance(module, nn.modules.conv._ConvTransposeNd)
    return int(turned and attribute == "weight")


def layers_of(model, usual, overrides, include=None, exclude=None, *, embeddings=False, stacklevel=4):
    """The `Layer` of every weight of the model that neither `exclude` nor `overrides` leave out, with its options.

    These are `usual`, a NamedTuple, with the options of all patterns that match; of several the last one counts. Warns
    where much of the model is left out that nobody named. ValueError where nothing is left.
    """
    overrides = _checked(overrides, usual)

    def is_usual(module, attribute, p):
        return is_weight(module, attribute, p, embeddings, recurrent=True)

    candidates = list(matrices(model, computed=True))
    kept, left = selected(candidates, include, exclude, is_usual)
    if not kept:
        raise ValueError(none_left(model, exclude))
    layers, used = [], set()
    for found in kept:
        options = _options(found.name, usual, overrides, used)
        if options is None:
            continue
        layers.append(layer_of(found, candidates, options))
    missed = [pattern for pattern in overrides if pattern not in used]
    if missed:
        raise ValueError(f"overrides[{missed[0]!r}] matches no weight of the model")
    warn_of_coverage(kept, left, stacklevel)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no weight left after exclude={exclude!r} and overrides={overrides!r}; "
            "use include="
        )
    return layers


def layer_of(found, candidates, options):
    """The `Layer` of one of the candidates."""
    places = [place_of(c.module, c.attribute) for c in candidates if c.tensor is found.tensor]
    axis, experts = output_axis(found.module, found.attribute), is_experts(found.module, found.tensor)
    return Layer(found.name, places, options, axis, experts)


def _checked(overrides, usual):
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, dict):
        raise TypeError(f"overrides must be a dict of name pattern -> options, got {type(overrides).__name__}")
    for pattern, given in overrides.items():
        if given != "skip" and not isinstance(given, dict):
            raise TypeError(f'overrides[{pattern!r}] must be a dict of options or "skip", got {given!r}')
        unknown = [] if given == "skip" else sorted(set(given) - set(usual._fields))
        if unknown:
            raise ValueError(f"overrides[{pattern!r}] has no option {unknown[0]!r}; allowed are {usual._fields}")
    return overrides


def _options(name, usual, overrides, used):
    """The options of a weight, or None where it is skipped; adds to `used` the patterns that match."""
    options = usual
    for pattern, given in overrides.items():
        if matches(name, pattern):
            used.add(pattern)
            options = None if given == "skip" else (options or usual)._replace(**given).checked(name)
    return options
