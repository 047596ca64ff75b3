"""The formulas of the range losses, in the table at the end: `<op>_reduce` and `<op>_merge` are the forward,
`<op>_setup` and `<op>_gradient` the backward.

soft_min_max runs on exponents of 2: k (w - top) with k = |alpha| log2(e) on side P, k (bottom - w) on side Q. The
difference comes first: folded into one fma(k, w, -k top) it costs an instruction less on each side, but rounds k top,
which an alpha of 1e9, or a constant tensor, does not forgive. A shift need not be the maximum, only near the soft one:
the first block of a chunk gives it. Only where an exponential passed 2^60, or the variance cancelled, the chunk is read
again with a better one. So the loop has no comparison and no work across lanes.
"""

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
    sums_of_column,
    zero_block,
)

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
MOST = tl.constexpr(2.0**60)
LEAST_SPAN_32, LEAST_SPAN_64 = tl.constexpr(1e-9), tl.constexpr(1e-30)
SMALLEST_32, SMALLEST_64 = tl.constexpr(2.0**-126), tl.constexpr(2.0**-1022)  # normal numbers


@triton.jit
def extremes_step(b_w, constants, state):
    """Largest and smallest weight of every lane."""
    high, low = state
    for u in tl.static_range(len(b_w)):
        high, low = tl.maximum(high, b_w[u], PROPAGATE), tl.minimum(low, b_w[u], PROPAGATE)
    return high, low


@triton.jit
def soft_step(b_w, constants, state):
    """Of each side the sums of e, delta e and delta^2 e."""
    k, top, bottom = constants
    s0, s1, s2, t0, t1, t2 = state
    for u in tl.static_range(len(b_w)):
        delta = k * (b_w[u] - top)
        e = tl.exp2(delta)
        d = delta * e
        s0, s1, s2 = s0 + e, s1 + d, tl.fma(delta, d, s2)
        delta = k * (bottom - b_w[u])
        e = tl.exp2(delta)
        d = delta * e
        t0, t1, t2 = t0 + e, t1 + d, tl.fma(delta, d, t2)
    return s0, s1, s2, t0, t1, t2


@triton.jit
def soft_frozen_step(b_w, constants, state):
    """Without the second moments, which only the gradient of alpha needs."""
    k, top, bottom = constants
    s0, s1, t0, t1 = state
    for u in tl.static_range(len(b_w)):
        delta = k * (b_w[u] - top)
        e = tl.exp2(delta)
        s0, s1 = s0 + e, tl.fma(delta, e, s1)
        delta = k * (bottom - b_w[u])
        e = tl.exp2(delta)
        t0, t1 = t0 + e, tl.fma(delta, e, t1)
    return s0, s1, t0, t1


@triton.jit
def soft_extreme_of_block(b_w, k, extreme):
    """The shift of a side: the soft extreme of the weights of one block."""
    delta = (b_w - extreme) * k
    e = tl.exp2(delta)
    return extreme + tl.sum(delta * e, 0) / tl.sum(e, 0) / k


@triton.jit
def soft_shifts(rows, p_alpha, column):
    """(k, shift of side P, shift of side Q), from the first block of a chunk. Exponents span LEAST at least, which is
    nothing to the result and leaves them squares; where they do not in the first block, all rows are asked."""
    LEAST: tl.constexpr = LEAST_SPAN_64 if rows.ACC.is_fp64() else LEAST_SPAN_32
    SMALLEST: tl.constexpr = SMALLEST_64 if rows.ACC.is_fp64() else SMALLEST_32
    alpha, b_w = tl.abs(tl.load(p_alpha + column)), first_block(rows)
    top, bottom = tl.max(b_w, 0), tl.min(b_w, 0)
    if alpha * (top - bottom) < LEAST:
        b_high, b_low = fold_rows(rows, (), (b_w, b_w), extremes_step)
        reach = tl.max(b_high, 0) - tl.min(b_low, 0)
        alpha = tl.maximum(alpha, tl.maximum(LEAST / tl.maximum(reach, SMALLEST), SMALLEST))
    k = alpha * LOG2E
    return k, soft_extreme_of_block(b_w, k, top), soft_extreme_of_block(b_w, -k, bottom)


@triton.jit
def variance_is_lost(s0, s1, s2):
    """Whether a side's variance is lost to cancellation: the mean is more than two deviations from the shift."""
    mean = s1 / s0
    return mean * mean > 4 * (s2 / s0 - mean * mean)


@triton.jit
def state_of_side(shift, k, s0, s1, s2):
    """(shift, sum of exponentials, mean less the shift, deviation), in the units of the weights. Of a float32 the
    square may be none."""
    mean = s1 / s0
    return shift, s0, mean / k, tl.sqrt(tl.maximum(tl.fma(-mean, mean, s2 / s0), 0.0, PROPAGATE)) / k


@triton.jit
def state_of_sides(k, top, s0, s1, s2, bottom, t0, t1, t2):
    """Side Q counts downwards: its sum is negated, for a -k would need a register throughout the sums."""
    return state_of_side(top, k, s0, s1, s2) + state_of_side(bottom, k, t0, -t1, t2)


@triton.jit
def soft_sums(rows, p_alpha, column, VARIANCE: tl.constexpr):
    """The state of a chunk: the deviations only with VARIANCE."""
    k, top, bottom = soft_shifts(rows, p_alpha, column)
    zero, none = zero_block(rows), tl.full([], 0, rows.ACC)
    s0, s1, s2, t0, t1, t2 = none, none, none, none, none, none
    attempts = 3
    while attempts > 0:
        if VARIANCE:
            s0, s1, s2, t0, t1, t2 = sum_blocks(
                fold_rows(rows, (k, top, bottom), (zero, zero, zero, zero, zero, zero), soft_step)
            )
        else:
            s0, s1, t0, t1 = sum_blocks(fold_rows(rows, (k, top, bottom), (zero, zero, zero, zero), soft_frozen_step))
        attempts -= 1
        if attempts > 0:
            if tl.maximum(s0, t0) > MOST:
                b_high, b_low = fold_rows(rows, (), (zero + top, zero + bottom), extremes_step)
                top, bottom = tl.max(b_high, 0), tl.min(b_low, 0)
            elif VARIANCE and (variance_is_lost(s0, s1, s2) | variance_is_lost(t0, t1, t2)):
                top, bottom = top + s1 / s0 / k, bottom - t1 / t0 / k
            else:
                attempts = 0
    return state_of_sides(k, top, s0, s1, s2, bottom, t0, t1, t2)


@triton.jit
def soft_min_max_reduce(rows, p_alpha, column):
    return soft_sums(rows, p_alpha, column, True)


@triton.jit
def soft_min_max_reduce_frozen(rows, p_alpha, column):
    return soft_sums(rows, p_alpha, column, False)


@triton.jit
def shifts_step(state, rows, constants, sums):
    """The outermost shifts of all chunks."""
    return tl.maximum(sums[0], state[0]), tl.minimum(sums[1], state[4])


@triton.jit
def moments_around(k, side, new):
    """The weight of a chunk's side and its first and second moment, all around the shift of another."""
    shift, s0, mean, deviation = side
    apart = shift.to(tl.float64) - new
    weight = tl.exp2(k * apart) * s0.to(tl.float64)
    mean, deviation = mean.to(tl.float64) + apart, deviation.to(tl.float64)
    return weight, weight * mean, weight * (mean * mean + deviation * deviation)


@triton.jit
def soft_merge_step(state, rows, constants, sums):
    k, top, bottom = constants
    s = moments_around(k, state[:4], top)
    t = moments_around(-k, state[4:], bottom)
    return sums[0] + s[0], sums[1] + s[1], sums[2] + s[2], sums[3] + t[0], sums[4] + t[1], sums[5] + t[2]


@triton.jit
def saved_of_side(shift, s0, s1, s2):
    """What is saved of a side: shift, 1 / sum, soft extreme minus shift, deviation."""
    mean = s1 / s0
    return shift, 1 / s0, mean, tl.sqrt(tl.maximum(s2 / s0 - mean * mean, 0.0, PROPAGATE))


@triton.jit
def soft_sides(states, p_alpha, column):
    """(alpha, side p, side q): p is side P, or side Q where alpha is negative."""
    alpha = tl.load(p_alpha + column)
    k = tl.abs(alpha).to(tl.float64) * LOG2E
    inf = tl.full([states.LANES], float("inf"), states.ACC)
    b_top, b_bottom = fold_states(states, (), (-inf, inf), shifts_step)
    top, bottom = tl.max(b_top, 0).to(tl.float64), tl.min(b_bottom, 0).to(tl.float64)
    zero = tl.zeros([states.LANES], tl.float64)
    s0, s1, s2, t0, t1, t2 = sum_blocks(
        fold_states(states, (k, top, bottom), (zero, zero, zero, zero, zero, zero), soft_merge_step)
    )
    high, low = saved_of_side(top, s0, s1, s2), saved_of_side(bottom, t0, t1, t2)
    p, q = (), ()
    for s in tl.static_range(4):
        p += (tl.where(alpha < 0, low[s], high[s]),)
        q += (tl.where(alpha < 0, high[s], low[s]),)
    return alpha.to(tl.float64), p, q


@triton.jit
def soft_min_max_merge(states, p_alpha, p_second, column):
    alpha, p, q = soft_sides(states, p_alpha, column)
    return ((p[0] - q[0]) + (p[2] - q[2]) + tl.exp(-alpha),), p + q


@triton.jit
def soft_extrema_merge(states, p_alpha, p_second, column):
    _, p, q = soft_sides(states, p_alpha, column)
    return (q[0] + q[2], p[0] + p[2]), p + q


@triton.jit
def constants_of_side(g, k, p_saved):
    """(shift, a, b) for the gradient 2^delta (a + b delta) with delta = k (w - shift)."""
    shift, scale, mean = tl.load(p_saved), tl.load(p_saved + 1), tl.load(p_saved + 2)
    return shift, g * scale * (1 - LN2 * k * mean), g * scale * LN2


@triton.jit
def soft_constants(g_max, g_min, alpha, p):
    """(gradient of alpha, constants of the two sides)"""
    k = alpha * LOG2E
    of_p, of_q = tl.load(p + 3).to(tl.float64), tl.load(p + 7).to(tl.float64)
    g_alpha = (g_max * of_p * of_p - g_min * of_q * of_q).to(alpha.dtype)
    return g_alpha, (k,) + constants_of_side(g_max, k, p) + constants_of_side(g_min, -k, p + 4)


@triton.jit
def soft_min_max_setup(column):
    g, alpha = gradient_of_loss(column), tl.load(column.p_first + column.i)
    g_alpha, constants = soft_constants(g, -g, alpha, column.p_saved + column.i * 8)
    return g_alpha - g * tl.exp(-alpha), constants


@triton.jit
def soft_extrema_setup(column):
    p_grad = column.p_grad + column.i
    return soft_constants(
        tl.load(p_grad + column.grad_stride),
        tl.load(p_grad),
        tl.load(column.p_first + column.i),
        column.p_saved + column.i * 8,
    )


@triton.jit
def soft_min_max_gradient(w, constants):
    k, top, a, b, bottom, c, d = constants
    delta, epsilon = (w - top) * k, (bottom - w) * k
    return tl.fma(tl.exp2(delta), tl.fma(delta, b, a), tl.exp2(epsilon) * tl.fma(epsilon, d, c))


@triton.jit
def top_and_ties(b_top, b_ties):
    """The maximum over the lanes, and how often it occurs."""
    top = max_or_nan(b_top)
    return top, tl.sum(tl.where(b_top == top, b_ties, 0), 0)


@triton.jit
def l_inf_step(b_w, constants, state):
    """On the bits of |w|, which order as the numbers do, with NaN above all: 4.2 instructions a weight; on floats
    4.9."""
    before, ties = state
    b_a, top = (), before
    for u in tl.static_range(len(b_w)):
        b_a += (tl.abs(b_w[u]).to(before.dtype, bitcast=True),)
        top = tl.maximum(top, b_a[u])
    ties = tl.where(top > before, 0, ties) + len(b_w)
    for u in tl.static_range(len(b_w)):
        ties += tl.maximum(b_a[u] - top, -1)
    return top, ties


@triton.jit
def l_inf_reduce(rows, p_first, column):
    zero = tl.zeros([rows.BLOCK], tl.int64 if rows.ACC.is_fp64() else tl.int32)
    top, ties = fold_rows(rows, (), (zero, zero), l_inf_step)
    return top_and_ties(top.to(rows.ACC, bitcast=True), ties)


@triton.jit
def l_inf_merge_step(state, rows, constants, sums):
    top = tl.maximum(sums[0], state[0], PROPAGATE)
    return top, tl.where(sums[0] == top, sums[1], 0) + tl.where(state[0] == top, state[1], 0)


@triton.jit
def l_inf_merge(states, p_first, p_second, column):
    zero = tl.zeros([states.LANES], states.ACC)
    top, ties = fold_states(states, (), (zero, zero), l_inf_merge_step)
    top, ties = top_and_ties(top, ties)
    return (top.to(tl.float64),), (top, ties)


@triton.jit
def l_inf_setup(column):
    top, ties = tl.load(column.p_saved + column.i * 2), tl.load(column.p_saved + column.i * 2 + 1)
    g = gradient_of_loss(column) / ties
    return 0, (top, tl.where(top == 0, 0, g), g * 0)


@triton.jit
def l_inf_gradient(w, constants):
    top, g, zero = constants
    return tl.where(w == top, g, tl.where(w == -top, -g, zero))


@triton.jit
def margin_step(b_w, constants, state):
    """How far the weights lie outside of +-m, and how many do."""
    (m,) = constants
    excess, outside = state
    for u in tl.static_range(len(b_w)):
        over = tl.abs(b_w[u]) - m
        excess += tl.maximum(over, 0.0, PROPAGATE)
        outside += tl.where(over > 0, 1.0, 0.0)
    return excess, outside


@triton.jit
def margin_reduce(rows, p_M, column):
    zero = zero_block(rows)
    return sum_blocks(fold_rows(rows, (tl.abs(tl.load(p_M + column)),), (zero, zero), margin_step))


@triton.jit
def margin_divisor(p_k, n):
    """The divisor of the sum over n rows."""
    k = tl.load(p_k).to(n.dtype)
    return tl.where(k > 0, tl.where(k < 1, k * n, k), float("nan"))


@triton.jit
def margin_merge(states, p_M, p_k, column):
    excess, outside = sums_of_column(states)
    divisor = margin_divisor(p_k + column, states.rows.to(tl.float64))
    return (tl.abs(tl.load(p_M + column)).to(tl.float64) + excess / divisor,), (outside,)


@triton.jit
def margin_setup(column):
    g, m = gradient_of_loss(column), tl.load(column.p_first + column.i)
    divisor = margin_divisor(column.p_second + column.i, column.rows)
    sign = tl.where(m > 0, 1.0, tl.where(m < 0, -1.0, m))
    return g * sign * (1 - tl.load(column.p_saved + column.i) / divisor), (tl.abs(m), g / divisor, g / divisor * 0)


@triton.jit
def margin_gradient(w, constants):
    m, g, zero = constants
    return tl.where(w > m, g, tl.where(w < -m, -g, zero))


FORMULAS = {
    "l_inf": Formula(reduce=l_inf_reduce, merge=l_inf_merge, setup=l_inf_setup, gradient=l_inf_gradient),
    "margin": Formula(reduce=margin_reduce, merge=margin_merge, setup=margin_setup, gradient=margin_gradient),
    "soft_min_max": Formula(
        reduce=soft_min_max_reduce,
        reduce_frozen=soft_min_max_reduce_frozen,
        merge=soft_min_max_merge,
        setup=soft_min_max_setup,
        gradient=soft_min_max_gradient,
    ),
    "soft_extrema": Formula(
        reduce=soft_min_max_reduce,
        reduce_frozen=soft_min_max_reduce_frozen,
        merge=soft_extrema_merge,
        setup=soft_extrema_setup,
        gradient=soft_min_max_gradient,
        losses=2,
    ),
}
