"""Calls of the quantizers' ops, and how exact their gradients can be.

Natural scales: of dL/dx its RMS, plus one number's worth of the incoming gradient; of a parameter's gradient the
sum of its terms' sizes.
"""

import math
from typing import NamedTuple

import budget
import cases
import torch

import r2kernels as r2
from r2kernels import ops
from r2kernels.reference import quantizers as formulas
from r2kernels.reference.columns import accumulator
from r2kernels.reference.parameters import levels


class Call(NamedTuple):
    """One forward and backward: `flag` is signed, plus or detach_max."""

    op: str
    gs: list
    xs: list
    parameters: list
    bits: int
    flag: bool
    axis: int | None = None
    levels: str = "lsq"

    @property
    def dtype(self):
        return self.xs[0].dtype

    @property
    def arguments(self):
        return [*self.parameters, self.bits, self.flag, *([self.axis, self.levels] if self.op == "lsq" else [])]

    def to(self, dtype):
        wide = accumulator(dtype)
        return self._replace(
            gs=[g.to(dtype) for g in self.gs],
            xs=[x.to(dtype) for x in self.xs],
            parameters=[p.to(wide) for p in self.parameters],
        )

    def forward(self):
        return ops.call[self.op + "_fwd"](self.xs, *self.arguments)

    def backward(self):
        """(gradients of xs, gradients of parameters)"""
        result = ops.call[self.op + "_bwd"](self.gs, self.xs, *self.arguments)
        gradients, *of_parameters = result if isinstance(result, tuple) else (result,)
        return gradients, of_parameters


def call(op, xs, bits, flag, axis=None, seed=0, spread=1.0, kind="lsq"):
    """Parameters that fit numbers of standard deviation `spread`, different ones for each tensor or channel."""
    g, wide, device = torch.Generator().manual_seed(seed + 77), accumulator(xs[0].dtype), xs[0].device
    count = len(xs) if axis is None else sum(x.shape[axis] for x in xs)
    parameters = [
        (value * (0.7 + 0.6 * torch.rand(count, generator=g, dtype=torch.float64))).to(device, wide)
        for value in cases.BY_LABEL[op].natural(spread, bits, flag).values()
    ]
    if op == "dorefa":
        parameters = [dorefa_scale(xs, bits)]
    gs = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(device, x.dtype) for x in xs]
    return Call(op, gs, xs, parameters, bits, flag, axis, kind)


def dorefa_scale(xs, bits):
    rows = []
    for x in xs:
        a = x.to(accumulator(x.dtype)).abs()
        largest = a.amax()
        row = (a.mean(), torch.ones_like(largest)) if bits == 1 else (largest, (a == largest).sum().to(a.dtype))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def numbers(shape, dtype, device, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


AROUND_CHUNKS = [(), (1,), (2,), (7,), (15, 1), (33,), (4095,), (4096,), (4097,), (37, 311), (12289,), (3, 1, 5)]
VIEWED = [(16, 8, 5, 5), (31, 66), (64, 50), (64, 1), (5001,)]


def mixed(dtype, device, seed=0):
    """All forms and sizes around those of chunks and vectors, ties at the maximum among them."""
    xs = [numbers(shape, dtype, device, seed + i) for i, shape in enumerate(AROUND_CHUNKS + VIEWED)]
    xs[8] = xs[8].clamp(-1, 1)
    return [
        *xs[:12],
        xs[12].contiguous(memory_format=torch.channels_last),
        xs[13].t(),
        xs[14][:, ::2],
        xs[15].expand(64, 9),
        xs[16][1:],
    ]


def many_axes(dtype, device):
    shapes = [(37, 61), (4, 70, 5, 5), (2, 9, 7, 7), (1, 1), (3, 1000), (5000, 3), (1, 12, 40)]
    return [numbers(shape, dtype, device, i) for i, shape in enumerate(shapes)]


def channels_last(xs):
    formed = {4: lambda x: x.contiguous(memory_format=torch.channels_last), 2: lambda x: x.t().contiguous().t()}
    return [formed.get(x.dim(), lambda x: x)(x) for x in xs]


def expected(one):
    """(ys, gradients of xs, gradients of parameters) of the reference."""
    with r2.use_backend("reference"):
        return one.forward(), *one.backward()


def truth(one):
    """The reference in float64 on the same numbers, and the natural scales."""
    wide = one.to(torch.float64)
    _, exact, of_parameters = expected(wide)
    worth = [budget.rms(g) / x.numel() for g, x in zip(wide.gs, wide.xs, strict=True)]
    scales = torch.tensor([_sizes(wide, i, dx) for i, dx in enumerate(exact)], dtype=torch.float64).to(one.xs[0].device)
    of_weights = [budget.rms(dx) + w for dx, w in zip(exact, worth, strict=True)]
    return quantities(exact, of_parameters), quantities(of_weights, scales.t())


def _sizes(wide, i, dx):
    """The sum of the sizes of the terms of each parameter's gradient, in tensor i."""
    g, x = wide.gs[i], wide.xs[i]
    if wide.op == "lsq":
        step, (low, high) = wide.parameters[0][i], levels(wide.bits, wide.flag, wide.levels)
        v = x / step
        code = formulas.code(v, wide.bits, wide.flag, wide.levels)
        slope = torch.where(v < -low, low, torch.where(v > high, high, code - v))
        return [(g * slope).abs().sum() / math.sqrt(x.numel() * high)]
    if wide.op == "ewgs":
        return [dx.abs().sum()] * 2
    if wide.op == "pact":
        return [g[x >= wide.parameters[0][i]].abs().sum() + (g.abs().sum() / 2**wide.bits if wide.flag else 0)]
    return []


def gradients(one):
    return quantities(*one.backward())


def quantities(of_xs, of_parameters):
    return {"dW": list(of_xs), **{f"dparameter {i}": value for i, value in enumerate(of_parameters)}}
