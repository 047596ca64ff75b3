"""Weights that torch.distributed has divided: which they are, who makes them whole and when.

Under `fully_shard` a module (a unit) gathers its parameters before its forward and drops them after it; in between its
weights are plain tensors. Under tensor parallelism they stay DTensors.
"""

import sys

import torch
from torch import distributed


def refuse_flattened(name, w):
    """RuntimeError where FullyShardedDataParallel (FSDP1) has made the tensor w a part of its flat parameter, of which
    it moves and frees the memory."""
    if torch.compiler.is_compiling():
        return
    if "_fsdp_flattened" in w.__dict__ or (w._base is not None and "_fsdp_flattened" in w._base.__dict__):
        raise RuntimeError(
            f"{name} is a part of a flat parameter of FullyShardedDataParallel (FSDP1), which has no weights of layers "
            "to work on; shard the model by torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def refuse_any_flattened(names, ws):
    """The same of many tensors."""
    if not torch.compiler.is_compiling() and has_ranks():
        for name, w in zip(names, ws, strict=True):
            refuse_flattened(name, w)


def has_ranks():
    return distributed.is_available() and distributed.is_initialized()


def refuse_options(name, **options):
    """ValueError for options of a layer, unless they are None, that need a whole weight."""
    for option, value in options.items():
        if value is not None:
            raise ValueError(
                f"{option}={value!r} of {name} needs the whole weight, but under tensor parallelism each rank has a "
                "part of it; leave the option out or shard by fully_shard"
            )


def is_unit(module):
    """Whether `fully_shard` was called with this module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # before it is imported there are none
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


class Units:
    """The units of a model. `layers`: unit -> numbers of the layers that it makes whole; {} without `fully_shard`."""

    def __init__(self, model, layers, holders):
        """holders: the modules that hold layers."""
        self._model, self._all, self._holders = model, layers, holders
        self._kinds, self.layers, self.numbers, self._below = [], {}, set(), {}
        self.find()

    def find(self):
        """Looks anew where `fully_shard` was called in between, which changes the classes of modules."""
        if has_ranks():
            for layer in self._all:
                for place in layer.places:
                    p = place.module._parameters.get(place.attribute)
                    if p is not None:
                        refuse_flattened(layer.name, p)
        kinds = list(map(type, self._holders))
        if kinds != self._kinds:
            self._kinds, self.layers, self._below = kinds, self._found(), {}
            self.numbers = {i for some in self.layers.values() for i in some}
        return self.layers

    def reshard(self):
        """Drops what a forward without backward left whole (the root), as `parameters()` should be the shards."""
        for unit in self.find():
            unit.reshard()

    def _found(self):
        nearest, by_path, found = {}, {}, {}
        for path, module in self._model.named_modules(remove_duplicate=False):
            above = by_path.get(path.rpartition(".")[0]) if path else None
            by_path[path] = nearest[module] = module if is_unit(module) else above
        for i, layer in enumerate(self._all):
            for unit in {nearest.get(place.module): None for place in layer.places}:
                if unit is not None:
                    found.setdefault(unit, []).append(i)
        return found

    def whole_at(self, module, inside):
        """Those of the layers inside a module that no unit below it makes whole."""
        if not self.layers:
            return inside
        if module not in self._below:
            units = [m for m in module.modules() if m is not module and m in self.layers]
            self._below[module] = {i for unit in units for i in self.layers[unit]}
        return [i for i in inside if i not in self._below[module]]

    def __getstate__(self):
        return {**self.__dict__, "_kinds": [], "layers": {}, "numbers": set(), "_below": {}}


def _parameter_groups(unit):
    state = unit._get_fsdp_state()
    return getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # torch 2.11 has one


def groups_of(unit):
    """The process groups of which the product are the ranks with a batch of their own."""
    mesh = _parameter_groups(unit)[0].mesh_info
    names = ("shard_process_group", "replicate_process_group")
    return tuple(getattr(mesh, name) for name in names if hasattr(mesh, name))


def averages_gradients(unit):
    """Whether the unit averages gradients in a backward now (`set_requires_gradient_sync`)."""
    return all(group.reduce_grads and group.all_reduce_grads for group in _parameter_groups(unit))
