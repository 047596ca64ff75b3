"""Several losses from one read of the weights: the formulas of all families, chosen by term.

All terms take their state from the same tiles; where a chunk must be read again (soft_min_max with an unlucky shift,
kure with an unlucky centre), its term alone is done anew.
"""

import triton
import triton.language as tl

from . import range_losses_kernels as range_losses
from . import regularizers_kernels as regularizers
from . import regularizers_moments_kernels as moments
from .chunks import FIRST_CHUNK, N_ROWS, chunk_of_program, column_pointer, field, tensor_pointer
from .skeletons import STATE, Column, Rows, States, fold_rows, map_rows_of_chunk, max_or_nan, sum_blocks, zero_block

# term -> blocks in its state; frozen is soft_min_max where alpha learns nothing; the forward of bin_reg is not here
BLOCKS = {"l_inf": 2, "margin": 2, "soft_min_max": 6, "frozen": 4, "kure": 6, "bin_reg": 0, "msqe": 2, "partial_l2": 1}
KEYS = tuple(BLOCKS)
L_INF, MARGIN, SOFT_MIN_MAX, FROZEN, KURE, BIN_REG, MSQE, PARTIAL_L2 = [tl.constexpr(i) for i in range(len(KEYS))]


def encode(names, bits):
    """The terms of a set as numbers: which it is + 16 its bits + 256 where its state begins in that of all."""
    codes, first = [], 0
    for name, width in zip(names, bits, strict=True):
        codes.append(KEYS.index(name) + 16 * width + 256 * first)
        first += BLOCKS[name]
    return tuple(codes)


@triton.constexpr_function
def term_of(code):
    return code % 16


@triton.constexpr_function
def bits_of(code):
    return code // 16 % 16


@triton.constexpr_function
def start_of_state(code):
    return code // 256


@triton.constexpr_function
def length_of_state(code):
    return BLOCKS[KEYS[code % 16]]


@triton.jit
def begin_term(rows, p_first, p_saved, column, CODE: tl.constexpr):
    """(constants, the state before any weight)"""
    TERM: tl.constexpr = term_of(CODE)
    zero = zero_block(rows)
    if TERM == L_INF:
        none = tl.zeros([rows.BLOCK], tl.int64 if rows.ACC.is_fp64() else tl.int32)
        return (), (none, none)
    elif TERM == MARGIN:
        return (tl.abs(tl.load(p_first + column)),), (zero, zero)
    elif TERM == SOFT_MIN_MAX:
        return range_losses.soft_shifts(rows, p_first, column), (zero, zero, zero, zero, zero, zero)
    elif TERM == FROZEN:
        return range_losses.soft_shifts(rows, p_first, column), (zero, zero, zero, zero)
    elif TERM == KURE:
        inf = zero + float("inf")
        return moments.guess_of_block(rows), (zero, zero, zero, zero, inf, -inf)
    elif TERM == MSQE:
        return regularizers.step_and_unit(p_first, column), (zero, zero)
    else:
        return regularizers.partial_l2_constants(p_saved, column), (zero,)


@triton.jit
def step_term(b_w, constants, state, CODE: tl.constexpr):
    TERM: tl.constexpr = term_of(CODE)
    if TERM == L_INF:
        return range_losses.l_inf_step(b_w, constants, state)
    elif TERM == MARGIN:
        return range_losses.margin_step(b_w, constants, state)
    elif TERM == SOFT_MIN_MAX:
        return range_losses.soft_step(b_w, constants, state)
    elif TERM == FROZEN:
        return range_losses.soft_frozen_step(b_w, constants, state)
    elif TERM == KURE:
        return moments.power_sums_step(b_w, constants, state)
    elif TERM == MSQE:
        return regularizers.msqe_step(b_w, constants, state, bits_of(CODE))
    else:
        return regularizers.partial_l2_step(b_w, constants, state)


@triton.jit
def state_of_term(state, CODE: tl.constexpr):
    """The blocks that belong to one term."""
    chosen = ()
    for s in tl.static_range(length_of_state(CODE)):
        chosen += (state[start_of_state(CODE) + s],)
    return chosen


@triton.jit
def terms_step(b_w, constants, state, TERMS: tl.constexpr):
    """The step of every term, on the same weights."""
    kept = ()
    for k in tl.static_range(len(TERMS)):
        kept += step_term(b_w, constants[k], state_of_term(state, TERMS[k]), TERMS[k])
    return kept


@triton.jit
def finish_term(rows, p_first, column, constants, state, CODE: tl.constexpr):
    """The numbers that are kept of a chunk, as <op>_reduce of the term alone has them."""
    TERM: tl.constexpr = term_of(CODE)
    if TERM == L_INF:
        return range_losses.top_and_ties(state[0].to(rows.ACC, bitcast=True), state[1])
    elif TERM == SOFT_MIN_MAX:
        k, top, bottom = constants
        s0, s1, s2, t0, t1, t2 = sum_blocks(state)
        again = tl.maximum(s0, t0) > range_losses.MOST
        again |= range_losses.variance_is_lost(s0, s1, s2)
        again |= range_losses.variance_is_lost(t0, t1, t2)
        kept = range_losses.state_of_sides(k, top, s0, s1, s2, bottom, t0, t1, t2)
        if again:
            kept = range_losses.soft_sums(rows, p_first, column, True)
        return kept
    elif TERM == FROZEN:
        k, top, bottom = constants
        s0, s1, t0, t1 = sum_blocks(state)
        none = s0 * 0
        kept = range_losses.state_of_sides(k, top, s0, s1, none, bottom, t0, t1, none)
        if tl.maximum(s0, t0) > range_losses.MOST:
            kept = range_losses.soft_sums(rows, p_first, column, False)
        return kept
    elif TERM == KURE:
        centre, unit, _ = constants
        s1, s2, s3, s4 = sum_blocks((state[0], state[1], state[2], state[3]))
        low, high = -max_or_nan(-state[4]), max_or_nan(state[5])
        if moments.is_far(s1, s2, rows.count, unit, moments.unit_at(tl.maximum(-low, high))[0]):
            centre, s1, s2, s3, s4, low, high, unit = moments.kure_reduce(rows, p_first, column)
        return centre, s1, s2, s3, s4, low, high, unit
    elif TERM == MSQE:
        return regularizers.msqe_finish(rows, constants, state, bits_of(CODE))
    else:
        return sum_blocks(state)


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
    t, c, start, n, run = chunk_of_program(i, p_tensors, p_owner, n_chunk, 1)
    p = column_pointer(tensor_pointer(p_weights, t, DT, ALIGNED), c, start, run, 1)
    HALF: tl.constexpr = DT.primitive_bitwidth == 16
    reduce_rows_to_terms(
        Rows(
            p,
            run,
            run,
            run,
            tl.minimum(n - start, n_chunk).to(tl.int32),
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
def reduce_rows_to_terms(rows, p_first, p_saved, p_state, t, TERMS: tl.constexpr):
    """A function of its own because `Rows` must be an argument."""
    constants, state = (), ()
    for k in tl.static_range(len(TERMS)):
        its_constants, its_state = begin_term(rows, p_first[k], p_saved[k], t, TERMS[k])
        constants, state = constants + (its_constants,), state + its_state
    state = fold_rows(rows, constants, state, terms_step, TERMS)
    for k in tl.static_range(len(TERMS)):
        kept = finish_term(rows, p_first[k], t, constants[k], state_of_term(state, TERMS[k]), TERMS[k])
        for s in tl.static_range(len(kept)):
            tl.store(p_state + k * tl.num_programs(0).to(tl.int64) * STATE + s, kept[s])


@triton.jit
def merge_term(states, p_first, p_second, p_saved, column, CODE: tl.constexpr):
    """(loss, what is saved) of a term"""
    TERM: tl.constexpr = term_of(CODE)
    if TERM == L_INF:
        return range_losses.l_inf_merge(states, p_first, p_second, column)
    elif TERM == MARGIN:
        return range_losses.margin_merge(states, p_first, p_second, column)
    elif TERM == SOFT_MIN_MAX or TERM == FROZEN:  # noqa: SIM109
        return range_losses.soft_min_max_merge(states, p_first, p_second, column)
    elif TERM == KURE:
        return moments.kure_merge(states, p_first, p_second, column)
    elif TERM == MSQE:
        return regularizers.msqe_merge(states)
    else:
        return regularizers.partial_l2_merge(states, p_saved, column)


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
    n, first = field(p_tensors, t, N_ROWS), field(p_tensors, t, FIRST_CHUNK)
    for k in tl.static_range(len(TERMS)):
        if tl.program_id(1) == k:
            losses, saved = merge_term(
                States(p_states + (k * n_chunks.to(tl.int64) + first) * STATE, n, n_chunk, ACC, 1, LANES),
                p_first[k],
                p_second[k],
                p_saved[k],
                t,
                TERMS[k],
            )
            tl.store(p_losses[k] + t, losses[0])
            for s in tl.static_range(len(saved)):
                tl.store(p_saved[k] + t * len(saved) + s, saved[s])


@triton.jit
def setup_term(column, CODE: tl.constexpr):
    """(gradient of the parameter, constants of the gradient)"""
    TERM: tl.constexpr = term_of(CODE)
    if TERM == L_INF:
        return range_losses.l_inf_setup(column)
    elif TERM == MARGIN:
        return range_losses.margin_setup(column)
    elif TERM == SOFT_MIN_MAX or TERM == FROZEN:  # noqa: SIM109
        return range_losses.soft_min_max_setup(column)
    elif TERM == KURE:
        return moments.kure_setup(column)
    elif TERM == BIN_REG:
        return regularizers.bin_reg_setup(column, bits_of(CODE))
    elif TERM == MSQE:
        return regularizers.msqe_setup(column)
    else:
        return regularizers.partial_l2_setup(column)


@triton.jit
def gradient_of_term(w, constants, CODE: tl.constexpr):
    TERM: tl.constexpr = term_of(CODE)
    if TERM == L_INF:
        return range_losses.l_inf_gradient(w, constants)
    elif TERM == MARGIN:
        return range_losses.margin_gradient(w, constants)
    elif TERM == SOFT_MIN_MAX or TERM == FROZEN:  # noqa: SIM109
        return range_losses.soft_min_max_gradient(w, constants)
    elif TERM == KURE:
        return moments.kure_gradient(w, constants)
    elif TERM == BIN_REG:
        return regularizers.bin_reg_gradient(w, constants, bits_of(CODE))
    elif TERM == MSQE:
        return regularizers.msqe_gradient(w, constants, bits_of(CODE))
    else:
        return regularizers.partial_l2_gradient(w, constants)


@triton.jit
def terms_gradient(w, constants, TERMS: tl.constexpr):
    """The sum of the gradients of all terms."""
    total = gradient_of_term(w, constants[0], TERMS[0])
    for k in tl.static_range(1, len(TERMS)):
        total += gradient_of_term(w, constants[k], TERMS[k])
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
    ADD: tl.constexpr,
    DT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program per chunk: the sum of the gradients of all terms; the first of a tensor stores those of the
    parameters."""
    t, c, start, n, run = chunk_of_program(tl.program_id(0), p_tensors, p_owner, n_chunk, 1)
    constants = ()
    for k in tl.static_range(len(TERMS)):
        parameter_gradient, its_constants = setup_term(
            Column(p_grads[k], 1, p_first[k], p_second[k], p_saved[k], t, t, n.to(ACC)), TERMS[k]
        )
        constants += (its_constants,)
        if p_parameter_gradients[k] is not None:
            tl.store(p_parameter_gradients[k] + t, parameter_gradient, mask=start == 0)
    if p_targets is not None:
        p = column_pointer(tensor_pointer(p_weights, t, DT, ALIGNED), c, start, run, 1)
        p_target = column_pointer(tensor_pointer(p_targets, t, DT, ALIGNED), c, start, run, 1)
        count = tl.minimum(n - start, n_chunk).to(tl.int32)
        map_rows_of_chunk(
            Rows(p, run, run, run, count, ACC, 1, False, BLOCK, UNROLL),
            Rows(p_target, run, run, run, count, ACC, 1, False, BLOCK, UNROLL),
            constants,
            terms_gradient,
            ADD,
            TERMS,
        )
