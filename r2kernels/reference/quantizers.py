"""LSQ, EWGS, PACT and DoReFa: `<op>_fwd` and `<op>_bwd` as every backend has them, and the public functions.
Formulas: methods of the papers (Esser et al. 2020, "Learned Step Size Quantization"; Lee et al. 2021, "Network
Quantization with Element-wise Gradient Scaling"; Choi et al. 2018, "PACT"; Zhou et al. 2016, "DoReFa-Net"), as
`r2kernels.quantizers` tells them.

`<op>_fwd(xs, *parameters, *options) -> ys` and `<op>_bwd(gs, xs, *parameters, *options) -> (gradients of xs, gradient
of each differentiable parameter)`. Parameters are flat tensors of the accumulator's dtype: one number for each
tensor, or with `axis` for each channel of each tensor, one tensor's after the other's. Everything is computed in the
accumulator's dtype with true divisions and rounds half to even. `lsq_fwd`, `ewgs_fwd`, `pact_fwd` and `rescale_fwd`,
which multiplies, are the same bits on every backend. A comparison decides what is clipped, so NaN takes the way of what
is not. No branch depends on a value.
"""

import math

import torch

from . import checks, parameters
from .columns import accumulator

FLOOR = 1e-8  # below the sizes that a `Quantizer` learns


def _parameters(flat, xs, axis=None):
    """For each tensor its numbers of a flat parameter, to be broadcast over it."""
    if axis is None:
        return flat.unbind(0)
    parts = flat.split([x.shape[axis] for x in xs])
    return [
        part.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])
        for part, x in zip(parts, xs, strict=True)
    ]


def _wide(t):
    return t.to(accumulator(t.dtype))


def _over(x, n):
    """x / n, rounded once: on a GPU torch multiplies by the rounded 1 / n of a Python number."""
    return x / x.new_full((), n)


def _size(p, sized=False):
    return p.abs() + FLOOR if sized else torch.where(p > 0, p, torch.nan)


def _of_size(g, p, sized):
    """The gradient of p, from that of its `_size`."""
    return g * p.sgn() if sized else g


def _sum(x, axis=None):
    """Over everything, or over all but the axis: (1,) or (C,)."""
    if axis is None:
        return x.sum().reshape(1)
    return x.movedim(axis, 0).reshape(x.shape[axis], -1).sum(1) if x.numel() else x.new_zeros(x.shape[axis])


def _channel(x, axis):
    """How many numbers share a step; 1 where there are none."""
    if x.numel() == 0:
        return 1
    return x.numel() if axis is None else x.numel() // x.shape[axis]


def _sign(v):
    """+1 for 0, NaN for NaN."""
    return torch.where(v < 0, -1, torch.where(v >= 0, 1, v))


def code(v, bits, signed, levels="lsq"):
    """LSQ's code, as a floating-point number, of v = x / step."""
    low, high = parameters.levels(bits, signed, levels)
    if bits == 1 and signed:
        return _sign(v)
    clipped, shift = v.clamp(-low, high), high % 1
    return (clipped - shift).round() + shift if shift else clipped.round()


def lsq_fwd(xs, step, bits, signed, axis, levels, sized=False):
    return [
        (s * code(_wide(x) / s, bits, signed, levels)).to(x.dtype)
        for x, s in zip(xs, _parameters(_size(step, sized), xs, axis), strict=True)
    ]


def lsq_bwd(gs, xs, step, bits, signed, axis, levels, sized=False):
    low, high = parameters.levels(bits, signed, levels)
    gradients, g_step = [], []
    for g, x, s in zip(gs, xs, _parameters(_size(step, sized), xs, axis), strict=True):
        v, g = _wide(x) / s, _wide(g)
        below, above = v < -low, v > high
        slope = torch.where(below, -low, torch.where(above, high, code(v, bits, signed, levels) - v))
        channel = _channel(x, axis)
        gradients.append(torch.where(below | above, 0, g).to(x.dtype))
        g_step.append(_sum(g * slope, axis) / math.sqrt(channel * high))
    return gradients, _of_size(torch.cat(g_step), step, sized)


def _ewgs(x, lower, upper, sized=False):
    """(v, v clipped to [0, 1], upper - lower)"""
    span = _size((lower + _size(upper - lower, sized) if sized else upper) - lower)
    v = (_wide(x) - lower) / span
    return v, v.clamp(0, 1), span


def ewgs_fwd(xs, lower, upper, delta, bits, signed, sized=False):
    n, ys = 2**bits - 1, []
    for x, low, high in zip(xs, lower, upper, strict=True):
        c = (n * _ewgs(x, low, high, sized)[1]).round()
        ys.append(_over(2 * c - n if signed else c, n).to(x.dtype))
    return ys


def ewgs_bwd(gs, xs, lower, upper, delta, bits, signed, sized=False):
    n, gradients, g_lower, g_upper = 2**bits - 1, [], [], []
    for g, x, low, high, d in zip(gs, xs, lower, upper, delta, strict=True):
        v, clipped, span = _ewgs(x, low, high, sized)
        g = 2 * _wide(g) if signed else _wide(g)
        g = torch.where((v < 0) | (v > 1), 0, g + d * g.abs() * (clipped - (n * clipped).round() / n))
        gradients.append((g / span).to(x.dtype))
        g_lower.append((g * (clipped - 1)).sum() / span)
        g_upper.append(-(g * clipped).sum() / span)
    g_lower, g_upper = torch.stack(g_lower), torch.stack(g_upper)
    if not sized:
        return gradients, g_lower, g_upper
    of_upper = _of_size(g_upper, upper - lower, sized)
    return gradients, g_lower + (g_upper - of_upper), of_upper


def pact_fwd(xs, alpha, bits, plus, sized=False):
    n, ys = 2**bits - 1, []
    for x, a in zip(xs, _size(alpha, sized), strict=True):
        s, x_ = _over(a, n), _wide(x)
        ys.append((s * (torch.where(x_ >= a, a, torch.where(x_ < 0, 0, x_)) / s).round()).to(x.dtype))
    return ys


def pact_bwd(gs, xs, alpha, bits, plus, sized=False):
    n, gradients, g_alpha = 2**bits - 1, [], []
    for g, x, a in zip(gs, xs, _size(alpha, sized), strict=True):
        x_, g = _wide(x), _wide(g)
        z, above, below = x_ / _over(a, n), x_ >= a, x_ < 0
        gradients.append(torch.where(above | below, 0, g).to(x.dtype))
        inside = (z.round() - z) / n if plus else torch.zeros_like(z)
        g_alpha.append((g * torch.where(above, 1, torch.where(below, 0, inside))).sum())
    return gradients, _of_size(torch.stack(g_alpha), alpha, sized)


def rescale_fwd(xs, scale, sized=False):
    return [(_wide(x) * s).to(x.dtype) for x, s in zip(xs, _size(scale, sized), strict=True)]


def rescale_bwd(gs, xs, scale, sized=False):
    gradients, g_scale = [], []
    for g, x, s in zip(gs, xs, _size(scale, sized), strict=True):
        gradients.append((_wide(g) * s).to(x.dtype))
        g_scale.append((_wide(g) * _wide(x)).sum())
    return gradients, _of_size(torch.stack(g_scale), scale, sized)


def dorefa_scale(top, bits):
    """m of dorefa_fwd's `scale`; 1 where all weights are 0."""
    m = top if bits == 1 else top.tanh()
    return torch.where(m == 0, 1, m) if bits > 1 else m


# scale: (L, 2): max|w| and how many attain it; for one bit the mean of |w| and 1
def dorefa_fwd(xs, scale, bits, detach_max):
    n, ys = 2**bits - 1, []
    for x, top in zip(xs, scale[:, 0], strict=True):
        m = dorefa_scale(top, bits)
        y = _sign(_wide(x)) * m if bits == 1 else _over(2 * (n * (_wide(x).tanh() / (2 * m) + 0.5)).round() - n, n)
        ys.append(y.to(x.dtype))
    return ys


def dorefa_bwd(gs, xs, scale, bits, detach_max):
    if bits == 1:
        return [g.to(x.dtype) for g, x in zip(gs, xs, strict=True)]
    gradients = []
    for g, x, of_x in zip(gs, xs, scale, strict=True):
        m, t, g = dorefa_scale(of_x[0], bits), _wide(x).tanh(), _wide(g)
        result = g * ((1 - t) * (1 + t)) / m
        if not detach_max:
            result = result + dorefa_bwd_of_maximum(x, of_x, (g * t).sum(), bits)
        gradients.append(result.to(x.dtype))
    return gradients


def dorefa_bwd_of_maximum(x, scale, total, bits):
    """The gradient through m = max|t|, split over ties, where total = sum g t."""
    (top, ties), x, m = scale, _wide(x), dorefa_scale(scale[0], bits)
    t = x.tanh()
    return torch.where(x.abs() == top, -t.sign() * ((1 - t) * (1 + t)) * (total / m / (m * ties)), 0)


class _Straight(torch.autograd.Function):
    """Rounds; the gradient g passes as g + delta |g| (x - rounded x) / n."""

    @staticmethod
    def forward(ctx, x, n, delta):
        ctx.save_for_backward(x, delta)
        ctx.n = n
        return x.round()

    @staticmethod
    def backward(ctx, g):
        x, delta = ctx.saved_tensors
        return (g if delta is None else g + delta * g.abs() * (x - x.round()) / ctx.n), None, None


def _round(x):
    return _Straight.apply(x, 1, None)


def _results(ys, single):
    return ys[0] if single else ys


def lsq(x, step, bits, *, signed=True, axis=None, levels="lsq"):
    xs, single = checks.weights(x, name="x")
    checks.bit_width(bits)
    checks.level_kind(levels, bits, signed)
    axis = checks.channel_axis(axis, xs, single)
    step = parameters.channels("step", step, xs, single, axis)
    (low, high), ys = parameters.levels(bits, signed, levels), []
    for w, s in zip(xs, _parameters(_size(step), xs, axis), strict=True):
        scale = 1 / math.sqrt(_channel(w, axis) * high)
        s = s.detach() + scale * (s - s.detach())
        v = (_wide(w) / s).clamp(-low, high)
        c = code(v.detach(), bits, signed, levels) + (v - v.detach())
        ys.append((s * c).to(w.dtype))
    return _results(ys, single)


def ewgs(x, lower, upper, bits, *, delta=0.0, signed=True):
    xs, single = checks.weights(x, name="x")
    checks.bit_width(bits)
    lower, upper, delta = parameters.bounds(lower, upper, delta, xs, single)
    n, ys = 2**bits - 1, []
    for w, low, high, d in zip(xs, lower, upper, delta, strict=True):
        v, _, _ = _ewgs(w, low, high)
        c = _Straight.apply(n * v.clamp(0, 1), n, d)
        ys.append(_over(2 * c - n if signed else c, n).to(w.dtype))
    return _results(ys, single)


def pact(x, alpha, bits, *, plus=False):
    xs, single = checks.weights(x, name="x")
    checks.bit_width(bits)
    n, ys = 2**bits - 1, []
    for w, a in zip(xs, _size(parameters.channels("alpha", alpha, xs, single)), strict=True):
        w_ = _wide(w)
        y = torch.where(w_ >= a, a, torch.where(w_ < 0, 0, w_))
        s = _over(a, n)
        quantized = s * _round(y / s)
        ys.append((quantized if plus else quantized.detach() + (y - y.detach())).to(w.dtype))
    return _results(ys, single)


def dorefa(w, bits, *, detach_max=False):
    ws, single = checks.weights(w, name="w")
    checks.bit_width(bits)
    n, ys = 2**bits - 1, []
    for x in ws:
        x_ = _wide(x)
        if bits == 1:
            ys.append(((_sign(x_) * x_.abs().mean()).detach() + (x_ - x_.detach())).to(x.dtype))
            continue
        m = dorefa_scale(x_.abs().amax() if x.numel() else x_.new_zeros(()), bits)
        c = _round(n * (x_.tanh() / (2 * (m.detach() if detach_max else m)) + 0.5))
        ys.append(_over(2 * c - n, n).to(x.dtype))
    return _results(ys, single)
