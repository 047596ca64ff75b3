"""Bin regularization, MSQE, partial L2, and several terms from one read of the weights.

A term is a number: which it is, its bits, where its lanes begin in the state of all terms, how many they are. All terms take their state from the same
tiles; where a chunk must be read again (soft_min_max with an unlucky shift, kure with an unlucky centre), its term alone is done anew.
What bin_reg and partial_l2 must know beforehand, the weights in each bin and the threshold, comes from integer histograms in passes of their own: then
bin_reg is sum (w - q)^2 / V[code], with neither sums by code nor atomics of floating-point numbers.
"""

import triton
import triton.language as tl

from . import moments_kernels as moments
from . import range_losses_kernels as range
from .quantizers_kernels import code, divide, positive
from .skeletons import (
    ADD,
    FIELDS,
    FLAT,
    SEGMENT,
    STATE,
    Column,
    Rows,
    States,
    at,
    clear,
    each,
    find,
    first_block,
    fold,
    fold_states,
    gradient_of_loss,
    max_or_nan,
    pointer,
    sum_each,
    zeros,
)

L_INF, MARGIN, SOFT, FROZEN, KURE, BIN_REG, MSQE, PARTIAL_L2 = [tl.constexpr(i) for i in (0, 1, 2, 3, 4, 5, 6, 7)]
LANES_OF = (2, 2, 6, 4, 6, 1, 2, 1)  # blocks in the state of each of them
DIGIT = tl.constexpr(256)  # values of a digit of a weight's bits


def encode(term, bits, first):
    return term + 16 * bits + 256 * first


@triton.constexpr_function
def lanes_of(term):
    return LANES_OF[term]


@triton.jit
def levels(x, s, BITS: tl.constexpr):
    """(x - s code, code) with signed codes"""
    c = code(divide(x, s), 1.0 if BITS == 1 else 2.0 ** (BITS - 1), 1.0 if BITS == 1 else 2.0 ** (BITS - 1) - 1)
    return tl.fma(-s, c, x), c


@triton.jit
def bin_of(c, BITS: tl.constexpr):
    """The place of a code among 2^BITS; of NaN the first."""
    if BITS == 1:
        return (c > 0).to(tl.int32)
    else:
        return tl.where(c == c, c + 2.0 ** (BITS - 1), 0).to(tl.int32)


@triton.jit
def begin(rows, p_first, p_saved, column, TERM: tl.constexpr, BITS: tl.constexpr):
    """(constants, the state before any weight)"""
    zero = zeros(rows)
    if TERM == L_INF:
        none = tl.zeros([rows.BLOCK], tl.int64 if rows.ACC.is_fp64() else tl.int32)
        return (), (none, none)
    elif TERM == MARGIN:
        return (tl.abs(tl.load(p_first + column)),), (zero, zero)
    elif TERM == SOFT or TERM == FROZEN:  # noqa: SIM109
        k, b_w = range.scale(tl.load(p_first + column)), first_block(rows)
        constants = k, range.soft_extreme(b_w, k, tl.max(b_w, 0)), range.soft_extreme(b_w, -k, tl.min(b_w, 0))
        if TERM == SOFT:
            return constants, (zero, zero, zero, zero, zero, zero)
        else:
            return constants, (zero, zero, zero, zero)
    elif TERM == KURE:
        centre, inf = tl.sum(first_block(rows), 0) / rows.BLOCK, zero + float("inf")
        return (tl.where(tl.abs(centre) < float("inf"), centre, 0),), (zero, zero, zero, zero, inf, -inf)
    elif TERM == BIN_REG:
        return (positive(tl.load(p_first + column)), p_saved + column * 2**BITS), (zero,)
    elif TERM == MSQE:
        return (positive(tl.load(p_first + column)),), (zero, zero)
    else:
        return (tl.load(p_saved + column),), (zero,)


@triton.jit
def step(b_w, constants, state, TERM: tl.constexpr, BITS: tl.constexpr):
    if TERM == L_INF:
        return range.l_inf_step(b_w, constants, state)
    elif TERM == MARGIN:
        return range.margin_step(b_w, constants, state)
    elif TERM == SOFT:
        return range.soft_step(b_w, constants, state)
    elif TERM == FROZEN:
        return range.frozen_step(b_w, constants, state)
    elif TERM == KURE:
        return moments.power_sums_step(b_w, constants, state)
    elif TERM == BIN_REG:
        total = state[0]
        for u in tl.static_range(len(b_w)):
            error, c = levels(b_w[u], constants[0], BITS)
            total += error * error / tl.load(constants[1] + bin_of(c, BITS))
        return (total,)
    elif TERM == MSQE:
        squares, products = state
        for u in tl.static_range(len(b_w)):
            error, c = levels(b_w[u], constants[0], BITS)
            squares, products = tl.fma(error, error, squares), tl.fma(error, c, products)
        return squares, products
    else:
        total = state[0]
        for u in tl.static_range(len(b_w)):
            total += tl.where(tl.abs(b_w[u]) > constants[0], 0, b_w[u] * b_w[u])
        return (total,)


@triton.jit
def part(state, CODE: tl.constexpr):
    """What belongs to one term"""
    chosen = ()
    for s in tl.static_range(lanes_of(CODE % 16)):
        chosen += (state[CODE // 256 + s],)
    return chosen


@triton.jit
def terms_step(b_w, constants, state, TERMS: tl.constexpr):
    kept = ()
    for k in tl.static_range(len(TERMS)):
        kept += step(b_w, constants[k], part(state, TERMS[k]), TERMS[k] % 16, TERMS[k] // 16 % 16)
    return kept


@triton.jit
def finish(rows, p_first, column, constants, state, TERM: tl.constexpr):
    """The numbers that are kept of a chunk, as <op>_reduce of the term alone has them."""
    if TERM == L_INF:
        return range.tied(state[0].to(rows.ACC, bitcast=True), state[1])
    elif TERM == SOFT:
        _, top, bottom = constants
        s0, s1, s2, t0, t1, t2 = sum_each(state)
        if (tl.maximum(s0, t0) > range.MOST) | range.is_off(s0, s1, s2) | range.is_off(t0, t1, t2):
            top, s0, s1, s2, bottom, t0, t1, t2 = range.soft_sums(rows, p_first, column, True)
        return top, s0, s1, s2, bottom, t0, t1, t2
    elif TERM == FROZEN:
        _, top, bottom = constants
        s0, s1, t0, t1 = sum_each(state)
        none = s0 * 0
        s2, t2 = none, none
        if tl.maximum(s0, t0) > range.MOST:
            top, s0, s1, s2, bottom, t0, t1, t2 = range.soft_sums(rows, p_first, column, False)
        return top, s0, s1, s2, bottom, t0, t1, t2
    elif TERM == KURE:
        centre = constants[0]
        s1, s2, s3, s4 = sum_each((state[0], state[1], state[2], state[3]))
        low, high = -max_or_nan(-state[4]), max_or_nan(state[5])
        if 16 * s1 * s1 > rows.count * s2:
            centre, s1, s2, s3, s4, low, high = moments.kure_reduce(rows, p_first, column)
        return centre, s1, s2, s3, s4, low, high
    else:
        return sum_each(state)


@triton.jit
def reduce_terms(
    p_weights,
    p_tensors,
    p_owner,
    p_first,
    p_saved,
    p_states,
    n_chunk,
    TERMS: tl.constexpr,
    DT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program per chunk: the state of every term, each in a plane."""
    i = tl.program_id(0)
    t, c, start, n, run = find(i, p_tensors, p_owner, n_chunk, 1)
    p = at(pointer(p_weights, t, DT, ALIGNED), c, start, run, 1)
    HALF: tl.constexpr = DT.primitive_bitwidth == 16
    reduce_rows(
        Rows(
            p,
            start,
            tl.minimum(n - start, n_chunk).to(tl.int32),
            run,
            ACC,
            1,
            HALF and ALIGNED,
            BLOCK // 2 if HALF else BLOCK,
            UNROLL,
        ),
        p_first,
        p_saved,
        p_states + i.to(tl.int64) * STATE,
        t,
        TERMS,
    )


@triton.jit
def reduce_rows(rows, p_first, p_saved, p_state, t, TERMS: tl.constexpr):
    constants, state = (), ()
    for k in tl.static_range(len(TERMS)):
        its_constants, its_state = begin(rows, p_first[k], p_saved[k], t, TERMS[k] % 16, TERMS[k] // 16 % 16)
        constants, state = constants + (its_constants,), state + its_state
    state = fold(rows, constants, state, terms_step, TERMS)
    for k in tl.static_range(len(TERMS)):
        kept = finish(rows, p_first[k], t, constants[k], part(state, TERMS[k]), TERMS[k] % 16)
        for s in tl.static_range(len(kept)):
            tl.store(p_state + k * tl.num_programs(0).to(tl.int64) * STATE + s, kept[s])


@triton.jit
def merged(states, p_first, p_second, p_saved, column, TERM: tl.constexpr):
    """(loss, what is saved) of a term"""
    if TERM == L_INF:
        return range.l_inf_merge(states, p_first, p_second, column)
    elif TERM == MARGIN:
        return range.margin_merge(states, p_first, p_second, column)
    elif TERM == SOFT or TERM == FROZEN:  # noqa: SIM109
        return range.soft_min_max_merge(states, p_first, p_second, column)
    elif TERM == KURE:
        return moments.kure_merge(states, p_first, p_second, column)
    else:
        zero = tl.zeros([states.LANES], tl.float64)
        first, second = sum_each(fold_states(states, (), (zero, zero), range.margin_merge_step))
        if TERM == BIN_REG:
            return (first,), ()
        elif TERM == MSQE:
            return (first / states.rows.to(tl.float64),), (second,)
        else:
            return (first / states.rows.to(tl.float64) + tl.load(p_saved + column) * 0,), ()


@triton.jit
def merge_terms(
    p_states,
    p_tensors,
    p_first,
    p_second,
    p_losses,
    p_saved,
    n_chunk,
    n_chunks,
    TERMS: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
):
    """Program (t, k): the loss of tensor t and what is saved of it, for the k-th term."""
    t = tl.program_id(0)
    p = p_tensors + t * FIELDS
    n, first = tl.load(p), tl.load(p + 3)
    for k in tl.static_range(len(TERMS)):
        if tl.program_id(1) == k:
            losses, saved = merged(
                States(p_states + (k * n_chunks.to(tl.int64) + first) * STATE, n, n_chunk, ACC, 1, LANES),
                p_first[k],
                p_second[k],
                p_saved[k],
                t,
                TERMS[k] % 16,
            )
            tl.store(p_losses[k] + t, losses[0])
            for s in tl.static_range(len(saved)):
                tl.store(p_saved[k] + t * len(saved) + s, saved[s])


@triton.jit
def setup(column, TERM: tl.constexpr, BITS: tl.constexpr):
    """(gradient of the parameter, constants of the gradient)"""
    if TERM == L_INF:
        return range.l_inf_setup(column)
    elif TERM == MARGIN:
        return range.margin_setup(column)
    elif TERM == SOFT or TERM == FROZEN:  # noqa: SIM109
        return range.soft_min_max_setup(column)
    elif TERM == KURE:
        return moments.kure_setup(column)
    else:
        g = 2 * gradient_of_loss(column)
        if TERM == BIN_REG:
            return 0, (positive(tl.load(column.p_first + column.i)), g, column.p_saved + column.i * 2**BITS)
        elif TERM == MSQE:
            return -g / column.rows * tl.load(column.p_saved + column.i), (
                positive(tl.load(column.p_first + column.i)),
                g / column.rows,
            )
        else:
            theta = tl.load(column.p_saved + column.i)
            return 0, (theta, g / tl.where(theta == theta, column.rows, theta))


@triton.jit
def gradient(w, constants, TERM: tl.constexpr, BITS: tl.constexpr):
    if TERM == L_INF:
        return range.l_inf_gradient(w, constants)
    elif TERM == MARGIN:
        return range.margin_gradient(w, constants)
    elif TERM == SOFT or TERM == FROZEN:  # noqa: SIM109
        return range.soft_min_max_gradient(w, constants)
    elif TERM == KURE:
        return moments.kure_gradient(w, constants)
    elif TERM == BIN_REG:
        error, c = levels(w, constants[0], BITS)
        return constants[1] / tl.load(constants[2] + bin_of(c, BITS)) * error
    elif TERM == MSQE:
        error, _ = levels(w, constants[0], BITS)
        return constants[1] * error
    else:
        return tl.where(tl.abs(w) > constants[0], 0, constants[1] * w)


@triton.jit
def terms_gradient(w, constants, TERMS: tl.constexpr):
    total = gradient(w, constants[0], TERMS[0] % 16, TERMS[0] // 16 % 16)
    for k in tl.static_range(1, len(TERMS)):
        total += gradient(w, constants[k], TERMS[k] % 16, TERMS[k] // 16 % 16)
    return total


@triton.jit
def map_terms(
    p_weights,
    p_targets,
    p_tensors,
    p_owner,
    p_grads,
    p_first,
    p_second,
    p_saved,
    p_parameter_gradients,
    n_chunk,
    TERMS: tl.constexpr,
    TARGET: tl.constexpr,
    DT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program per chunk: the sum of the gradients of all terms; the first of a tensor stores those of the parameters."""
    t, c, start, n, run = find(tl.program_id(0), p_tensors, p_owner, n_chunk, 1)
    constants = ()
    for k in tl.static_range(len(TERMS)):
        parameter_gradient, its_constants = setup(
            Column(p_grads[k], 1, p_first[k], p_second[k], p_saved[k], t, t, n.to(ACC)),
            TERMS[k] % 16,
            TERMS[k] // 16 % 16,
        )
        constants += (its_constants,)
        if p_parameter_gradients[k] is not None:
            tl.store(p_parameter_gradients[k] + t, parameter_gradient, mask=start == 0)
    if TARGET == FLAT:
        p_target = p_targets + tl.multiple_of(tl.load(p_tensors + t * FIELDS + 4), SEGMENT)
        end = (n + SEGMENT - 1) // SEGMENT * SEGMENT
    else:
        p_target = pointer(p_targets, t, DT, ALIGNED)
        end = n
    p, count = at(pointer(p_weights, t, DT, ALIGNED), c, start, run, 1), tl.minimum(n - start, n_chunk).to(tl.int32)
    each(
        Rows(p, start, count, run, ACC, 1, False, BLOCK, UNROLL),
        Rows(at(p_target, c, start, run, 1), start, count, run, ACC, 1, False, BLOCK, UNROLL),
        constants,
        terms_gradient,
        TARGET,
        TERMS,
    )
    if TARGET != ADD and start + n_chunk >= n:
        clear(p_target, n, end)


@triton.jit
def bits_of_size(w, DT: tl.constexpr):
    """The bits of |w|, read as an integer, which order as the numbers do, with NaN above all."""
    if DT.primitive_bitwidth == 64:
        return w & 0x7FFFFFFFFFFFFFFF
    elif DT.primitive_bitwidth == 32:
        return w & 0x7FFFFFFF
    else:
        return w.to(tl.int32) & 0x7FFF


@triton.jit
def digits_before(p_counts, rank, n_tensors, PASS: tl.constexpr):
    """(the first PASS digits of the number of this rank, its rank among those that begin so); p_counts of the tensor, in the first pass."""
    prefix = tl.full([], 0, tl.int64)
    for k in tl.static_range(PASS):
        before = tl.cumsum(tl.load(p_counts + k * n_tensors.to(tl.int64) * DIGIT + tl.arange(0, DIGIT)).to(tl.int64), 0)
        prefix = prefix * DIGIT + tl.minimum(tl.sum((before < rank).to(tl.int32), 0), DIGIT - 1)
        rank -= tl.max(tl.where(before < rank, before, 0), 0)
    return prefix, rank


@triton.jit
def digit(w, p_first, t, prefix, m, BITS: tl.constexpr, PASS: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr):
    """(which of the counters, whether it counts)"""
    if PASS is None:
        _, c = levels(w.to(DT, bitcast=True).to(ACC), positive(tl.load(p_first + t)), BITS)
        return bin_of(c, BITS), m
    else:
        key = bits_of_size(w, DT)
        SHIFT: tl.constexpr = DT.primitive_bitwidth - 8 * (PASS + 1)
        return ((key >> SHIFT) & (DIGIT - 1)).to(tl.int32), m if PASS == 0 else m & (
            (key >> (SHIFT + 8)) == prefix.to(key.dtype)
        )


@triton.jit(do_not_specialize=["n_tensors"])
def count_chunks(
    p_weights,
    p_tensors,
    p_owner,
    p_first,
    p_counts,
    n_chunk,
    n_tensors,
    BITS: tl.constexpr,
    PASS: tl.constexpr,
    BINS: tl.constexpr,
    DT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk: how many of its weights are in each bin of `p_first`, a step; or, with PASS, have each value of a digit behind those digits of
    the number of rank `p_first` that the passes before have found. Integer sums, so their order is of no matter."""
    t, _, start, n, _ = find(tl.program_id(0), p_tensors, p_owner, n_chunk, 1)
    INT: tl.constexpr = (
        tl.int64 if DT.primitive_bitwidth == 64 else tl.int32 if DT.primitive_bitwidth == 32 else tl.int16
    )
    p = pointer(p_weights, t, DT, ALIGNED).to(tl.pointer_type(INT)) + start
    p_counts += t.to(tl.int64) * BINS
    prefix = tl.full([], 0, tl.int64)
    if PASS is not None:
        prefix, _ = digits_before(p_counts, tl.load(p_first + t), n_tensors, PASS)
        p_counts += PASS * n_tensors.to(tl.int64) * BINS
    count = tl.minimum(n - start, n_chunk).to(tl.int32)
    counts = tl.zeros([BINS], tl.int32)
    o = tl.arange(0, BLOCK)
    i = 0
    while i < count:
        m = i + o < count
        which, m_counted = digit(tl.load(p + i + o, mask=m, other=0), p_first, t, prefix, m, BITS, PASS, DT, ACC)
        counts += tl.histogram(which, BINS, mask=m_counted)
        i += BLOCK
    tl.atomic_add(p_counts + tl.arange(0, BINS), counts.to(p_counts.dtype.element_ty), mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["n_tensors"])
def store_threshold(p_rank, p_counts, p_saved, n_tensors, PASSES: tl.constexpr, DT: tl.constexpr):
    """The |w| of this rank of every tensor; NaN where the rank is below 1."""
    t = tl.program_id(0)
    rank = tl.load(p_rank + t)
    found, _ = digits_before(p_counts + t.to(tl.int64) * DIGIT, rank, n_tensors, PASSES)
    if DT.primitive_bitwidth == 64:
        theta = found.to(tl.float64, bitcast=True)
    elif DT.primitive_bitwidth == 32:
        theta = found.to(tl.int32).to(tl.float32, bitcast=True)
    else:
        theta = found.to(tl.int16).to(DT, bitcast=True).to(tl.float32)
    tl.store(p_saved + t, tl.where(rank < 1, float("nan"), theta))
