"""The parameters of one quantizer of a weight, learned (LSQ, EWGS, DoReFa) or frozen.

It has `key()`, what layers of one batch share; `soft(some, ws)`, their quantized weights; `start(w)`, values from the
weight; and `coded(w)`, as it is stored. Sizes that must stay positive are |p| + `FLOOR`, so no step of the optimizer
takes them through 0.
"""

import math

import torch
from torch import nn

from ..files.uniform import Grid, Uniform
from ..functional import quantizers
from ..reference import parameters
from ..reference.columns import accumulator
from ..reference.quantizers import FLOOR
from ..sharding.shards import beside
from .clipping import nearest

DELTA = 1e-3  # of EWGS until `estimate_delta` has set it


def positive(p):
    return p.abs() + FLOOR


def bounds(lower, upper):
    """lower, and an upper that stays above it."""
    return lower, lower + positive(upper - lower)


def _mean_size(w):
    return wide(w).abs().mean()


def _or_usual(size, w, part=1.0):
    """A size of a weight that starts a range; for zeros that of torch's usual start, which is uniform up to
    1 / sqrt(fan-in): `part` of that, mean 1/2, std 1 / sqrt(3)."""
    return torch.where(size > 0, size, part / math.sqrt(w.numel() // len(w)))


def learned(w, shape=()):
    return nn.Parameter(torch.ones(shape, dtype=accumulator(w.dtype), device=w.device))


def wide(w):
    return w.detach().to(accumulator(w.dtype))


class LSQWeight(nn.Module):
    """A learned step of the tensor, or of each channel along an axis, or of each group of a channel's numbers."""

    is_hard = True  # what `soft` gives is what `coded` stores, bit for bit

    def __init__(self, w, options):
        super().__init__()
        self.bits, self.axis = options.weight_bits, options.axis
        self.group_size, self.levels = options.group_size, options.levels
        self.step = learned(w, () if self.axis is None else (grid(self, w).channels(w.shape),))

    def key(self):
        return self.bits, self.axis, self.group_size, self.levels

    @staticmethod
    def soft(some, ws):
        steps = [q.step for q in some]
        return _lsq(quantizers.sized_lsq, some, ws, torch.stack(steps) if some[0].axis is None else steps)

    def start(self, w):
        size = _or_usual(grid(self, w).rows(wide(w).abs()).mean(1).reshape(self.step.shape), w, 0.5)
        self.step.copy_(2 * size / math.sqrt(parameters.levels(self.bits, True, self.levels)[1]))

    def coded(self, w):
        return nearest(w, grid(self, w), positive(self.step), None, self.levels)


def grid(q, w):
    """The form in which w, whose quantizer is q, is stored."""
    return Grid(q.bits, None if q.axis is None else q.axis % w.dim(), q.group_size)


def _lsq(lsq, some, ws, steps, signed=True):
    """lsq of weights whose quantizers share their options. Groups are the rows of a view of a contiguous weight whose
    channels lie along its first axis, else of a copy."""
    q, options = some[0], {"signed": signed, "levels": some[0].levels}
    if q.group_size is None:
        return lsq(ws, steps, q.bits, axis=q.axis, **options)
    grids = [grid(q, w) for w in ws]
    ys = lsq([g.rows(w) for g, w in zip(grids, ws, strict=True)], steps, q.bits, axis=0, **options)
    return [g.from_rows(y, w.shape) for g, y, w in zip(grids, ys, ws, strict=True)]


class _Scaled(nn.Module):
    """Weights in [-1, 1] times a learned |scale|, one for each tensor."""

    is_hard = False

    def __init__(self, w, options):
        super().__init__()
        self.bits = options.weight_bits
        self.scale = learned(w)

    @classmethod
    def soft(cls, some, ws):
        return quantizers.rescaled(cls.plain(some, ws), torch.stack([q.scale for q in some]))

    def start(self, w):
        self.scale.fill_(1)
        size = _mean_size(self.plain([self], [w])[0])
        self.scale.copy_(torch.where(size > 0, _or_usual(_mean_size(w), w, 0.5) / size, 1))

    def coded(self, w):
        n = 2**self.bits - 1
        codes = (self.plain([self], [wide(w)])[0] + 1) * (n / 2)
        return Uniform.of(codes.round(), w.dtype, Grid(self.bits), 2 / n * positive(self.scale), n)


class EWGSWeight(_Scaled):
    """Learned bounds, one pair for each tensor; `delta` scales the gradients of the elements."""

    def __init__(self, w, options):
        super().__init__(w, options)
        self.lower, self.upper = learned(w), learned(w)
        self.register_buffer("delta", initial_delta(w, options))

    def key(self):
        return (self.bits,)

    @staticmethod
    def plain(some, ws):
        lower, upper, delta = [torch.stack([getattr(q, name) for q in some]) for name in ("lower", "upper", "delta")]
        return quantizers.sized_ewgs(ws, lower, upper, some[0].bits, delta=delta)

    def span(self):
        """What 1 of [0, 1] is on the scale of the weights that the model sees."""
        return 2 * positive(self.scale)

    def start(self, w):
        std = _or_usual(wide(w).std(correction=0), w, 1 / math.sqrt(3))
        self.lower.copy_(-3 * std)
        self.upper.copy_(3 * std)
        super().start(w)


def initial_delta(w, options):
    delta = DELTA if options.delta == "hessian" else options.delta
    return torch.full((), delta, dtype=accumulator(w.dtype), device=w.device)


class DoReFaWeight(_Scaled):
    """tanh(W) / max|tanh(W)|, for 1 bit mean|W| sign(W); nothing is learned but the scale."""

    def __init__(self, w, options):
        super().__init__(w, options)
        self.detach_max = options.detach_max

    def key(self):
        return self.bits, self.detach_max

    @staticmethod
    def plain(some, ws):
        bits, detach_max = some[0].key()
        return quantizers.dorefa(ws, bits, detach_max=detach_max)

    def coded(self, w):
        if self.bits > 1:
            return super().coded(w)
        mean = _mean_size(w)
        return Uniform.of((wide(w) >= 0).to(mean.dtype), w.dtype, Grid(1), 2 * mean * positive(self.scale), 1)


class FrozenWeight(nn.Module):
    """A step, and with `symmetric=False` an integer zero point, of the tensor or of each channel or group."""

    def __init__(self, w, bits, axis, step, zero, group_size=None, levels="lsq"):
        super().__init__()
        self.bits, self.axis, self.group_size, self.levels = bits, axis, group_size, levels
        # what `Quantizer.from_state` makes it of again; no axis is -1, no groups are 0
        form = [bits, -1 if axis is None else axis, group_size or 0]
        self.register_buffer("form", torch.tensor(form, device=w.device))
        self.register_buffer("step", step)
        self.register_buffer("zero", zero)

    @property
    def is_hard(self):
        return self.zero is None

    def key(self):
        return self.bits, self.axis, self.group_size, self.levels, self.zero is None

    @staticmethod
    def soft(some, ws):
        steps = [q.step for q in some]
        steps = torch.stack(steps) if some[0].axis is None else steps
        if some[0].zero is None:
            return _lsq(quantizers.lsq, some, ws, steps)
        shifts = [beside(grid(q, w).over(q.step * q.zero, w.shape), w) for q, w in zip(some, ws, strict=True)]
        shifted = [w.to(shift.dtype) + shift for w, shift in zip(ws, shifts, strict=True)]
        ys = _lsq(quantizers.lsq, some, shifted, steps, signed=False)
        return [(y - shift).to(w.dtype) for y, shift, w in zip(ys, shifts, ws, strict=True)]

    def start(self, w):
        refuse_start()

    def coded(self, w):
        return nearest(w, grid(self, w), self.step, self.zero, self.levels)

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        other_form(self, state, prefix, errors)
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)


def refuse_start():
    raise RuntimeError("ranges that `calibrate` found do not start again; find others by calibrate(..., replace=True)")


def other_form(frozen, state, prefix, errors):
    """Adds an error where a state is of other bits, axis or groups than what would take it."""
    given, own = state.get(f"{prefix}form"), frozen.form.tolist()
    if given is not None and given.tolist() != own:
        errors.append(f"{prefix}form (bits, axis, group_size) is {given.tolist()} in the state and {own} here.")
