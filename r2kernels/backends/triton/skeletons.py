"""The skeletons: reduce a list of tensors to a state per chunk, merge the states of each tensor, map the list.

A loss is its `Formula`, functions that the kernels take as `tl.constexpr`. Nothing here imports torch. Loops over
runtime values are `while`: the interpreter of Triton 3.6 cannot run them as `range`.
"""

from collections.abc import Callable
from typing import NamedTuple

import triton
import triton.language as tl

from .chunks import ALIGN, FIRST_CHUNK, N_ELEMENTS, chunk_of_program, field, jit, tensor_pointer, zero_leftovers

MERGE_LANES = 512  # states per step of a merge,
LAST_LANES = 128  # and of one by the last program, whose registers are those of all
STATE = tl.constexpr(8)  # numbers in the state of a chunk


class Formula(NamedTuple):
    """A loss as the skeletons take it."""

    reduce: Callable  # (rows, p_first, column) -> state of a chunk
    merge: Callable  # (states, p_first, p_second, column) -> (losses, saved)
    setup: Callable | None = None  # (Column) -> (gradient of the parameter, constants)
    gradient: Callable | None = None  # (weights, constants) -> gradients
    reduce_frozen: Callable | None = None  # instead of `reduce`, where the parameter learns nothing
    losses: int = 1  # of a column: 1 is summed over the columns of a tensor


class Rows(NamedTuple):
    """The rows of a chunk. Only ever built as an argument: assigned to a name, its constants would become tensors."""

    p: tl.tensor  # of the first row where D is 1, else of the first row of the column
    start: tl.tensor  # first row
    count: tl.tensor
    run: tl.tensor
    ACC: tl.constexpr  # dtype of the sums
    D: tl.constexpr  # columns
    PAIRED: tl.constexpr  # two 16-bit weights are read as one int32
    BLOCK: tl.constexpr  # lanes
    UNROLL: tl.constexpr  # blocks in flight


class States(NamedTuple):
    """The states of a column's chunks."""

    p: tl.tensor
    rows: tl.tensor  # of the column
    chunk: tl.tensor  # rows in a full chunk
    ACC: tl.constexpr
    D: tl.constexpr
    LANES: tl.constexpr


class Column(NamedTuple):
    """What the gradient of a column comes from: gradient of the losses, parameters, what the forward saved."""

    p_grad: tl.tensor
    grad_stride: tl.tensor  # per tensor; between the planes where there are two losses
    p_first: tl.tensor
    p_second: tl.tensor
    p_saved: tl.tensor
    tensor: tl.tensor
    i: tl.tensor  # of all columns of all tensors
    rows: tl.tensor  # as a number of the accumulator's dtype


@triton.jit
def column_pointer(p, c, start, run, D: tl.constexpr):
    """`Rows.p` of column c, in the tensor at p."""
    return p + (start if D == 1 else c * run)


@triton.jit
def row_addresses(rows, i, o):
    """Of the rows i + o of a chunk; i apart, so that the o of unrolled blocks become immediate offsets."""
    if rows.D == 1:
        return rows.p + i + o
    else:
        k = rows.start + i + o
        return rows.p + (k // rows.run * (rows.D * rows.run) + k % rows.run)


@triton.jit
def keep_where(m, new, old):
    """The numbers of a state, `new` in the lanes of m."""
    kept = ()
    for s in tl.static_range(len(old)):
        kept += (tl.where(m, new[s], old[s]),)
    return kept


@triton.jit
def sum_blocks(blocks):
    """The sum over the lanes of every block."""
    sums = ()
    for s in tl.static_range(len(blocks)):
        sums += (tl.sum(blocks[s], 0),)
    return sums


@triton.jit
def max_or_nan(b):
    return tl.where(tl.max((b != b).to(tl.int32), 0) > 0, float("nan"), tl.max(b, 0))


@triton.jit
def zero_block(rows):
    return tl.zeros([rows.BLOCK], rows.ACC)


@triton.jit
def first_block(rows):
    """The first weights of a chunk; a short chunk is filled up with its first weight."""
    o = tl.arange(0, rows.BLOCK)
    b_w = tl.load(
        row_addresses(rows, 0, o), mask=o < rows.count // ALIGN * ALIGN, other=tl.load(row_addresses(rows, 0, 0))
    )
    return b_w.to(rows.ACC)


@triton.jit
def unpack_halves(x, DT: tl.constexpr):
    """The two 16-bit weights in an int32: half the lanes, so half the registers of a state; and one instruction for a
    weight of bfloat16, not 1.5."""
    if DT.is_bf16():
        return (x << 16).to(tl.float32, bitcast=True), (x & -65536).to(tl.float32, bitcast=True)
    else:
        low = x.to(tl.int16).to(DT, bitcast=True).to(tl.float32)
        return low, (x >> 16).to(tl.int16).to(DT, bitcast=True).to(tl.float32)


@triton.jit
def load_blocks(rows, i, o, m, PAIRED: tl.constexpr):
    """The weights of rows i + o, or of 2 (i + o) and the next, as a tuple of blocks."""
    if PAIRED:
        return unpack_halves(tl.load(rows.p.to(tl.pointer_type(tl.int32)) + i + o, mask=m), rows.p.dtype.element_ty)
    else:
        return (tl.load(row_addresses(rows, i, o), mask=m).to(rows.ACC),)


@triton.jit
def apply_step(b_w, constants, state, STEP: tl.constexpr, WITH: tl.constexpr):
    """A set of terms is one formula for all; WITH tells it which they are."""
    if WITH is None:
        return STEP(b_w, constants, state)
    else:
        return STEP(b_w, constants, state, WITH)


@triton.jit
def fold_rows(rows, constants, state, STEP: tl.constexpr, WITH: tl.constexpr = None):
    """state = STEP(blocks of weights, constants, state) over the rows of a chunk; every number of the state is a block
    of lanes. WITH, if any, goes last."""
    PACK: tl.constexpr = 2 if rows.PAIRED else 1
    TILE: tl.constexpr = rows.BLOCK * rows.UNROLL
    o = tl.arange(0, rows.BLOCK)
    i, n_wide = 0, rows.count // ALIGN * ALIGN // PACK
    while i + TILE <= n_wide:
        b_w = ()
        for u in tl.static_range(rows.UNROLL):
            b_w += load_blocks(rows, i, u * rows.BLOCK + o, None, rows.PAIRED)
        state = apply_step(b_w, constants, state, STEP, WITH)
        i += TILE
    while i < n_wide:
        m = i + o < n_wide
        state = keep_where(m, apply_step(load_blocks(rows, i, o, m, rows.PAIRED), constants, state, STEP, WITH), state)
        i += rows.BLOCK
    n_wide *= PACK
    if n_wide < rows.count:
        m = n_wide + o < rows.count
        state = keep_where(m, apply_step(load_blocks(rows, n_wide, o, m, False), constants, state, STEP, WITH), state)
    return state


@triton.jit
def fold_states(states, constants, sums, STEP: tl.constexpr):
    """sums = STEP(state, rows of the chunk, constants, sums) over the chunks of a column, in a fixed order."""
    j = tl.arange(0, states.LANES).to(tl.int64)
    while tl.min(j, 0) * states.chunk < states.rows:
        m = j * states.chunk < states.rows
        state = ()
        for s in tl.static_range(STATE):
            state += (tl.load(states.p + j * (states.D * STATE) + s, mask=m, other=0, cache_modifier=".cg"),)
        n = tl.minimum(states.rows - j * states.chunk, states.chunk).to(tl.float64)
        sums = keep_where(m, STEP(state, n, constants, sums), sums)
        j += states.LANES
    return sums


@triton.jit
def add_two_step(state, rows, constants, sums):
    return sums[0] + state[0].to(tl.float64), sums[1] + state[1].to(tl.float64)


@triton.jit
def sums_of_column(states):
    """The first two numbers of the states, summed over the chunks."""
    zero = tl.zeros([states.LANES], tl.float64)
    return sum_blocks(fold_states(states, (), (zero, zero), add_two_step))


@triton.jit
def is_last(p_counters, t, parts):
    """Whether the programs of all other parts of tensor t have stored what they found. The counter is ready for the
    next launch then."""
    last = tl.atomic_add(p_counters + t, 1, sem="acq_rel") == parts - 1
    if last:
        tl.store(p_counters + t, 0)
    return last


@triton.jit
def merge_tensor(
    p_states,
    p_first,
    p_second,
    p_loss,
    p_saved,
    t,
    count,
    n,
    first_chunk,
    n_chunk,
    MERGE: tl.constexpr,
    LOSSES: tl.constexpr,
    ACC: tl.constexpr,
    D: tl.constexpr,
    LANES: tl.constexpr,
):
    """MERGE(states, parameters, column) gives the losses of a column of tensor t and what is saved of it.

    One loss is summed over the columns, two are stored for every column, in a plane each.
    """
    total = tl.full([], 0, tl.float64)
    c = 0
    while c < D:
        column = t * D + c
        p = p_states + (first_chunk + c) * STATE
        losses, saved = MERGE(States(p, n, n_chunk, ACC, D, LANES), p_first, p_second, column)
        if LOSSES == 1:
            total += losses[0]
        else:
            for s in tl.static_range(LOSSES):
                tl.store(p_loss + s * count * D + column, losses[s])
        for s in tl.static_range(len(saved)):
            tl.store(p_saved + column * len(saved) + s, saved[s])
        c += 1
    if LOSSES == 1:
        tl.store(p_loss + t, total)


@jit
def reduce_list(
    p_weights,
    p_tensors,
    p_owner,
    p_first,
    p_second,
    p_states,
    p_loss,
    p_saved,
    p_counters,
    n_chunk,
    n_tensors,
    REDUCE: tl.constexpr,
    MERGE: tl.constexpr,
    LOSSES: tl.constexpr,
    DT: tl.constexpr,
    ACC: tl.constexpr,
    D: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program per chunk: REDUCE(rows, parameters, column) gives its state. The last one of a tensor merges them."""
    i = tl.program_id(0)
    t, c, start, n, run = chunk_of_program(i, p_tensors, p_owner, n_chunk, D)
    p = column_pointer(tensor_pointer(p_weights, t, DT, ALIGNED), c, start, run, D)
    count = tl.minimum(n - start, n_chunk).to(tl.int32)
    HALF: tl.constexpr = DT.primitive_bitwidth == 16
    state = REDUCE(
        Rows(p, start, count, run, ACC, D, HALF and ALIGNED and D == 1, BLOCK // 2 if HALF else BLOCK, UNROLL),
        p_first,
        t * D + c,
    )
    p_state = p_states + i.to(tl.int64) * STATE
    for s in tl.static_range(len(state)):
        tl.store(p_state + s, state[s])
    if is_last(p_counters, t, tl.cdiv(n, n_chunk) * D):
        first = field(p_tensors, t, FIRST_CHUNK)
        merge_tensor(
            p_states, p_first, p_second, p_loss, p_saved, t, n_tensors, n, first, n_chunk, MERGE, LOSSES, ACC, D, LANES
        )


@triton.jit
def load_with_old(rows, targets, i, o, m, ADD: tl.constexpr):
    """The weights of rows i + o, and the gradients there if they are added to."""
    w = tl.load(row_addresses(rows, i, o), mask=m)
    return w, tl.load(row_addresses(targets, i, o), mask=m) if ADD else w


@triton.jit
def store_gradient(targets, i, o, m, w, old, constants, GRADIENT: tl.constexpr, ADD: tl.constexpr, WITH: tl.constexpr):
    """The gradients of weights w, added to the old ones where ADD says so."""
    g = GRADIENT(w.to(targets.ACC), constants) if WITH is None else GRADIENT(w.to(targets.ACC), constants, WITH)
    if ADD:
        g += old.to(targets.ACC)
    tl.store(row_addresses(targets, i, o), g.to(w.dtype), mask=m)


@triton.jit
def map_rows_of_chunk(rows, targets, constants, GRADIENT: tl.constexpr, ADD: tl.constexpr, WITH: tl.constexpr = None):
    """GRADIENT(weights, constants) of all rows of a chunk, to the same rows of `targets`. WITH, if any, goes last."""
    TILE: tl.constexpr = rows.BLOCK * rows.UNROLL
    o = tl.arange(0, rows.BLOCK)
    i, n_wide = 0, rows.count // ALIGN * ALIGN
    while i + TILE <= rows.count:
        b_w, b_old = (), ()
        for u in tl.static_range(rows.UNROLL):
            w, old = load_with_old(rows, targets, i, u * rows.BLOCK + o, None, ADD)
            b_w, b_old = b_w + (w,), b_old + (old,)
        for u in tl.static_range(rows.UNROLL):
            store_gradient(targets, i, u * rows.BLOCK + o, None, b_w[u], b_old[u], constants, GRADIENT, ADD, WITH)
        i += TILE
    while i < n_wide:
        m = i + o < n_wide
        w, old = load_with_old(rows, targets, i, o, m, ADD)
        store_gradient(targets, i, o, m, w, old, constants, GRADIENT, ADD, WITH)
        i += rows.BLOCK
    if n_wide < rows.count:
        o_rest = tl.arange(0, ALIGN)
        m_rest = n_wide + o_rest < rows.count
        w_rest, old_rest = load_with_old(rows, targets, n_wide, o_rest, m_rest, ADD)
        store_gradient(targets, n_wide, o_rest, m_rest, w_rest, old_rest, constants, GRADIENT, ADD, WITH)


@triton.jit
def gradient_of_loss(column):
    """Of the loss that all columns of a tensor share."""
    return tl.load(column.p_grad + column.tensor * column.grad_stride)


@jit
def map_chunks(
    p_weights,
    p_targets,
    p_tensors,
    p_owner,
    p_grad,
    grad_stride,
    p_first,
    p_second,
    p_saved,
    p_parameter_gradient,
    n_chunk,
    SETUP: tl.constexpr,
    GRADIENT: tl.constexpr,
    ADD: tl.constexpr,
    DT: tl.constexpr,
    ACC: tl.constexpr,
    D: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program per chunk: SETUP(column) gives the gradient of its parameter and the constants of GRADIENT.

    The gradient of what belongs to no column is 0. Without targets the gradient of the parameter is all.
    """
    t, c, start, n, run = chunk_of_program(tl.program_id(0), p_tensors, p_owner, n_chunk, D)
    column = t * D + c
    parameter_gradient, constants = SETUP(Column(p_grad, grad_stride, p_first, p_second, p_saved, t, column, n.to(ACC)))
    if p_parameter_gradient is not None:
        tl.store(p_parameter_gradient + column, parameter_gradient, mask=start == 0)
    if p_targets is not None:
        p = column_pointer(tensor_pointer(p_weights, t, DT, ALIGNED), c, start, run, D)
        p_target = tensor_pointer(p_targets, t, DT, ALIGNED)
        count = tl.minimum(n - start, n_chunk).to(tl.int32)
        map_rows_of_chunk(
            Rows(p, start, count, run, ACC, D, False, BLOCK, UNROLL),
            Rows(column_pointer(p_target, c, start, run, D), start, count, run, ACC, D, False, BLOCK, UNROLL),
            constants,
            GRADIENT,
            ADD,
        )
        if D > 1 and not ADD and (c == D - 1) & (start + n_chunk >= n):
            zero_leftovers(p_target, n * D, field(p_tensors, t, N_ELEMENTS))
