"""What the ranks of torch.distributed share, each in one message in float64."""

import torch
from torch import distributed


def is_distributed():
    """Whether there are other ranks."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def broadcast(tensors):
    """Gives the tensors the values that they have on rank 0."""
    flat = torch.cat([t.reshape(-1).to(tensors[0].device, torch.float64) for t in tensors])
    distributed.broadcast(flat, 0)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.reshape(t.shape))


def average_gradients(parameters):
    """Gives the parameters the mean of the gradients of all ranks.

    One without a gradient counts as 0, and stays without.
    """
    flat = torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).to(parameters[0].device, torch.float64)
            for p in parameters
        ]
    )
    distributed.all_reduce(flat)
    parts = flat.div_(distributed.get_world_size()).split([p.numel() for p in parameters])
    for p, g in zip(parameters, parts, strict=True):
        if p.grad is not None:
            p.grad.copy_(g.reshape(p.shape))
