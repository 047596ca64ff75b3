"""What the ranks of torch.distributed share, each in one message for every process group.

`groups` are process groups of which the ranks are the product (None: the group of all), as those of the dimensions of a
mesh.
"""

import math

import torch
from torch import distributed

from ..lists import resident


def is_distributed():
    """Whether there are other ranks."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def broadcast(tensors, groups=(None,)):
    """Gives the tensors the values that they have on the first rank."""
    flat = torch.cat([t.reshape(-1).to(tensors[0].device, torch.float64) for t in tensors])
    for group in groups:
        distributed.broadcast(flat, group=group, group_src=0)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.reshape(t.shape))


def first_started(inputs, groups=(None,)):
    """Gives inputs (of quantizers), which had not started on any rank before this forward, the state that they have on
    the first rank where they have started."""
    tensors = [list(q.state_dict().values()) for q in inputs]
    flat = torch.cat([t.reshape(-1).to(tensors[0][0].device, torch.float64) for some in tensors for t in some])
    sizes = [sum(t.numel() for t in some) for some in tensors]
    before = [list(q.state_dict()).index("started") for q in inputs]
    at = [sum(t.numel() for t in some[:n]) for n, some in zip(before, tensors, strict=True)]
    for group in groups:
        ranks = [torch.empty_like(flat) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(ranks, flat, group=group)
        chosen = [
            next((state for state in states if state[i] > 0), states[0])
            for i, *states in zip(at, *[rank.split(sizes) for rank in ranks], strict=True)
        ]
        flat = torch.cat(chosen)
    for some, state in zip(tensors, flat.split(sizes), strict=True):
        for t, part in zip(some, state.split([t.numel() for t in some]), strict=True):
            t.data.copy_(part.reshape(t.shape))  # the backward of this forward is still to come


def average_gradients(parameters, groups=(None,)):
    """Gives the parameters the mean of the gradients of all ranks.

    One without a gradient counts as 0, and stays without where no rank has one.
    """
    device = parameters[0].device
    have = resident(tuple([float(p.grad is not None) for p in parameters]), torch.float64, device)
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*[g.reshape(-1).to(device, torch.float64) for g in own], have])
    _all_reduce(flat, "sum", groups)
    world = math.prod(distributed.get_world_size(group) for group in groups)
    *found, counts = flat.split([*[p.numel() for p in parameters], len(parameters)])
    for p, g, count in zip(parameters, found, counts, strict=True):
        if p.grad is not None:
            p.grad.copy_(g.div_(world).reshape(p.shape))
        elif count > 0:
            p.grad = g.div_(world).reshape(p.shape).to(p.device, p.dtype)


def reduce(tensors, operation, groups=(None,)):
    """Gives the tensors, of one dtype, their "sum" or "max" over all ranks."""
    flat = torch.cat([t.reshape(-1).to(tensors[0].device) for t in tensors])
    _all_reduce(flat, operation, groups)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.reshape(t.shape))


def _all_reduce(flat, operation, groups):
    for group in groups:
        distributed.all_reduce(flat, getattr(distributed.ReduceOp, operation.upper()), group=group)
