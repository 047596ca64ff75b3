"""Where a weight is read, and how another tensor stands there while the model runs."""

import weakref

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..sharding.shards import placed
from .sharded import refuse_flattened


class Place:
    """A parameter of a module: an attribute of the same name stands before it."""

    def __init__(self, module, attribute):
        self.module, self.attribute = module, attribute

    def value(self):
        """The weight, with its graph where it is computed from other parameters."""
        p = self.module._parameters.get(self.attribute)
        if type(p) is nn.Parameter:
            return p
        p = self.module.__dict__.get(self.attribute) if p is None else p
        if isinstance(p, torch.Tensor):
            refuse_flattened(f"{self.attribute} of a {type(self.module).__name__}", p)
        if self.module._parameters.get(self.attribute) is None:
            raise RuntimeError(
                f"{self.attribute} of a {type(self.module).__name__} is no longer its parameter (pruned or "
                "parametrized after the attachment?); remove() before such changes and attach again"
            )
        return p

    def hook(self):
        """Handles of the hooks that this place needs."""
        return []

    def put(self, hat):
        object.__setattr__(self.module, self.attribute, hat)

    def take(self):
        if torch.compiler.is_dynamo_compiling():  # which cannot delete
            object.__setattr__(self.module, self.attribute, self.module._parameters[self.attribute])
        elif self.attribute in self.module.__dict__:
            object.__delattr__(self.module, self.attribute)

    def is_stored_as(self, key):
        """Whether an entry of the module's state_dict belongs to this weight."""
        return key == self.attribute

    def bake(self, hard):
        """The weight as a plain parameter with these numbers; of a DTensor each rank writes its shard."""
        p = self.module._parameters[self.attribute]
        p.copy_(placed(hard, p))


class HeldPlace(Place):
    """A weight that was gathered from its shards, or one of these."""

    def __init__(self, place, held):
        super().__init__(place.module, place.attribute)
        self.held = held

    def value(self):
        return self.held


class RecurrentPlace(Place):
    """A weight of an LSTM, GRU or RNN, which also keeps a list of its weights."""

    def put(self, hat):
        super().put(hat)
        self._list(hat)

    def take(self):
        super().take()
        self._list(self.module._parameters[self.attribute])

    def _list(self, w):
        i = self.module._flat_weights_names.index(self.attribute)
        self.module._flat_weights[i] = w
        self.module._flat_weight_refs[i] = weakref.ref(w)


class ParametrizedPlace(Place):
    """A weight that `torch.nn.utils.parametrize` computes; `bake` removes the parametrization."""

    def __init__(self, module, attribute):
        super().__init__(module, attribute)
        self.hat = None

    @property
    def computes(self):
        return self.module.parametrizations[self.attribute]

    def value(self):
        return self.computes.forward()  # without the hook

    def hook(self):
        return [self.computes.register_forward_hook(self)]

    def __call__(self, computes, args, value):
        return value if self.hat is None else self.hat

    def put(self, hat):
        self.hat = hat

    def take(self):
        self.hat = None

    def is_stored_as(self, key):
        return key.startswith(f"parametrizations.{self.attribute}.")

    def bake(self, hard):
        with torch.enable_grad():  # or what several parameters compute would not become a parameter
            parametrize.remove_parametrizations(self.module, self.attribute, leave_parametrized=True)
        super().bake(hard)

    def __getstate__(self):
        return {**self.__dict__, "hat": None}


class ComputedPlace(Place):
    """A weight that a hook of the module computes before each call (`torch.nn.utils.prune`, the older `weight_norm`
    and `spectral_norm`); `bake` removes that hook."""

    def __init__(self, module, attribute):
        super().__init__(module, attribute)
        self.hat = self.kept = None

    @property
    def is_pruned(self):
        return f"{self.attribute}_mask" in self.module._buffers

    def value(self):
        for compute in makers(self.module, self.attribute).values():
            compute(self.module, None)
        return getattr(self.module, self.attribute)

    def hook(self):
        return [self.module.register_forward_pre_hook(self)]

    def __call__(self, module, args):
        if self.hat is not None:
            setattr(self.module, self.attribute, self.hat)

    def put(self, hat):
        if self.hat is None:
            self.kept = getattr(self.module, self.attribute)
        self.hat = hat
        setattr(self.module, self.attribute, hat)

    def take(self):
        if self.hat is not None:
            setattr(self.module, self.attribute, self.kept)
        self.hat = self.kept = None

    def is_stored_as(self, key):
        return key.startswith(f"{self.attribute}_")

    def bake(self, hard):
        for key, compute in makers(self.module, self.attribute).items():
            compute.remove(self.module)
            del self.module._forward_pre_hooks[key]
        super().bake(hard)

    def __getstate__(self):
        return {**self.__dict__, "hat": None, "kept": None}


def makers(module, attribute):
    """The hooks of a module that compute this attribute before each call, by their keys."""
    return {
        key: hook
        for key, hook in module._forward_pre_hooks.items()
        if attribute == getattr(hook, "_tensor_name", getattr(hook, "name", None)) and hasattr(hook, "remove")
    }


def place_of(module, attribute):
    if parametrize.is_parametrized(module, attribute):
        return ParametrizedPlace(module, attribute)
    if attribute not in module._parameters:
        return ComputedPlace(module, attribute)
    return RecurrentPlace(module, attribute) if isinstance(module, nn.RNNBase) else Place(module, attribute)
