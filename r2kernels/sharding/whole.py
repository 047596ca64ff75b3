"""Weights brought together one at a time, each to one of the ranks that share it, for what needs all of it at once.

A rank holds at most one whole weight. The ranks take turns, so as many weights as ranks are worked on at a time.
"""

import itertools

import torch
from torch import distributed

from ..reference.columns import accumulator
from .shards import cut_by, gathered, groups_of, local, region


def on_owners(weights, shapes, work):
    """[work(i, whole weight i)], of these shapes and the accumulator's dtype, done on one rank for each weight
    and told to all; what is not cut is worked on by every rank for itself."""
    results, turns = [None] * len(weights), {}
    for i, w in enumerate(weights):
        groups = groups_of(w)
        if groups:
            turns.setdefault(groups, []).append(i)
        else:
            results[i] = work(i, local(w))
    for groups, some in turns.items():
        world = len(_holders(weights[some[0]]))
        for at in range(0, len(some), world):
            _round(weights, some[at : at + world], shapes, groups, work, results)
    return results


def _round(weights, some, shapes, groups, work, results):
    """Every weight of these goes to a rank of its own."""
    own, mine = None, distributed.get_rank()
    for turn, i in enumerate(some):
        holders = _holders(weights[i])
        owner = holders[turn][0]
        whole = _brought(weights[i], holders, owner)
        if owner == mine:
            own = i, whole
    done = {} if own is None else {own[0]: work(*own)}
    del own
    for i in some:
        mold = torch.zeros(shapes[i], dtype=torch.float64, device=local(weights[i]).device)
        told = done[i].double() if i in done else mold
        results[i] = gathered(told, groups).sum(0).to(accumulator(weights[i].dtype))


def _holders(w):
    """(rank, coordinate) of every rank with a shard of this copy of w."""
    mesh, here = w.device_mesh, w.device_mesh.get_coordinate()
    cut = cut_by(w)
    axes = [range(mesh.size(i)) if i in cut else [here[i]] for i in range(mesh.ndim)]
    return [(int(mesh.mesh[at]), at) for at in itertools.product(*axes)]


def _brought(w, holders, owner):
    """The whole of w on its owner, None elsewhere."""
    shard = local(w).contiguous()
    if distributed.get_rank() != owner:
        if shard.numel():
            distributed.send(shard, owner)
        return None
    whole = torch.empty(w.shape, dtype=w.dtype, device=shard.device)
    for rank, coordinate in holders:
        place = whole[region(w, coordinate)]
        if rank == owner:
            place.copy_(shard)
        elif place.numel():
            piece = torch.empty(place.shape, dtype=w.dtype, device=w.device)
            distributed.recv(piece, rank)
            place.copy_(piece)
    return whole
