"""LSQ, EWGS, PACT and DoReFa: what a user calls to quantize weights and activations in training.

`x` is a floating-point tensor (float64, float32, bfloat16, float16; any shape and strides, channels_last kept), or a
sequence of them with one dtype and device, quantized by one fused pass over all; the result has its shape, strides
and dtype, a sequence gives a list. `bits` is an int in 1..8. Parameters are a number, a 0-dim tensor, for a sequence
also an (L,) tensor or a sequence of numbers; with `axis` also one number for each channel, (C,), or a sequence of
those. Only x and the parameters are kept for the backward pass, which reads x and its gradient once and reduces the
gradients of the parameters in a fixed order. Rounding is half to even; NaN in x stays NaN. The values of tensors are
never read: an invalid parameter gives NaN.

A DTensor gives one with its placements; the gradients of parameters, which every rank has whole, are summed over the
shards in one message (LSQ's scale counts all of them).

TypeError or ValueError names the argument, for a wrong type, dtype, device, shape or value. A second derivative
through a quantizer raises RuntimeError. An empty tensor of a sequence stays empty, and has no share in the gradients
of parameters.
"""

import torch
from torch import Tensor

from .. import ops
from ..reference import checks, parameters
from .differentiable import once, weights


class _Quantize(torch.autograd.Function):
    """Inputs: op, how many flat parameters follow, what the op takes behind them; the parameters; the tensors."""

    @staticmethod
    def forward(ctx, *inputs):
        op, count, options, *tensors = inputs
        given, xs = tensors[:count], tensors[count:]
        ys = op.fwd(xs, *given, *options)
        ctx.save_for_backward(*tensors)
        ctx.of_forward = op, count, options, ops.backend_of_forward()
        ctx.function = op.row.name
        return tuple(ys)

    @staticmethod
    @once
    def backward(ctx, tensors, *gs):
        op, count, options, backend = ctx.of_forward
        given, xs = tensors[:count], tensors[count:]
        result = ops.backward(backend, op.bwd, list(gs), xs, *given, *options)
        of_xs, *of_parameters = result if op.row.learned else (result,)
        gradients = [*of_parameters, *[None] * (count - op.row.learned), *of_xs]
        needed = ctx.needs_input_grad[3:]
        return *[None] * 3, *[g if need else None for g, need in zip(gradients, needed, strict=True)]


def _quantized(op, xs, single, given, options):
    ys = op.fwd(xs, *given, *options) if ops.is_recorded() else _Quantize.apply(op, len(given), options, *given, *xs)
    return ys[0] if single else list(ys)


def lsq(x, step, bits, *, signed=True, axis=None, levels="lsq") -> Tensor:
    """step round(clip(x / step, -QN, QP)) (Esser et al. 2020, "Learned Step Size Quantization", eqs. 1-3, 5).
    Differentiable in x and step.

    signed: QN = 2^(bits-1), QP = 2^(bits-1) - 1 (one bit: codes -1 and +1, +1 for 0); unsigned: QN = 0,
    QP = 2^bits - 1. `axis`: a step for each channel.
    levels: "ternary" has the codes -1, 0, 1 (QN = QP = 1; 1.58 bits, stored in the two that `bits` must be); "seq"
    half-integers without 0, round(v - 1/2) + 1/2 with QN = QP = 2^(bits-1) - 1/2 (for one bit LSQ's -1 and +1). Both
    are signed.
    dL/dx = g [-QN <= x / step <= QP]; dL/dstep = sum g {round(v) - v inside, -QN below, QP above} / sqrt(N QP),
    v = x / step, N the elements of a step.

    "ternary" and "seq" give the levels of stretched elastic quantization (Liu et al. 2025, "ParetoQ",
    arXiv:2502.02631) with alpha = 3/2 step and 2^(bits-1) step. There the gradient also passes half a step beyond the
    outermost levels (|x| <= 0.99 alpha), and is scaled by the levels of LSQ.
    """
    return _lsq(x, step, bits, signed, axis, levels, False)


def ewgs(x, lower, upper, bits, *, delta=0.0, signed=True) -> Tensor:
    """Uniform levels between lower and upper (Lee et al. 2021, "Network Quantization with Element-wise Gradient
    Scaling", eqs. 1-7). Differentiable in x, lower and upper.

    z = clip((x - lower) / (upper - lower), 0, 1), q = round(n z) / n, n = 2^bits - 1; gives 2 q - 1 in [-1, 1]
    (signed: weights), or q (activations). The gradient g of q reaches z as g + delta |g| (z - q); delta = 0 is
    straight-through. What is clipped gives no gradient.
    """
    return _ewgs(x, lower, upper, bits, delta, signed, False)


def pact(x, alpha, bits, *, plus=False) -> Tensor:
    """s round(clip(x, 0, alpha) / s), s = alpha / (2^bits - 1) (Choi et al. 2018, "PACT", eqs. 1-3). Differentiable
    in x and alpha.

    dL/dx = g [0 <= x < alpha]; dL/dalpha = sum g [x >= alpha]; `plus` adds sum g (round(z) - z) / (2^bits - 1) inside,
    z = x / s. Add weight decay on alpha.
    """
    return _pact(x, alpha, bits, plus, False)


def dorefa(w, bits, *, detach_max=False) -> Tensor:
    """2 round(n (t / (2 m) + 1/2)) / n - 1, t = tanh w, m = max|t|, n = 2^bits - 1 (Zhou et al. 2016, "DoReFa-Net",
    eqs. 9, 11). Differentiable in w.

    One bit: sign(w) mean|w| (+1 for 0), with the identity as gradient.
    dL/dw = g (1 - t^2) / m, and where |t| = m, split over ties, - sign(t) (1 - t^2) / m^2 sum g t, which
    `detach_max=True` drops, as many ports do. Weights that are all 0 have m = 1.
    """
    ws, single = weights("dorefa", w, name="w")
    checks.bit_width(bits)
    with torch.no_grad():
        scale = _mean_size(ws) if bits == 1 else ops.l_inf.fwd(ws, 1, "output")[1][:, 0]
    return _quantized(ops.dorefa, ws, single, [scale], (bits, bool(detach_max)))


def _mean_size(ws):
    """(mean |w|, 1) of each tensor: a margin of 0 for N weights."""
    zeros = parameters.parameter("M", 0.0, len(ws), False, 1, ws[0])
    numels = parameters.parameter("k", [max(w.numel(), 1) for w in ws], len(ws), False, 1, ws[0])
    loss, _ = ops.margin.fwd(ws, zeros, numels, 1, "output")
    return torch.stack([loss, torch.ones_like(loss)], 1)


def _lsq(x, step, bits, signed, axis, levels, sized):
    xs, single = weights("lsq", x, name="x")
    checks.bit_width(bits)
    checks.level_kind(levels, bits, signed)
    axis = checks.channel_axis(axis, xs, single)
    step = parameters.channels("step", step, xs, single, axis)
    return _quantized(ops.lsq, xs, single, [step], (bits, bool(signed), axis, levels, sized))


def _ewgs(x, lower, upper, bits, delta, signed, sized):
    xs, single = weights("ewgs", x, name="x")
    checks.bit_width(bits)
    bounds = parameters.bounds(lower, upper, delta, xs, single)
    return _quantized(ops.ewgs, xs, single, bounds, (bits, bool(signed), sized))


def _pact(x, alpha, bits, plus, sized):
    xs, single = weights("pact", x, name="x")
    checks.bit_width(bits)
    alpha = parameters.channels("alpha", alpha, xs, single)
    return _quantized(ops.pact, xs, single, [alpha], (bits, bool(plus), sized))


# as a `Quantizer` learns them: the sizes step, upper - lower, alpha and scale are used as |p| + contract.FLOOR


def sized_lsq(x, step, bits, *, signed=True, axis=None, levels="lsq"):
    return _lsq(x, step, bits, signed, axis, levels, True)


def sized_ewgs(x, lower, upper, bits, *, delta, signed=True):
    return _ewgs(x, lower, upper, bits, delta, signed, True)


def sized_pact(x, alpha, bits, *, plus=False):
    return _pact(x, alpha, bits, plus, True)


def rescaled(x, scale):
    """x (|scale| + contract.FLOOR)."""
    xs, single = weights("rescaled", x, name="x")
    return _quantized(ops.rescale, xs, single, [parameters.channels("scale", scale, xs, single)], (True,))
