"""What of a list of weights lies on this rank, and how the ranks that share a weight tell each other."""

import dataclasses
import functools
import math
from typing import NamedTuple

import torch
from torch import distributed

from .. import lists
from ..reference.checks import is_dtensor

_PLAIN = {torch.Tensor, torch.nn.Parameter}


def _all_gather(out, x, group):
    """Under the name that this torch does not call deprecated."""
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    gather(out, x, group=group)


def is_sharded(weights):
    """Whether DTensors are among the weights."""
    return not _PLAIN.issuperset(map(type, weights)) and any(map(is_dtensor, weights))


def local(w):
    """The shard of a DTensor that lies here; other tensors as they are."""
    if not is_dtensor(w):
        return w
    shard = w._local_tensor
    return shard if type(shard) is torch.Tensor else shard.wait()  # a collective that is still under way


def like(shard, w):
    """A tensor like w, of which this is the shard here."""
    if not is_dtensor(w):
        return shard
    spec = w._spec
    if shard.dtype != w.dtype:
        spec = dataclasses.replace(spec, tensor_meta=spec.tensor_meta._replace(dtype=shard.dtype))
    from torch.distributed.tensor import DTensor  # where w is one it has been imported

    return DTensor(shard, spec, requires_grad=False)


def whole(x):
    """All of a DTensor, on every rank; other tensors as they are."""
    return x.full_tensor() if is_dtensor(x) else x


class _Arrived(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.wait()

    @staticmethod
    def backward(ctx, g):
        return g


def arrived(x):
    """x, waited for where a collective of tensor parallelism is still under way."""
    return _Arrived.apply(x) if type(x).__name__ == "AsyncCollectiveTensor" else x


def beside(t, x):
    """A tensor that every rank has, so that x, which may be a DTensor, can be multiplied by it."""
    if not is_dtensor(x):
        return t
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(t, x.device_mesh, [Replicate()] * x.device_mesh.ndim, run_check=False)


def aligned(other, w):
    """The local shard of a tensor shaped like w, brought to the placements of w."""
    if not is_dtensor(other):
        return local(placed(other, w))
    if other.placements != w.placements:
        other = other.redistribute(placements=w.placements)
    return local(other)


def placed(full, w):
    """Of a tensor that is whole on this rank, the DTensor with the placements of w; as it is where w is none."""
    return like(full[region(w)], w) if is_dtensor(w) else full


def splits(w):
    """For each dimension of a DTensor the dimensions of its mesh that cut it, in the order in which they do.

    `_StridedShard` cuts what the dimensions behind it have cut already, as FSDP does after tensor parallelism.
    """
    cuts = [[] for _ in range(w.dim())]
    order = w._spec.shard_order
    if order is not None:  # else `_StridedShard` tells it
        for entry in order:
            cuts[entry.tensor_dim] = list(entry.mesh_dims)
        return cuts
    for i, placement in sorted(enumerate(w.placements), key=lambda at: type(at[1]).__name__ == "_StridedShard"):
        if hasattr(placement, "dim"):
            cuts[placement.dim % w.dim()].append(i)
    return cuts


def region(w, coordinate=None):
    """The slices of a DTensor that lie at this coordinate of its mesh, by default here; of other tensors all."""
    if not is_dtensor(w):
        return tuple([slice(0, size) for size in w.shape])
    mesh = w.device_mesh
    coordinate = mesh.get_coordinate() if coordinate is None else coordinate
    found = []
    for size, cuts in zip(w.shape, splits(w), strict=True):
        start, stop = 0, size
        for i in cuts:
            each = -(-(stop - start) // mesh.size(i))
            start = min(start + coordinate[i] * each, stop)
            stop = min(start + each, stop)
        found.append(slice(start, stop))
    return tuple(found)


def cut_by(w):
    """The dimensions of the mesh that cut a DTensor."""
    return tuple([i for i, placement in enumerate(w.placements) if not placement.is_replicate()])


def groups_of(w):
    """The process groups over which a weight is sharded, one for each dimension of the mesh that cuts it."""
    return tuple([w.device_mesh.get_group(i) for i in cut_by(w)]) if is_dtensor(w) else ()


def gathered(x, groups):
    """(ranks, ...): x of every rank that shares the weights, in the same order on all; one collective for each
    group."""
    x = x.unsqueeze(0)
    for group in groups:
        world = distributed.get_world_size(group)
        out = x.new_empty(world * x.shape[0], *x.shape[1:])
        _all_gather(out, x.contiguous(), group=group)
        x = out
    return x


class _Part(NamedTuple):
    """Weights of a list that are sharded over the same groups; `places` is None where these are all of them."""

    places: torch.Tensor | None
    groups: tuple

    def of(self, x):
        return x if self.places is None else x.index_select(0, self.places)


class Shards:
    """A list of weights of which DTensors are sharded. `call`: name of an op -> its kernel, for what a merge needs."""

    def __init__(self, weights, call=None):
        self.weights, self.call = weights, call
        self.local = [local(w) for w in weights]
        self.device = self.local[0].device
        found, by_groups = {}, {}
        for i, w in enumerate(weights):
            key = (id(w.device_mesh), cut_by(w)) if is_dtensor(w) else None
            if key not in found:
                found[key] = groups_of(w)
            by_groups.setdefault(found[key], []).append(i)
        self.parts = [
            _Part(None if len(by_groups) == 1 else self.constant(some, torch.int64), groups)
            for groups, some in by_groups.items()
        ]

    def constant(self, values, dtype=torch.float64):
        """Numbers that every call with weights of these sizes needs, on their device."""
        return lists.resident(tuple(values), dtype, self.device)

    def merged(self, states, fold):
        """fold(part, *tables) of all parts, as tensors (L, ...): `states` are (L, ...) tensors, and tables are those
        of all ranks in float64, (ranks, l, ...). One message for each part."""
        count = len(self.weights)
        flat = torch.cat([s.reshape(count, -1).double() for s in states], 1)
        sizes = [math.prod(s.shape[1:]) for s in states]
        results = []
        for part in self.parts:
            table = gathered(part.of(flat), part.groups)
            tables = [t.reshape(*t.shape[:2], *s.shape[1:]) for t, s in zip(table.split(sizes, 2), states, strict=True)]
            results.append(fold(part, *tables))
        return tuple([self._in_order(pieces) for pieces in zip(*results, strict=True)])

    def _in_order(self, pieces):
        """(L, ...) from what was made of each part."""
        if len(pieces) == 1:
            return pieces[0]
        order = torch.cat([part.places for part in self.parts]).argsort()
        return torch.cat(pieces).index_select(0, order)

    def summed(self, *states):
        """The sums of (L, ...) tensors over all shards, float64."""
        return self.merged(states, lambda part, *tables: tuple([t.sum(0) for t in tables]))

    def counted(self, counts):
        """The sums of (L, ...) integers over all shards: exact in any order, so the network may add them up."""
        pieces = []
        for part in self.parts:
            piece = part.of(counts).clone(memory_format=torch.contiguous_format)
            for group in part.groups:
                distributed.all_reduce(piece, group=group)
            pieces.append(piece)
        return self._in_order(pieces)

    def rows(self, d=1):
        """(L, 1) float64 rows of d that lie here, and in all."""
        return tuple([self.constant([w.numel() // d for w in ws])[:, None] for ws in (self.local, self.weights)])

    def like(self, shards):
        """Tensors like the weights, of these shards; None stays None."""
        return [None if s is None else like(s, w) for s, w in zip(shards, self.weights, strict=True)]

    def aligned(self, others):
        """The local shards of tensors shaped like the weights."""
        return [aligned(o, w) for o, w in zip(others, self.weights, strict=True)]


def mapped(function, w):
    """function(w), of numbers without gradient and without regard to others than those of one shard."""
    return like(function(local(w.detach())), w)


def with_zeros(others, weights, d=1, layout="output"):
    """`lists.with_zeros` for weights of which some may be DTensors."""
    if not is_sharded(weights):
        return lists.with_zeros(others, weights, d, layout)
    zeros = lists.with_zeros([None] * len(weights), [local(w) for w in weights], d, layout)
    return [like(z, w) if o is None else o for o, w, z in zip(others, weights, zeros, strict=True)]


def check(weights, names, d, layout):
    """ValueError where a weight cannot be read shard by shard."""
    for w, name in zip(weights, names, strict=True):
        if not is_dtensor(w):
            continue
        if any(placement.is_partial() for placement in w.placements):
            raise ValueError(
                f"{name} has placements {w.placements}; a Partial one is not a weight yet: redistribute it first"
            )
        if w.device_mesh.get_coordinate() is None:
            raise ValueError(f"{name} is a DTensor on {w.device_mesh}, to which this rank does not belong")
        if d > 1 and not _rows_are_whole(w.shape, w.device_mesh.shape, tuple(map(tuple, splits(w))), d, layout):
            raise ValueError(
                f"{name} of shape {tuple(w.shape)} has placements {w.placements} on a mesh of "
                f"{tuple(w.device_mesh.shape)}: with cluster_dim={d}, layout={layout!r} a row of {d} would lie on two "
                "shards; shard it where rows end, or along another dimension"
            )


@functools.lru_cache(maxsize=4096)
def _rows_are_whole(shape, mesh, cuts, d, layout):
    """Whether every row of d lies on one shard: rows run along one dimension whose pieces are multiples of d, or the
    shards are runs of memory, of which all but the last are."""
    axis = 0 if layout == "output" and len(shape) > 1 else len(shape) - 1
    if shape[axis] % d == 0:
        return all(n % d == 0 for n in _pieces(shape[axis], cuts[axis], mesh))
    if layout == "output" and len(shape) > 1:
        return not any(cuts)
    inner = math.prod(shape[1:])
    pieces = [n * inner for n in _pieces(shape[0], cuts[0], mesh) if n]
    return not any(cuts[1:]) and all(n % d == 0 for n in pieces[:-1]) and pieces[-1] >= d


def _pieces(size, cuts, mesh):
    """The sizes of the pieces that a dimension is cut into, in order."""
    pieces = [size]
    for i in cuts:
        chunks = [(n, -(-n // mesh[i])) for n in pieces]
        pieces = [max(min(each, n - k * each), 0) for n, each in chunks for k in range(mesh[i])]
    return pieces
