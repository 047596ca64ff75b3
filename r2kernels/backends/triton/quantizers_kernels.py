"""LSQ, EWGS, PACT and DoReFa as formulas, in the table at the end, and DoReFa's correction at the maxima.

Codes equal the reference's to the bit: no product is fused with a sum but by `tl.fma` (the launchers turn
`enable_fp_fusion` off).
"""

from collections.abc import Callable
from typing import NamedTuple

import triton
import triton.language as tl

from .channel_skeletons import WHOLE, channel_chunk_of_program
from .chunks import FIRST_CHUNK, field, tensor_pointer
from .range_losses_kernels import LOG2E
from .rounding import clip, divide, divide_by_levels, lsq_code, nearest_integer, positive_or_nan, sign_or_one


class QuantizerFormula(NamedTuple):
    """A quantizer as the skeletons take it. LOW, HIGH and FLAG are told in quantizers.py."""

    setup: Callable  # (p_parameters, column) -> constants
    fwd: Callable  # (x, g, constants, LOW, HIGH, FLAG) -> (y, ())
    bwd: Callable  # (x, g, constants, LOW, HIGH, FLAG) -> (gradient of x, what is added to each of its sums)
    sums: int = 0  # of the backward
    finish: Callable | None = None  # (sums, p_parameters, column, m, rows, HIGH) -> gradients of the parameters


@triton.jit
def lsq_setup(p_parameters, column):
    return (positive_or_nan(tl.load(p_parameters[0] + column)),)


@triton.jit
def lsq_fwd(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, SIGN: tl.constexpr):
    return constants[0] * lsq_code(divide(x, constants[0]), LOW, HIGH, SIGN), ()


@triton.jit
def lsq_bwd(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, SIGN: tl.constexpr):
    v = divide(x, constants[0])
    below, above = v < -LOW, v > HIGH
    slope = tl.where(below, -LOW, tl.where(above, HIGH, lsq_code(v, LOW, HIGH, SIGN) - v))
    return tl.where(below | above, 0, g), (g * slope,)


@triton.jit
def lsq_finish(sums, p_parameters, column, m, rows, HIGH: tl.constexpr):
    return (sums[0] / tl.sqrt(rows * HIGH),)


@triton.jit
def ewgs_setup(p_parameters, column):
    lower, upper = tl.load(p_parameters[0] + column), tl.load(p_parameters[1] + column)
    span = positive_or_nan(upper - lower)
    return lower, span, 1 / span, tl.load(p_parameters[2] + column)


@triton.jit
def ewgs_fwd(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, SIGNED: tl.constexpr):
    lower, span, _, _ = constants
    c = nearest_integer(clip(divide(x - lower, span), 0.0, 1.0) * HIGH)
    return divide_by_levels(2 * c - HIGH if SIGNED else c, HIGH), ()


@triton.jit
def ewgs_bwd(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, SIGNED: tl.constexpr):
    lower, span, inverse, delta = constants
    v = divide(x - lower, span)
    clipped = clip(v, 0.0, 1.0)
    g = 2 * g if SIGNED else g
    off = tl.fma(nearest_integer(clipped * HIGH), -1 / HIGH, clipped)
    g = tl.where((v < 0) | (v > 1), 0, tl.fma(delta * tl.abs(g), off, g))
    return g * inverse, (g * (v - 1), g * v)


@triton.jit
def ewgs_finish(sums, p_parameters, column, m, rows, HIGH: tl.constexpr):
    lower, upper = tl.load(p_parameters[0] + column, mask=m), tl.load(p_parameters[1] + column, mask=m)
    span = positive_or_nan(upper - lower).to(tl.float64)
    return sums[0] / span, -sums[1] / span


@triton.jit
def pact_setup(p_parameters, column):
    return (positive_or_nan(tl.load(p_parameters[0] + column)),)


@triton.jit
def pact_fwd(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, PLUS: tl.constexpr):
    a = constants[0]
    s = divide(a, tl.full([], HIGH, x.dtype))
    return s * nearest_integer(divide(tl.where(x >= a, a, tl.where(x < 0, 0, x)), s)), ()


@triton.jit
def pact_bwd(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, PLUS: tl.constexpr):
    a = constants[0]
    above, below = x >= a, x < 0
    inside = tl.zeros_like(x)
    if PLUS:
        z = divide(x, divide(a, tl.full([], HIGH, x.dtype)))
        inside = (nearest_integer(z) - z) * (1 / HIGH)
    return tl.where(above | below, 0, g), (g * tl.where(above, 1, tl.where(below, 0, inside)),)


@triton.jit
def pact_finish(sums, p_parameters, column, m, rows, HIGH: tl.constexpr):
    return (sums[0],)


@triton.jit
def tanh(x):
    """To about an ulp: where |x| < 0.75 by a polynomial, which interpolates tanh(x) / x - 1 at the zeros of a Chebyshev
    polynomial in x^2."""
    u, a = x * x, tl.abs(x)
    if x.dtype.is_fp64():
        p = tl.fma(u, -1.6408599646831442e-06, 1.0048053928129499e-05)
        p = tl.fma(u, tl.fma(u, tl.fma(u, p, -3.4494724699982165e-05), 9.42476297649358e-05), -0.00023809406936979282)
        p = tl.fma(u, tl.fma(u, tl.fma(u, p, 0.0005897469986953327), -0.0014557818253310693), 0.0035921213885060418)
        p = tl.fma(u, tl.fma(u, tl.fma(u, p, -0.008863234987439102), 0.021869488509711037), -0.05396825396758208)
        p = tl.fma(u, tl.fma(u, p, 0.13333333333332661), -0.3333333333333333)
    else:
        p = tl.fma(u, tl.fma(u, 0.0019095024520666551, -0.007933807623248752), 0.021615318898138572)
        p = tl.fma(u, tl.fma(u, tl.fma(u, p, -0.05393585355058975), 0.13333179635256998), -0.3333333213635708)
    far = 1 - 2 / (tl.exp2(a * (2 * LOG2E)) + 1)
    return tl.where(a < 0.75, tl.fma(x, u * p, x), tl.where(x < 0, -far, far))


@triton.jit
def dorefa_setup(p_parameters, column):
    """(max|w|, m, 1 / m)"""
    top = tl.load(p_parameters[0] + 2 * column)
    m = tanh(top)
    m = tl.where(m == 0, 1, m)
    return top, m, 1 / m


@triton.jit
def dorefa_fwd(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, FLAG: tl.constexpr):
    _, m, _ = constants
    c = nearest_integer((divide(tanh(x), 2 * m) + 0.5) * HIGH)
    return divide_by_levels(2 * c - HIGH, HIGH), ()


@triton.jit
def dorefa_bwd(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, FLAG: tl.constexpr):
    top, _, inverse = constants
    t = tanh(x)
    return g * ((1 - t) * (1 + t)) * inverse, (g * t, tl.where(tl.abs(x) == top, 1.0, 0.0))


@triton.jit
def dorefa_detached_bwd(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, FLAG: tl.constexpr):
    t = tanh(x)
    return g * ((1 - t) * (1 + t)) * constants[2], ()


@triton.jit
def dorefa_sign_setup(p_parameters, column):
    return (tl.load(p_parameters[0] + 2 * column),)


@triton.jit
def dorefa_sign_fwd(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, FLAG: tl.constexpr):
    return sign_or_one(x) * constants[0], ()


@triton.jit
def dorefa_sign_bwd(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, FLAG: tl.constexpr):
    return g, ()


@triton.jit
def correct_maxima(
    p_xs,
    p_gs,
    p_ys,
    p_tensors,
    p_owner,
    p_parameters,
    p_sums,
    n_chunk,
    DT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program per chunk: DoReFa's gradient where |x| is the maximum, less what comes through it. Most chunks have
    none, and nothing to do."""
    i = tl.program_id(0)
    if tl.load(p_sums + i.to(tl.int64) * 2 + 1) > 0:
        t, _, _, start, n, _, _ = channel_chunk_of_program(i, p_tensors, p_owner, n_chunk, WHOLE)
        total, j = tl.zeros([LANES], tl.float64), tl.arange(0, LANES).to(tl.int64)
        while tl.min(j, 0) * n_chunk < n:
            p_chunk = p_sums + (field(p_tensors, t, FIRST_CHUNK) + j) * 2
            total += tl.load(p_chunk, mask=j * n_chunk < n, other=0).to(tl.float64)
            j += LANES
        top, _, inverse = dorefa_setup(p_parameters, t)
        through = (tl.sum(total, 0) * inverse * inverse / tl.load(p_parameters[0] + 2 * t + 1)).to(ACC)
        p, p_g = tensor_pointer(p_xs, t, DT, ALIGNED), tensor_pointer(p_gs, t, DT, ALIGNED)
        p_y = tensor_pointer(p_ys, t, DT, ALIGNED)
        end, k = tl.minimum(start + n_chunk, n), start + tl.arange(0, BLOCK)
        while tl.min(k, 0) < end:
            x = tl.load(p + k, mask=k < end, other=0).to(ACC)
            m_top = (k < end) & (tl.abs(x) == top)
            g = tl.load(p_g + k, mask=m_top, other=0).to(ACC)
            tanh_x = tanh(x)
            slope = (1 - tanh_x) * (1 + tanh_x)
            sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))
            tl.store(p_y + k, (g * slope * inverse - sign * slope * through).to(DT), mask=m_top)
            k += BLOCK


QUANTIZERS = {
    "lsq": QuantizerFormula(lsq_setup, lsq_fwd, lsq_bwd, sums=1, finish=lsq_finish),
    "ewgs": QuantizerFormula(ewgs_setup, ewgs_fwd, ewgs_bwd, sums=2, finish=ewgs_finish),
    "pact": QuantizerFormula(pact_setup, pact_fwd, pact_bwd, sums=1, finish=pact_finish),
    "dorefa": QuantizerFormula(dorefa_setup, dorefa_fwd, dorefa_bwd, sums=2),  # for `correct_maxima`
    "dorefa_detached": QuantizerFormula(dorefa_setup, dorefa_fwd, dorefa_detached_bwd),
    "dorefa_sign": QuantizerFormula(dorefa_sign_setup, dorefa_sign_fwd, dorefa_sign_bwd),
}
