"""A regularization coefficient that is learned."""

import math

import torch
from torch import nn

from ..reference import checks

MOST = 60.0  # e^60 R stays finite in float32, also where R = 0 lets w grow in every step


class LearnableCoefficient(nn.Module):
    """`coefficient(R)` = e^w R - strength w with w learned, to be added to a loss.

    From Choi, El-Khamy, Lee 2020, for `msqe` and `partial_l2`. w (`omega`) moves to log(strength / R): the coefficient
    e^w grows as R shrinks, to at most e^60. R: a tensor, 0-dim. strength: a number > 0. init: the first w.
    `param_groups()` keeps w out of weight decay. (US patent 11,270,187 B2 claims a growing quantization coefficient.)
    """

    def __init__(self, strength, init=0.0):
        super().__init__()
        self.strength = checks.number("strength", strength, "a finite number > 0", lambda v: 0 < v < math.inf)
        init, device = checks.number("init", init), torch.get_default_device()  # as of any module without weights
        self.omega = nn.Parameter(torch.tensor(init, dtype=torch.float32, device=device))

    def forward(self, R):
        omega = self.omega.to(R.device)
        omega = omega - (omega - MOST).relu().detach()
        return omega.exp() * R - self.strength * omega

    def param_groups(self, **options):
        """w as a list of one parameter group for an optimizer, `weight_decay=0` unless `options` say otherwise."""
        return [{"params": [self.omega], "weight_decay": 0.0, **options}]

    def extra_repr(self):
        return f"strength={self.strength:g}"
