"""Rounding as the reference has it, to the bit, for the quantizers, bin_reg and msqe.

Quotients are IEEE's; what is rounded is within 2^22, where adding 1.5 * 2^23 leaves the nearest integer, half to even.
"""

import triton
import triton.language as tl

from .chunks import PROPAGATE

FUSES = tl.constexpr(not triton.knobs.runtime.interpret)  # whether tl.fma rounds once


@triton.jit
def divide(a, b):
    """As IEEE 754 has it; `/` of float32 is not."""
    if a.dtype.is_fp64():
        return a / b
    else:
        return tl.math.div_rn(a, b)


@triton.jit
def divide_by_levels(c, HIGH: tl.constexpr):
    """c / HIGH for an integer |c| <= HIGH = 2^bits - 1: a corrected product is the IEEE quotient for all of them."""
    if FUSES:
        q = c * (1 / HIGH)
        return tl.fma(tl.fma(q, 0 - HIGH, c), 1 / HIGH, q)
    else:
        return divide(c, tl.full([], HIGH, c.dtype))


@triton.jit
def round_half_even(v):
    """The nearest integer, half to even, 0 for -0; |v| < 2^22."""
    if v.dtype.is_fp64():
        return (v + 6755399441055744.0) - 6755399441055744.0
    else:
        return (v + 12582912.0) - 12582912.0


@triton.jit
def nearest_integer(v):
    """The nearest integer, half to even, with the sign of v; |v| < 2^22."""
    r = round_half_even(v)
    if v.dtype.is_fp64():
        sign = v.to(tl.int64, bitcast=True) & -9223372036854775808
        return (r.to(tl.int64, bitcast=True) | sign).to(tl.float64, bitcast=True)
    else:
        sign = v.to(tl.int32, bitcast=True) & -2147483648
        return (r.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def clip(v, low, high):
    """NaN stays NaN."""
    return tl.minimum(tl.maximum(v, low, PROPAGATE), high, PROPAGATE)


@triton.jit
def positive_or_nan(p):
    """A step, a range or a threshold of clipping that is not above 0 makes the results NaN."""
    return tl.where(p > 0, p, float("nan"))


@triton.jit
def sign_or_one(v):
    """+1 for 0, NaN for NaN"""
    return tl.where(v < 0, -1.0, tl.where(v >= 0, 1.0, v))


@triton.jit
def lsq_code(v, LOW: tl.constexpr, HIGH: tl.constexpr, SIGN: tl.constexpr):
    """LSQ's code of v = x / step, one of -LOW, -LOW + 1, ..., HIGH; with SIGN -1 or 1."""
    if SIGN:
        return sign_or_one(v)
    elif HIGH % 1 == 0:
        return nearest_integer(clip(v, 0 - LOW, HIGH))
    else:
        return nearest_integer(clip(v, 0 - LOW, HIGH) - 0.5) + 0.5
