"""The standard deviation of a sample of a weight: the unit of an exponent, where reading all of it would cost a pass.

A weight of fewer than 2 * NUMBERS numbers is taken whole. One of more has NUMBERS / RUN equal parts, and each gives RUN
neighbours, at a place in it that wanders by the golden ratio (at equal distances a matrix would give some of its
columns). Numbers are counted in the order of memory, or of `contiguous()` where memory has gaps.
"""

import torch

from .columns import accumulator

NUMBERS, RUN = 16384, 16


def dimensions(w):
    """The dimensions of w in the order in which its numbers are counted, the last one first."""
    order = sorted(range(w.dim()), key=lambda i: -w.stride(i))
    return order if w.permute(order).is_contiguous() else list(range(w.dim()))


def places(numel, device):
    """Which of so many numbers, at least 2 * NUMBERS, stand for all."""
    runs, part = NUMBERS // RUN, numel // NUMBERS
    i = torch.arange(runs, device=device)
    start = (i * part + ((i * 40503 & 0xFFFF) * part >> 16)) * RUN
    return (start[:, None] + torch.arange(RUN, device=device)).reshape(-1)


def sample(w):
    """The numbers that stand for w."""
    x = w.permute(dimensions(w)).reshape(-1)
    return x if w.numel() < 2 * NUMBERS else x[places(w.numel(), w.device)]


def sampled_std_fwd(weights):
    """(L,) unbiased standard deviations, 0 of one number or none; summed in float64, which no square of a float32
    leaves."""
    stds = []
    for w in weights:
        x = sample(w).double() if w.numel() else w.new_zeros(1, dtype=torch.float64)
        std = ((x - x.mean()).square().sum() / max(x.numel() - 1, 1)).sqrt()
        stds.append(torch.where(x.amin() == x.amax(), 0, std).to(accumulator(w.dtype)))
    return torch.stack(stds)
