"""Hypothesis' side of the tests: lists of tensors of any make-up."""

import math

import cases
import torch
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st


def examples(count):
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )


class Recipe:
    """One tensor: a shape and what is done to it."""

    def __init__(self, shape, view, order, seed):
        self.shape, self.view, self.order, self.seed = shape, view, order, seed

    def __repr__(self):
        return f"{self.view} of {self.shape} in order {self.order}, seed {self.seed}"

    def build(self, dtype, device, seed=0, times=1.0):
        g = torch.Generator().manual_seed(self.seed + seed)
        size = math.prod(self.shape)
        base = (torch.randn(4 * size + 1, generator=g, dtype=torch.float64) * cases.SCALE).to(device, dtype) * times
        if self.view == "offset":
            w = base[1 : size + 1].view(self.shape)
        elif self.view == "slice" and self.shape:
            w = base[: 2 * size].view(*self.shape[:-1], 2 * self.shape[-1])[..., ::2]
        elif self.view == "expand":
            w = base[:size].view(*self.shape, 1).expand(*self.shape, 2)
        elif self.view == "ties":
            w = base[:size].view(self.shape).div(cases.SCALE * times).round().mul(cases.SCALE * times)
        else:
            w = base[:size].view(self.shape)
        return w.permute([i for i in self.order if i < w.dim()])


recipes = st.builds(
    Recipe,
    st.lists(st.integers(1, 9), max_size=4).map(tuple),
    st.sampled_from(["plain", "offset", "slice", "expand", "ties"]),
    st.permutations(range(5)),
    st.integers(0, 999),
)
lists = st.lists(recipes, min_size=1, max_size=5)
rows = st.tuples(st.integers(1, 4), st.sampled_from(["output", "contiguous"]))
dtypes = st.sampled_from(cases.DTYPES)


def build(makeup, dtype, device, d):
    ws = [recipe.build(dtype, device) for recipe in makeup]
    assume(all(w.numel() >= d for w in ws))
    return ws
