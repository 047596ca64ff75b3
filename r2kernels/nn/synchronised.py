"""Parameters that the ranks of torch.distributed share while each has batches of its own: ranges of quantizers.

A forward in train() is *shared* where all ranks run it: inside DistributedDataParallel, in a model of `fully_shard`,
or with a process group that was given. What starts in it starts on all ranks from the same values, and at the end of a
backward through its output every rank averages the gradients once, unless synchronisation is off (`no_sync`,
`set_requires_gradient_sync`). Any other forward communicates nothing.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

from ..reference.checks import is_dtensor
from .attach import Attached, in_backward
from .ranks import average_gradients, broadcast, is_distributed
from .sharded import averages_gradients, groups_of


class Ranks(NamedTuple):
    """The ranks that share a forward: process groups, of which they are the product, and whether the backward that
    begins now is synchronised."""

    groups: tuple
    synchronises: object


class _Given:
    """A process group, which copies share and files do not have."""

    def __init__(self, group=None):
        self.group = group

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return _Given, ()


class Synchronised(Attached):
    """An attached module whose learned parameters and state the ranks share."""

    def _share(self, process_group=None):
        self._given, self._ranks, self._is_shared, self._warned_alone = _Given(process_group), None, False, False
        self._synchronises, self._averaging = True, False
        # `Ranks` of a forward whose backward is known by the parameters it reaches; True: it was compiled
        self._by_parameters = None

    @contextlib.contextmanager
    def no_sync(self):
        """Forwards inside this block are not shared, where a `process_group` was given: their gradients are averaged by
        the next backward of one that is, and no range starts in them."""
        before, self._synchronises = self._synchronises, False
        try:
            yield self
        finally:
            self._synchronises = before

    def _found_ranks(self):
        """The `Ranks` of the forward that begins now, or None."""
        if self._given.group is not None:
            return Ranks((self._given.group,), lambda: True) if self._synchronises else None
        ddp = DistributedDataParallel._get_active_ddp_module()
        if ddp is not None:
            needed = ddp.require_backward_grad_sync and not any(module is self for module in ddp.module.modules())
            return Ranks((ddp.process_group,), lambda: needed)
        unit = next(iter(self._units.layers), None)
        return unit if unit is None else Ranks(groups_of(unit), lambda: averages_gradients(unit))

    def _all_ranks(self):
        """The process groups of what all ranks call outside a forward; None is that of all ranks."""
        ranks = self._found_ranks()
        return (self._given.group,) if ranks is None else ranks.groups

    @property
    def _may_start(self):
        """Whether ranges may start in this forward: not in one of this rank alone once ranges are shared."""
        if self._ranks is not None or not is_distributed():
            return True
        return not (self._is_shared or self._given.group is not None or self._units.layers)

    def _meet(self, trains):
        """At the begin of a forward: who shares it. In the first that is shared all take the first rank's state."""
        if self._ranks is not None or self._by_parameters:
            self._ranks, self._by_parameters = None, None
        if not trains or not is_distributed() or in_backward():
            return
        self._ranks = self._found_ranks()
        if self._ranks is not None and not self._is_shared:
            self._is_shared = True
            self._broadcast(self._ranks.groups)
        elif self._ranks is None and self._given.group is None and not (self._is_shared or self._warned_alone):
            if not any(p.requires_grad for p in self.parameters()):
                return
            self._warned_alone = True
            if any(is_dtensor(layer.weight()) for layer in self.layers):
                return  # tensor parallelism alone: all ranks have the same batch, and the same gradients
            warnings.warn(
                f"the ranges of this {type(self).__name__} are not averaged over the ranks of torch.distributed: its "
                "model runs neither inside DistributedDataParallel nor after fully_shard. Pass process_group= "
                "(torch.distributed.group.WORLD for all ranks) if they share one training",
                stacklevel=9,
            )

    def _broadcast(self, groups):
        """Takes the state of the first rank."""
        with torch.no_grad():
            broadcast(list(self.state_dict().values()), groups)
        self._read()

    def _returned(self, output):
        if torch.compiler.is_compiling() or self._ranks is None or not torch.is_grad_enabled():
            return
        ranks, outputs = self._ranks, list(_with_gradient(output))
        for t in outputs:
            t.register_hook(lambda _: self._backward_begins(ranks))
        self._by_parameters = None if outputs else ranks

    def _hook_gradients(self):
        """Hears of a backward by the parameters it reaches: of a forward that is compiled, or without an output that
        could have a hook."""
        for p in self.parameters():
            p.register_post_accumulate_grad_hook(self._reached)

    def _reached(self, p):
        if not self._by_parameters or not is_distributed():
            return
        if not any(module is self for module in self._model[0].modules()):  # else DDP has averaged it
            self._backward_begins(self._compiled_ranks() if self._by_parameters is True else self._by_parameters)

    def _compiled_ranks(self):
        """The ranks of a compiled forward, of which nobody saw whether DDP synchronises it: every backward is."""
        ranks, synchronises = self._found_ranks(), self._synchronises
        groups = (self._given.group,) if self._ranks is None else self._ranks.groups
        return Ranks(groups, lambda: synchronises) if ranks is None else ranks

    def _backward_begins(self, ranks):
        if not self._averaging and ranks.synchronises():
            self._averaging = True
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._average(ranks.groups))

    @torch.no_grad()
    def _average(self, groups):
        self._averaging = False
        learned = [p for p in self.parameters() if p.requires_grad]
        if learned:
            average_gradients(learned, groups)

    def __getstate__(self):
        return {**super().__getstate__(), "_ranks": None, "_averaging": False, "_by_parameters": None}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._hook_gradients()  # hooks stay behind with the parameters that were copied


def _with_gradient(output):
    """The tensors of a model's output that have a graph."""
    if isinstance(output, torch.Tensor):
        if output.requires_grad:
            yield output
    elif isinstance(output, (Mapping, list, tuple)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _with_gradient(part)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from _with_gradient(getattr(output, field.name))
