"""What the ranks of torch.distributed share, each in one message."""

import torch
from torch import distributed

from ..lists import resident


def is_distributed():
    """Whether there are other ranks."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def broadcast(tensors):
    """Gives the tensors the values that they have on rank 0."""
    flat = torch.cat([t.reshape(-1).to(tensors[0].device, torch.float64) for t in tensors])
    distributed.broadcast(flat, 0)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.reshape(t.shape))


def first_started(inputs):
    """Gives inputs (of quantizers), which had not started on any rank before this forward, the state that they have on
    the first rank where they have started."""
    tensors = [list(q.state_dict().values()) for q in inputs]
    flat = torch.cat([t.reshape(-1).to(tensors[0][0].device, torch.float64) for some in tensors for t in some])
    ranks = [torch.empty_like(flat) for _ in range(distributed.get_world_size())]
    distributed.all_gather(ranks, flat)
    sizes = [sum(t.numel() for t in some) for some in tensors]
    for q, some, *states in zip(inputs, tensors, *[rank.split(sizes) for rank in ranks], strict=True):
        at = sum(t.numel() for t in some[: list(q.state_dict()).index("started")])
        state = next((state for state in states if state[at] > 0), states[0])
        for t, part in zip(some, state.split([t.numel() for t in some]), strict=True):
            t.data.copy_(part.reshape(t.shape))  # the backward of this forward is still to come


def average_gradients(parameters):
    """Gives the parameters the mean of the gradients of all ranks.

    One without a gradient counts as 0, and stays without where no rank has one.
    """
    device = parameters[0].device
    have = resident(tuple([float(p.grad is not None) for p in parameters]), torch.float64, device)
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*[g.reshape(-1).to(device, torch.float64) for g in own], have])
    distributed.all_reduce(flat)
    *found, counts = flat.split([*[p.numel() for p in parameters], len(parameters)])
    for p, g, count in zip(parameters, found, counts, strict=True):
        if p.grad is not None:
            p.grad.copy_(g.div_(distributed.get_world_size()).reshape(p.shape))
        elif count > 0:
            p.grad = g.div_(distributed.get_world_size()).reshape(p.shape).to(p.device, p.dtype)


def reduce(tensors, operation):
    """Gives the tensors, of one dtype, their "sum" or "max" over all ranks."""
    flat = torch.cat([t.reshape(-1).to(tensors[0].device) for t in tensors])
    distributed.all_reduce(flat, getattr(distributed.ReduceOp, operation.upper()))
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.reshape(t.shape))
