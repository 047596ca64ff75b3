"""The ops on DTensors, weights sharded over the ranks of a mesh: a backend's kernels run on the local shards, and what
they know of a weight (partial states, never weights) is merged.

`shards` says what of a list lies here and gathers; `losses`, `quantizers` and `dkm` merge the states of a family;
`whole` brings a layer to one rank. Merges are float64 sums in the order of the ranks, of numbers that every rank has:
the same bits on all of them.
"""

from . import dkm, losses, quantizers, sample
from .shards import is_sharded

__all__ = ["dkm", "is_sharded", "over"]

_OWN = {
    "sampled_std_fwd": sample.sampled_std,
    "weight_stats_fwd": losses.statistics,
    "terms_fwd": losses.terms_forward,
    "terms_bwd": losses.terms_backward,
    "assign_fwd": dkm.assign,
}


def over(name, kernel, row, call):
    """The kernel `name` of an op for lists that hold DTensors; `kernel` is that for lists without, `call` has those of
    all ops by name."""
    if name in _OWN:
        make = _OWN[name]
    else:
        family = quantizers if row.gives_tensors else losses
        make = family.backward if name.endswith("_bwd") else family.forward
    return make(kernel, row, call)
