"""The parameters of one quantizer of a weight or of a layer's input, learned (LSQ, EWGS, DoReFa, PACT) or frozen.

A weight's has `key()`, what layers of one batch share; `soft(some, ws)`, their quantized weights; `start(w)`, values
from the data; and `coded(w)`, as it is stored. An input's has `start(x)` and is called with x. Sizes that must stay
positive are |p| + `FLOOR`, so no step of the optimizer takes them through 0.
"""

import math

import torch
from torch import nn

from ..files.uniform import Grid, Uniform, along
from ..functional import quantizers
from ..reference import parameters
from ..reference.columns import accumulator
from .clipping import nearest

FLOOR = 1e-8
HALF_NORMAL = math.sqrt(1 - 2 / math.pi)  # std of |x| for a standard normal x
DELTA = 1e-3  # of EWGS until `estimate_delta` has set it


def positive(p):
    return p.abs() + FLOOR


def bounds(lower, upper):
    """lower, and an upper that stays above it."""
    return lower, lower + positive(upper - lower)


def _mean_size(w, axis=None):
    size = w.detach().to(accumulator(w.dtype)).abs()
    return size.mean() if axis is None else size.mean([i for i in range(w.dim()) if i != axis % w.dim()])


def _parameter(w, shape=()):
    return nn.Parameter(torch.ones(shape, dtype=accumulator(w.dtype), device=w.device))


def _wide(w):
    return w.detach().to(accumulator(w.dtype))


class LSQWeight(nn.Module):
    """A learned step of the tensor, or of each channel along an axis."""

    def __init__(self, w, options):
        super().__init__()
        self.bits, self.axis = options.weight_bits, options.axis
        self.step = _parameter(w, () if self.axis is None else (w.shape[self.axis],))

    def key(self):
        return self.bits, self.axis

    @staticmethod
    def soft(some, ws):
        bits, axis = some[0].key()
        if axis is None:
            return quantizers.lsq(ws, positive(torch.stack([q.step for q in some])), bits)
        steps = positive(torch.cat([q.step for q in some])).split([len(q.step) for q in some])
        return quantizers.lsq(ws, list(steps), bits, axis=axis)

    def start(self, w):
        self.step.copy_(2 * _mean_size(w, self.axis) / math.sqrt(parameters.levels(self.bits, True)[1]))

    def coded(self, w):
        return nearest(w, grid(self.bits, self.axis, w), positive(self.step), None)


def grid(bits, axis, w):
    return Grid(bits, None if axis is None else axis % w.dim())


class _Scaled(nn.Module):
    """Weights in [-1, 1] times a learned |scale|, one for each tensor."""

    def __init__(self, w, options):
        super().__init__()
        self.bits = options.weight_bits
        self.scale = _parameter(w)

    @classmethod
    def soft(cls, some, ws):
        scales = positive(torch.stack([q.scale for q in some])).unbind()
        return [y * scale for y, scale in zip(cls.plain(some, ws), scales, strict=True)]

    def start(self, w):
        self.scale.fill_(1)
        size = _mean_size(self.plain([self], [w])[0])
        self.scale.copy_(torch.where(size > 0, _mean_size(w) / size, 1))

    def coded(self, w):
        n = 2**self.bits - 1
        codes = (self.plain([self], [_wide(w)])[0] + 1) * (n / 2)
        return Uniform.of(codes.round(), w.dtype, Grid(self.bits), 2 / n * positive(self.scale), n)


class EWGSWeight(_Scaled):
    """Learned bounds, one pair for each tensor; `delta` scales the gradients of the elements."""

    def __init__(self, w, options):
        super().__init__(w, options)
        self.lower, self.upper = _parameter(w), _parameter(w)
        self.register_buffer("delta", _delta(w, options))

    def key(self):
        return (self.bits,)

    @staticmethod
    def plain(some, ws):
        lower, upper = bounds(torch.stack([q.lower for q in some]), torch.stack([q.upper for q in some]))
        return quantizers.ewgs(ws, lower, upper, some[0].bits, delta=torch.stack([q.delta for q in some]))

    def span(self):
        """What 1 of [0, 1] is on the scale of the weights that the model sees."""
        return 2 * positive(self.scale)

    def start(self, w):
        std = _wide(w).std(correction=0)
        self.lower.copy_(-3 * std)
        self.upper.copy_(3 * std)
        super().start(w)


def _delta(w, options):
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
        return Uniform.of((_wide(w) >= 0).to(mean.dtype), w.dtype, Grid(1), 2 * mean * positive(self.scale), 1)


class FrozenWeight(nn.Module):
    """A step, and with `symmetric=False` an integer zero point, of the tensor or of each channel."""

    def __init__(self, w, bits, axis, step, zero):
        super().__init__()
        self.bits, self.axis = bits, axis
        self.register_buffer("step", step)
        self.register_buffer("zero", zero)

    def key(self):
        return self.bits, self.axis, self.zero is None

    @staticmethod
    def soft(some, ws):
        bits, axis, symmetric = some[0].key()
        steps = torch.stack([q.step for q in some]) if axis is None else [q.step for q in some]
        if symmetric:
            return quantizers.lsq(ws, steps, bits, axis=axis)
        shifts = [
            q.step * q.zero if axis is None else along(q.step * q.zero, axis % w.dim(), w.dim())
            for q, w in zip(some, ws, strict=True)
        ]
        wide = [w.to(shift.dtype) + shift for w, shift in zip(ws, shifts, strict=True)]
        ys = quantizers.lsq(wide, steps, bits, signed=False, axis=axis)
        return [(y - shift).to(w.dtype) for y, shift, w in zip(ys, shifts, ws, strict=True)]

    def start(self, w):
        pass

    def coded(self, w):
        return nearest(w, grid(self.bits, self.axis, w), self.step, self.zero)


class Input(nn.Module):
    """What inputs share: whether they have started, and whether the first batch had negative values."""

    def __init__(self, w, options):
        super().__init__()
        self.bits = options.activation_bits
        for name in ("started", "signed"):
            self.register_buffer(name, torch.zeros((), dtype=torch.bool, device=w.device))
        self.read()

    def read(self):
        """The flags, where Python can branch on them."""
        self.is_started, self.is_signed = bool(self.started), bool(self.signed)

    def start(self, x):
        x = _wide(x)
        self.signed.copy_((x < 0).any())
        self.started.fill_(True)
        self.read()
        self.from_batch(x)

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.read()


class LSQInput(Input):
    """A learned step."""

    def __init__(self, w, options):
        super().__init__(w, options)
        self.step = _parameter(w)

    def from_batch(self, x):
        self.step.copy_(2 * x.abs().mean() / math.sqrt(parameters.levels(self.bits, self.is_signed)[1]))

    def forward(self, x):
        return quantizers.lsq(x, positive(self.step), self.bits, signed=self.is_signed)


class EWGSInput(Input):
    """Learned bounds; the output comes back on the scale of the input."""

    def __init__(self, w, options):
        super().__init__(w, options)
        self.lower, self.upper = _parameter(w), _parameter(w)
        self.register_buffer("delta", _delta(w, options))

    def from_batch(self, x):
        self.lower.copy_(x.min())
        self.upper.copy_(3 * x.std(correction=0) / HALF_NORMAL)

    def span(self):
        return positive(self.upper - self.lower)

    def forward(self, x):
        lower, upper = bounds(self.lower, self.upper)
        q = quantizers.ewgs(x, lower, upper, self.bits, delta=self.delta, signed=False)
        return lower.detach() + (upper - lower).detach() * q


class PACTInput(Input):
    """Inputs with negative values: signed LSQ with the step alpha / QP, because PACT has no negative levels."""

    def __init__(self, w, options):
        super().__init__(w, options)
        self.alpha, self.plus = _parameter(w), options.plus

    def from_batch(self, x):
        spread = 3 * x.std(correction=0) / (1 if self.is_signed else HALF_NORMAL)
        self.alpha.copy_(torch.minimum(x.abs().max(), spread))

    def forward(self, x):
        alpha = positive(self.alpha)
        if self.is_signed:
            return quantizers.lsq(x, alpha / parameters.levels(self.bits, True)[1], self.bits)
        return quantizers.pact(x, alpha, self.bits, plus=self.plus)


class FrozenInput(Input):
    """A step and, unless it is None, an integer zero point, found by `calibrate`."""

    def __init__(self, w, options, step, zero, signed):
        super().__init__(w, options)
        self.register_buffer("step", step)
        self.register_buffer("zero", zero)
        self.signed.fill_(signed)
        self.started.fill_(True)
        self.read()

    def forward(self, x):
        if self.zero is None:
            return quantizers.lsq(x, self.step, self.bits, signed=self.is_signed)
        shift = self.step * self.zero
        return (quantizers.lsq(x.to(shift.dtype) + shift, self.step, self.bits, signed=False) - shift).to(x.dtype)


METHODS = {"lsq": (LSQWeight, LSQInput), "ewgs": (EWGSWeight, EWGSInput), "pact": (DoReFaWeight, PACTInput)}
