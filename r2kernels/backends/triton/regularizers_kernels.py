"""The formulas of bin_reg, msqe and partial_l2, of which regularizers_terms_kernels.py makes kernels.

What bin_reg and partial_l2 must know beforehand, the weights in each bin and the threshold, has been counted by
regularizers_counts_kernels.py and lies in `p_saved`: so bin_reg is sum (w - q)^2 / V[code], with neither sums by code
nor atomics of floating-point numbers.
"""

import triton
import triton.language as tl

from .rounding import divide, lsq_code, positive_or_nan
from .skeletons import gradient_of_loss, sums_of_column


@triton.jit
def error_and_code(x, s, BITS: tl.constexpr):
    """(x - s code, code) with signed codes"""
    HALF: tl.constexpr = 2.0 ** (BITS - 1)
    c = lsq_code(divide(x, s), HALF, 1.0 if BITS == 1 else HALF - 1, BITS == 1)
    return tl.fma(-s, c, x), c


@triton.jit
def bin_of(c, BITS: tl.constexpr):
    """The place of a code among 2^BITS; of NaN the first."""
    if BITS == 1:
        return (c > 0).to(tl.int32)
    else:
        return tl.where(c == c, c + 2.0 ** (BITS - 1), 0).to(tl.int32)


@triton.jit
def bin_reg_constants(p_step, p_counts, column, BITS: tl.constexpr):
    """(step, the counts of the bins)"""
    return positive_or_nan(tl.load(p_step + column)), p_counts + column * 2**BITS


@triton.jit
def bin_reg_step(b_w, constants, state, BITS: tl.constexpr):
    step, p_counts = constants
    total = state[0]
    for u in tl.static_range(len(b_w)):
        error, c = error_and_code(b_w[u], step, BITS)
        total += error * error / tl.load(p_counts + bin_of(c, BITS))
    return (total,)


@triton.jit
def bin_reg_merge(states):
    first, _ = sums_of_column(states)
    return (first,), ()


@triton.jit
def bin_reg_setup(column, BITS: tl.constexpr):
    g = 2 * gradient_of_loss(column)
    step, p_counts = bin_reg_constants(column.p_first, column.p_saved, column.i, BITS)
    return 0, (step, g, p_counts)


@triton.jit
def bin_reg_gradient(w, constants, BITS: tl.constexpr):
    step, g, p_counts = constants
    error, c = error_and_code(w, step, BITS)
    return g / tl.load(p_counts + bin_of(c, BITS)) * error


@triton.jit
def msqe_constants(p_step, column):
    return (positive_or_nan(tl.load(p_step + column)),)


@triton.jit
def msqe_step(b_w, constants, state, BITS: tl.constexpr):
    """Sums of squared errors, and of errors times codes, which the gradient of the step needs."""
    squares, products = state
    for u in tl.static_range(len(b_w)):
        error, c = error_and_code(b_w[u], constants[0], BITS)
        squares, products = tl.fma(error, error, squares), tl.fma(error, c, products)
    return squares, products


@triton.jit
def msqe_merge(states):
    squares, products = sums_of_column(states)
    return (squares / states.rows.to(tl.float64),), (products,)


@triton.jit
def msqe_setup(column):
    g = 2 * gradient_of_loss(column)
    g_step = -g / column.rows * tl.load(column.p_saved + column.i)
    return g_step, (positive_or_nan(tl.load(column.p_first + column.i)), g / column.rows)


@triton.jit
def msqe_gradient(w, constants, BITS: tl.constexpr):
    step, g = constants
    error, _ = error_and_code(w, step, BITS)
    return g * error


@triton.jit
def partial_l2_constants(p_threshold, column):
    return (tl.load(p_threshold + column),)


@triton.jit
def partial_l2_step(b_w, constants, state):
    total = state[0]
    for u in tl.static_range(len(b_w)):
        total += tl.where(tl.abs(b_w[u]) > constants[0], 0, b_w[u] * b_w[u])
    return (total,)


@triton.jit
def partial_l2_merge(states, p_threshold, column):
    """NaN where the threshold is."""
    first, _ = sums_of_column(states)
    return (first / states.rows.to(tl.float64) + tl.load(p_threshold + column) * 0,), ()


@triton.jit
def partial_l2_setup(column):
    g, theta = 2 * gradient_of_loss(column), tl.load(column.p_saved + column.i)
    return 0, (theta, g / tl.where(theta == theta, column.rows, theta))


@triton.jit
def partial_l2_gradient(w, constants):
    theta, g = constants
    return tl.where(tl.abs(w) > theta, 0, g * w)
