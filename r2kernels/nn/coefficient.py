"""A regularization coefficient that is learned."""

import math

import torch
from torch import nn

from ..reference import checks


class LearnableCoefficient(nn.Module):
    """`coefficient(R)` = e^w R - strength w with w learned, to be added to a loss (Choi, El-Khamy, Lee 2020, for `msqe` and `partial_l2`).

    w moves to log(strength / R): the coefficient e^w grows as R shrinks. R: a tensor, 0-dim. strength: a number > 0. init: the first w.
    (US patent 11,270,187 B2 claims a growing quantization coefficient.) `w` is kept out of weight decay by `param_groups()`.
    """

    def __init__(self, strength, init=0.0):
        super().__init__()
        self.strength = checks.number("strength", strength, "a finite number > 0", lambda v: 0 < v < math.inf)
        self.omega = nn.Parameter(torch.tensor(checks.number("init", init)))

    def forward(self, R):
        omega = self.omega.to(R.device)
        return omega.exp() * R - self.strength * omega

    def param_groups(self, **options):
        return [{"params": [self.omega], "weight_decay": 0.0, **options}]

    def extra_repr(self):
        return f"strength={self.strength:g}"
