"""How a module stands before the weights of a model.

Hooks put attributes of the same name before the parameters while the model runs; the parameters themselves stay.
"""

import fnmatch
from typing import NamedTuple

import torch
from torch import nn

from .select import select_weights


class Layer(NamedTuple):
    """A weight of the model, where it is, and its options."""

    name: str
    places: list  # (module, attribute) of all modules that share the weight
    options: tuple

    @property
    def key(self):
        return self.name.replace(".", "/")

    def weight(self):
        module, attribute = self.places[0]
        return module._parameters[attribute]


class Attached(nn.Module):
    """A module that gives the layers of a model other weights.

    A subclass says which: `_soft_all()` in train(), `_hard(layers)` in eval(), `_one_soft(i)` for a layer alone. The
    parameters stay where and what they are. `_hats` holds the weights of the last forward, for a part of it that is
    computed again in backward.
    """

    def _attach(self, model, layers):
        self.layers = layers
        self._model = (model,)  # in a tuple, so that it does not become a part of this module
        self._hats, self._inside, self._hard_of = None, False, None
        self._handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        for i, layer in enumerate(layers):
            for module, attribute in layer.places:
                for caller in (module, *readers(model, module)):
                    before, after = _ShadowAlone(self, i, module, attribute), _UnshadowAlone(self, module, attribute)
                    self._handles.append(caller.register_forward_pre_hook(before))
                    self._handles.append(caller.register_forward_hook(after, always_call=True))

    def _tensors(self):
        """What the hard weights are made of."""
        raise NotImplementedError

    def _hard_once(self):
        """Hard weights, kept from one forward in eval to the next while nothing that they are made of changes."""
        if torch.compiler.is_compiling():
            return self._hard(self.layers)
        now = [(id(t), t._version) for t in self._tensors()]
        if self._hard_of is None or self._hard_of[0] != now:
            with torch.inference_mode(False):  # a tensor of inference mode could not be saved for backward later
                self._hard_of = now, self._hard(self.layers)
        return self._hard_of[1]

    def _enter(self, model, args, kwargs):
        if model.training:
            self._hard_of = None
            self._hats = self._soft_all()
        else:
            self._hats = self._hard_once()
        self._shadow()

    def _shadow(self):
        for layer, hat in zip(self.layers, self._hats, strict=True):
            for module, attribute in layer.places:
                object.__setattr__(module, attribute, hat)
        self._inside = True

    def _leave(self, model, args, output):
        self._inside = False
        for layer in self.layers:
            for module, attribute in layer.places:
                _unshadow(module, attribute)

    def _one(self, i, training):
        """A layer's weight outside of a forward of the whole model.

        Either checkpointing computes the layer again in a backward, or a part of the model is called alone.
        """
        if self._hats is not None and in_backward():
            return self._hats[i]
        return self._one_soft(i) if training else self._hard([self.layers[i]])[0]

    def model_state(self):
        """The model's `state_dict` without the weights of the layers, under whatever names they have."""
        own = {id(layer.weight()) for layer in self.layers}
        model = self._model[0]
        shared = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in own}
        return {name: value for name, value in model.state_dict().items() if name not in shared}

    @torch.no_grad()
    def remove(self, bake=True):
        """Detaches from the model; with `bake` its weights become the hard ones, else they stay dense."""
        if bake:
            for layer, hard in zip(self.layers, self._hard(self.layers), strict=True):
                layer.weight().copy_(hard)
        for handle in self._handles:
            handle.remove()
        self._leave(None, None, None)
        self._handles, self._hats, self._hard_of = [], None, None

    def __getstate__(self):
        return {**self.__dict__, "_hats": None, "_hard_of": None}


class _ShadowAlone:
    """A hook before a layer: outside of a forward of the whole model it gives the layer its soft or hard weight."""

    def __init__(self, owner, i, module, attribute):
        self.owner, self.i, self.module, self.attribute = owner, i, module, attribute

    def __call__(self, caller, args):
        if not self.owner._inside:
            object.__setattr__(self.module, self.attribute, self.owner._one(self.i, caller.training))


class _UnshadowAlone:
    """A hook after a layer: takes away what `_ShadowAlone` gave, also where the layer raised an error."""

    def __init__(self, owner, module, attribute):
        self.owner, self.module, self.attribute = owner, module, attribute

    def __call__(self, caller, args, output):
        if not self.owner._inside:
            _unshadow(self.module, self.attribute)


def in_backward():
    """Whether autograd runs a backward in this thread, as when checkpointing computes a part again."""
    return torch._C._current_graph_task_id() != -1


def readers(model, module):
    """The modules that read a weight of this one without calling it."""
    return [m for m in model.modules() if isinstance(m, nn.MultiheadAttention) and m.out_proj is module]


def _unshadow(module, attribute):
    """Takes away the attribute that stands before the parameter of the same name."""
    if torch.compiler.is_compiling():  # which cannot delete
        object.__setattr__(module, attribute, module._parameters[attribute])
    elif attribute in module.__dict__:
        object.__delattr__(module, attribute)


def layers_of(model, usual, overrides, *, embeddings=False):
    """The `Layer` of every weight of the model that `overrides` do not skip, with its options.

    These are `usual`, a NamedTuple, with the options of all patterns that match; of several the last one counts.
    """
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, dict):
        raise TypeError(f"overrides must be a dict of name pattern -> options, got {type(overrides).__name__}")
    for pattern, given in overrides.items():
        if given != "skip" and not isinstance(given, dict):
            raise TypeError(f'overrides[{pattern!r}] must be a dict of options or "skip", got {given!r}')
        unknown = [] if given == "skip" else sorted(set(given) - set(usual._fields))
        if unknown:
            raise ValueError(f"overrides[{pattern!r}] has no option {unknown[0]!r}; allowed are {usual._fields}")
    layers, used = [], set()
    for name, module, attribute in select_weights(model, embeddings=embeddings):
        path, options = name.rpartition(".")[0], usual
        for pattern, given in overrides.items():
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(path, pattern):
                used.add(pattern)
                options = None if given == "skip" else (options or usual)._replace(**given).checked(name)
        if options is None:
            continue
        p = module._parameters[attribute]
        layers.append(
            Layer(name, [(m, a) for m in model.modules() for a, q in m._parameters.items() if q is p], options)
        )
    missed = [pattern for pattern in overrides if pattern not in used]
    if missed:
        raise ValueError(f"overrides[{missed[0]!r}] matches no weight of the model")
    return layers
