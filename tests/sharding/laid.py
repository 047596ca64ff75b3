"""How tensors are laid out over ranks; and a counter of what ranks tell each other."""

import contextlib
import itertools

import torch
from torch import distributed
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

WHOLE = "whole"


def layouts(mesh):
    """(mesh, placements): one dimension of a mesh, and two as FSDP with TP, HSDP and others have them."""
    grid = distributed.init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("outer", "inner"))
    pairs = [(0, 1), (1, 0), (None, 0), (0, None), (0, 0)]
    return [
        *[(mesh, (p,)) for p in (Shard(0), Shard(1), Shard(-1), Replicate())],
        *[(grid, tuple([Replicate() if d is None else Shard(d) for d in pair])) for pair in pairs],
    ]


def dtensor(w, mesh, placements):
    """A DTensor of a tensor that all ranks have; one that lacks a dimension is not cut along it."""
    fits = [p if p.is_replicate() or -w.dim() <= p.dim < w.dim() else Replicate() for p in placements]
    return distribute_tensor(w.detach(), mesh, fits, src_data_rank=None)


def laid_as(whole, w):
    """A whole tensor as w is laid out."""
    return dtensor(whole, w.device_mesh, w.placements) if isinstance(w, DTensor) else whole


def local(t):
    return t.detach().to_local() if isinstance(t, DTensor) else t.detach()


class Laid:
    """Tensors in one layout after the other: of one list all in the same, of the next each in another, or whole."""

    def __init__(self, layouts, name="sharded"):
        self.layouts, self.name = layouts, name
        self.turn = itertools.count()
        self.current = None

    def __str__(self):
        return self.name

    @contextlib.contextmanager
    def chosen(self):
        turn = next(self.turn)
        options = [*self.layouts, WHOLE]
        self.current = [options[(turn // 2 + i * (turn % 2)) % len(options)] for i in range(len(options))]
        if turn % 2 == 0 and self.current[0] == WHOLE:
            self.current = self.layouts[:1]
        try:
            yield self
        finally:
            self.current = None

    def of(self, tensors):
        """As the list that is at hand has them; another with the same shapes is laid out in the same way."""
        if self.current is None:
            return tensors
        laid = itertools.cycle(self.current)
        return [w if at == WHOLE else dtensor(w, *at) for w, at in zip(tensors, laid, strict=False)]


def full(tensors):
    """The whole tensors, from one message: as `full_tensor()` of each, which takes several for each."""
    if not any(isinstance(t, DTensor) for t in tensors):
        return list(tensors)
    told = [None] * distributed.get_world_size()
    distributed.all_gather_object(told, [_piece(t) for t in tensors])
    wholes = [torch.full(t.shape, torch.nan, dtype=t.dtype) for t in tensors]
    for pieces in told:
        for whole, (offset, piece) in zip(wholes, pieces, strict=True):
            whole[tuple([slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True)])] = piece
    return wholes


def _piece(t):
    if not isinstance(t, DTensor):
        return (0,) * t.dim(), t.detach()
    _, offset = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
    return offset, t.detach().to_local().contiguous()


def same_on_all_ranks(*tensors):
    """Asserts that replicated results have the same bits everywhere."""
    flat = torch.cat([t.detach().reshape(-1).double() for t in tensors])
    assert not any(isinstance(t, DTensor) for t in tensors)
    told = [torch.empty_like(flat) for _ in range(distributed.get_world_size())]
    distributed.all_gather(told, flat)
    assert all(torch.equal(t.view(torch.int64), told[0].view(torch.int64)) for t in told)


def like(made, w):
    """Asserts that a result has the placements, mesh, shape and dtype of a weight."""
    assert type(made) is type(w.detach()), (type(made), type(w))
    assert made.shape == w.shape and made.dtype == w.dtype
    if isinstance(w, DTensor):
        assert made.placements == w.placements and made.device_mesh == w.device_mesh
        assert made.to_local().shape == w.to_local().shape


# what a rank sends, among the arguments of a collective
_SENT = {
    "all_gather": 1,
    "all_gather_into_tensor": 1,
    "all_gather_single": 1,
    "all_reduce": 0,
    "all_to_all": 1,
    "all_to_all_single": 1,
    "broadcast": 0,
    "gather": 0,
    "reduce": 0,
    "reduce_scatter": 1,
    "reduce_scatter_single": 1,
    "reduce_scatter_tensor": 1,
    "scatter": 1,
    "send": 0,
    "isend": 0,
}


class Messages:
    """Collectives that were called and bytes of their inputs, also of those that gather; within `counted`."""

    def __init__(self):
        self.collectives = self.bytes = self.gathered = 0

    @contextlib.contextmanager
    def counted(self):
        kept = {name: getattr(distributed, name) for name in _SENT if hasattr(distributed, name)}
        for name, function in kept.items():
            setattr(distributed, name, self._counting(function, _SENT[name], "gather" in name))
        try:
            yield self
        finally:
            for name, function in kept.items():
                setattr(distributed, name, function)

    def _counting(self, function, at, gathers):
        def call(*args, **kwargs):
            sent = args[at]
            self.collectives += 1
            size = sum(t.numel() * t.element_size() for t in (sent if isinstance(sent, list) else [sent]))
            self.bytes += size
            self.gathered += size * gathers
            return function(*args, **kwargs)

        return call
