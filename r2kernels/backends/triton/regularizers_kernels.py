"""The formulas of msqe, partial_l2 and the gradient of bin_reg, of which regularizers_terms_kernels.py makes kernels.

What partial_l2 must know beforehand, the threshold, has been found by regularizers_counts_kernels.py and lies in
`p_saved`; the forward of bin_reg is in regularizers_bins_kernels.py.
"""

import triton
import triton.language as tl

from .regularizers_moments_kernels import unit_at
from .rounding import clip, divide, positive_or_nan, round_half_even, sign_or_one
from .skeletons import fold_rows, fold_states, gradient_of_loss, sum_blocks, sums_of_column, zero_block


@triton.jit
def error_and_code(x, s, BITS: tl.constexpr):
    """(x - s code, code) with LSQ's signed codes, but that there is no -0"""
    HALF: tl.constexpr = 2.0 ** (BITS - 1)
    v = divide(x, s)
    c = sign_or_one(v) if BITS == 1 else round_half_even(clip(v, 0 - HALF, HALF - 1))
    return tl.fma(-s, c, x), c


@triton.jit
def bin_of(c, BITS: tl.constexpr):
    """The place of a code among 2^BITS; of NaN the first."""
    if BITS == 1:
        return (c > 0).to(tl.int32)
    else:
        return tl.where(c == c, c + 2.0 ** (BITS - 1), 0).to(tl.int32)


@triton.jit
def error_unit(step):
    """(unit, 1 / unit) of errors whose squares are summed: so far below the step, and so small, that no square vanishes
    that has a place in the result. A sum may overflow (in float32 where errors exceed 2^15 steps, or 2^37), and is then
    made anew in a wider unit."""
    if step.dtype.is_fp64():
        return unit_at(tl.minimum(step * 2.0**-300, 2.0**-37))
    else:
        return unit_at(tl.minimum(step * 2.0**-40, 2.0**-19))


@triton.jit
def wider_unit(unit):
    return unit_at(unit * (2.0**800 if unit.dtype.is_fp64() else 2.0**100))


@triton.jit
def is_wanting(total, unit):
    """Whether a sum overflowed that another unit has room for."""
    return (total == float("inf")) & (unit < (2.0**1022 if unit.dtype.is_fp64() else 2.0**126))


@triton.jit
def step_and_unit(p_step, column):
    step = positive_or_nan(tl.load(p_step + column))
    unit, inverse = error_unit(step)
    return step, unit, inverse


@triton.jit
def bin_reg_setup(column, BITS: tl.constexpr):
    """The constants: step, 2 dL/dloss, where the counts of the bins lie."""
    step = positive_or_nan(tl.load(column.p_first + column.i))
    return 0, (step, 2 * gradient_of_loss(column), column.p_saved + column.i * (2 * 2**BITS))


@triton.jit
def bin_reg_gradient(w, constants, BITS: tl.constexpr):
    step, g, p_counts = constants
    error, c = error_and_code(w, step, BITS)
    return g / tl.load(p_counts + bin_of(c, BITS)) * error


@triton.jit
def msqe_step(b_w, constants, state, BITS: tl.constexpr):
    """Sums of squared errors, and of errors times codes, which the gradient of the step needs."""
    step, _, inverse = constants
    squares, products = state
    for u in tl.static_range(len(b_w)):
        error, c = error_and_code(b_w[u], step, BITS)
        error *= inverse
        squares, products = tl.fma(error, error, squares), tl.fma(error, c, products)
    return squares, products


@triton.jit
def msqe_finish(rows, constants, state, BITS: tl.constexpr):
    """(sum of squares, of products, unit)"""
    step, unit, _ = constants
    squares, products = sum_blocks(state)
    zero = zero_block(rows)
    while is_wanting(squares, unit):
        unit, inverse = wider_unit(unit)
        squares, products = sum_blocks(fold_rows(rows, (step, unit, inverse), (zero, zero), msqe_step, BITS))
    return squares, products, unit


@triton.jit
def msqe_sums_step(state, rows, constants, sums):
    unit = state[2].to(tl.float64)
    return sums[0] + state[0].to(tl.float64) * unit * unit, sums[1] + state[1].to(tl.float64) * unit


@triton.jit
def msqe_merge(states):
    zero, n = tl.zeros([states.LANES], tl.float64), states.rows.to(tl.float64)
    squares, products = sum_blocks(fold_states(states, (), (zero, zero), msqe_sums_step))
    return (squares / n,), (products / n,)


@triton.jit
def msqe_setup(column):
    g = 2 * gradient_of_loss(column)
    g_step = -g * tl.load(column.p_saved + column.i)
    return g_step, (positive_or_nan(tl.load(column.p_first + column.i)), g / column.rows)


@triton.jit
def msqe_gradient(w, constants, BITS: tl.constexpr):
    step, g = constants
    error, _ = error_and_code(w, step, BITS)
    return g * error


@triton.jit
def partial_l2_constants(p_threshold, column):
    """(threshold / unit, 1 / unit), the unit the power of two at the threshold"""
    theta = tl.load(p_threshold + column)
    _, inverse = unit_at(theta)
    return theta * inverse, inverse


@triton.jit
def partial_l2_step(b_w, constants, state):
    theta, inverse = constants
    total = state[0]
    for u in tl.static_range(len(b_w)):
        v = b_w[u] * inverse
        total = tl.where(tl.abs(v) > theta, total, tl.fma(v, v, total))
    return (total,)


@triton.jit
def partial_l2_merge(states, p_threshold, column):
    """NaN where the threshold is."""
    first, _ = sums_of_column(states)
    theta = tl.load(p_threshold + column)
    unit = unit_at(theta)[0].to(tl.float64)
    return (tl.where(theta == theta, first / states.rows.to(tl.float64) * unit * unit, theta),), ()


@triton.jit
def partial_l2_setup(column):
    g, theta = 2 * gradient_of_loss(column), tl.load(column.p_saved + column.i)
    return 0, (theta, g / tl.where(theta == theta, column.rows, theta))


@triton.jit
def partial_l2_gradient(w, constants):
    theta, g = constants
    return tl.where(tl.abs(w) > theta, 0, g * w)
