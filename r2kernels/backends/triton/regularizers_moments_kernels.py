"""The formulas of what the first four moments give, kure and weight_stats, in the table at the end."""

import triton
import triton.language as tl

from .chunks import PROPAGATE
from .skeletons import (
    Formula,
    first_block,
    fold_rows,
    fold_states,
    gradient_of_loss,
    max_or_nan,
    sum_blocks,
    zero_block,
)


@triton.jit
def unit_at(x):
    """The power of two at |x| or below, within bounds where it and its inverse are normal numbers, also for 0 and NaN;
    and its inverse."""
    if x.dtype.is_fp64():
        e = tl.minimum(tl.maximum((x.to(tl.int64, bitcast=True) >> 52) & 0x7FF, 1), 2045)
        return (e << 52).to(tl.float64, bitcast=True), ((2046 - e) << 52).to(tl.float64, bitcast=True)
    else:
        e = tl.minimum(tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, 1), 253)
        return (e << 23).to(tl.float32, bitcast=True), ((254 - e) << 23).to(tl.float32, bitcast=True)


FAR = tl.constexpr(2.0**16)  # times the unit: up to there float32 has room for fourth powers and their sums


@triton.jit
def power_sums_step(b_w, constants, state):
    """Sums of the first four powers about the centre, in units; smallest and largest weight."""
    centre, _, inverse = constants
    s1, s2, s3, s4, low, high = state
    for u in tl.static_range(len(b_w)):
        v = tl.fma(b_w[u], inverse, -centre)
        q = v * v
        s1, s2, s3, s4 = s1 + v, s2 + q, tl.fma(q, v, s3), tl.fma(q, q, s4)
        high, low = tl.maximum(high, b_w[u], PROPAGATE), tl.minimum(low, b_w[u], PROPAGATE)
    return s1, s2, s3, s4, low, high


@triton.jit
def guess_of_block(rows):
    """(centre, unit, 1 / unit) from the first weights of a chunk: the power of two at the largest, and their mean in
    that unit, 0 where it is no number."""
    b_w = first_block(rows)
    unit, inverse = unit_at(tl.max(tl.abs(b_w), 0))
    centre = tl.sum(b_w * inverse, 0) / rows.BLOCK
    return tl.where(tl.abs(centre) < float("inf"), centre, 0), unit, inverse


@triton.jit
def is_far(s1, s2, count, unit, largest):
    """Whether the mean lies over a quarter of the spread away from the centre, or weights are too large for the
    unit."""
    return (16 * s1 * s1 > count * s2) | (largest > unit * FAR)


@triton.jit
def kure_reduce(rows, p_first, column):
    """Power sums about a guessed centre, in a guessed unit; once more in one that has room for the largest weight, or
    about the mean, where those are far."""
    centre, unit, inverse = guess_of_block(rows)
    zero = zero_block(rows)
    inf = zero + float("inf")
    none = tl.full([], 0, rows.ACC)
    s1, s2, s3, s4, low, high = none, none, none, none, none, none
    attempts = 3
    while attempts > 0:
        b_1, b_2, b_3, b_4, b_low, b_high = fold_rows(
            rows, (centre, unit, inverse), (zero, zero, zero, zero, inf, -inf), power_sums_step
        )
        s1, s2, s3, s4 = sum_blocks((b_1, b_2, b_3, b_4))
        low, high = -max_or_nan(-b_low), max_or_nan(b_high)
        largest, its_inverse = unit_at(tl.maximum(-low, high))
        attempts -= 1
        if (attempts > 0) & is_far(s1, s2, rows.count, unit, largest):
            if largest > unit * FAR:
                centre *= unit * its_inverse
                unit, inverse = largest, its_inverse
            else:
                centre += s1 / rows.count
        else:
            attempts = 0
    return centre, s1, s2, s3, s4, low, high, unit


@triton.jit
def totals_step(state, rows, constants, sums):
    """Sum, smallest and largest weight and largest unit of all chunks."""
    total, low, high, unit = sums
    return (
        total + (rows * state[0].to(tl.float64) + state[1].to(tl.float64)) * state[7].to(tl.float64),
        tl.minimum(low, state[5], PROPAGATE),
        tl.maximum(high, state[6], PROPAGATE),
        tl.maximum(unit, state[7]),
    )


@triton.jit
def moments_step(state, rows, constants, sums):
    """The power sums of a chunk, in the common unit and moved to the common mean."""
    mean, inverse = constants
    r = state[7].to(tl.float64) * inverse
    s1, s2 = state[1].to(tl.float64) * r, state[2].to(tl.float64) * r * r
    s3, s4 = state[3].to(tl.float64) * r * r * r, state[4].to(tl.float64) * r * r * r * r
    d = state[0].to(tl.float64) * r - mean
    m2 = s2 + d * (2 * s1 + d * rows)
    m3 = s3 + d * (3 * s2 + d * (3 * s1 + d * rows))
    m4 = s4 + d * (4 * s3 + d * (6 * s2 + d * (4 * s1 + d * rows)))
    return sums[0] + m2, sums[1] + m3, sums[2] + m4


@triton.jit
def moments(states):
    """(low, high, mean, std, 1 / std, mean z^3, mean z^4). Of a constant tensor all behind the mean are 0; with an
    infinity in it they are NaN, and the mean is what a sum would give."""
    n = states.rows.to(tl.float64)
    zero, inf = tl.zeros([states.LANES], tl.float64), tl.full([states.LANES], float("inf"), states.ACC)
    none = tl.zeros([states.LANES], states.ACC)
    b_total, b_low, b_high, b_unit = fold_states(states, (), (zero, inf, -inf, none), totals_step)
    mean, low, high = tl.sum(b_total, 0) / n, -max_or_nan(-b_low), max_or_nan(b_high)
    unit = tl.max(b_unit, 0).to(tl.float64)
    m2, m3, m4 = sum_blocks(fold_states(states, (mean / unit, 1 / unit), (zero, zero, zero), moments_step))
    finite = tl.maximum(tl.abs(low), tl.abs(high), PROPAGATE) < float("inf")
    constant, nan = finite & (low == high), tl.where(finite, 0.0, float("nan"))
    std = tl.where(constant, 0, tl.sqrt(m2 / tl.maximum(n - 1, 1)))
    z = tl.where(std == 0, 0, 1 / std)
    return (
        low,
        high,
        tl.where(finite, mean, low + high),
        std * unit + nan,
        z / unit + nan,
        m3 / n * z * z * z + nan,
        m4 / n * z * z * z * z + nan,
    )


@triton.jit
def kure_merge(states, p_target, p_second, column):
    _, _, mean, std, r, skew, kurtosis = moments(states)
    off = kurtosis - tl.load(p_target + column)
    return (tl.where(std == 0, 0, off * off),), (mean, r, skew, kurtosis)


@triton.jit
def kure_setup(column):
    p, n = column.p_saved + column.i * 4, column.rows
    mean, r, skew, kurtosis = tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3)
    g = gradient_of_loss(column) * 2 * (kurtosis - tl.load(column.p_first + column.i)) * 4 / n * r
    return 0, (mean, r, g, skew, n / tl.maximum(n - 1, 1) * kurtosis)


@triton.jit
def kure_gradient(w, constants):
    mean, r, g, skew, c = constants
    z = (w - mean) * r
    return g * tl.fma(z, tl.fma(z, z, -c), -skew)


@triton.jit
def weight_stats_merge(states, p_first, p_second, column):
    low, high, mean, std, _, skew, kurtosis = moments(states)
    return (), (low, high, mean, std, kurtosis, tl.maximum(-low, high, PROPAGATE), skew)


FORMULAS = {
    "kure": Formula(reduce=kure_reduce, merge=kure_merge, setup=kure_setup, gradient=kure_gradient),
    "weight_stats": Formula(reduce=kure_reduce, merge=weight_stats_merge, losses=0),
}
