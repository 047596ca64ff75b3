"""How a program finds its chunk of a list of tensors, and where its results go; how a list is cut is told in
`lists.py`."""

import triton
import triton.language as tl

WARPS = 4
FIELDS = tl.constexpr(7)  # of a tensor, as `lists.Plan` has them:
N_ROWS, N_ELEMENTS, RUN, FIRST_CHUNK, OFFSET, N_COLUMNS, FIRST_COLUMN = [tl.constexpr(i) for i in range(7)]
SEGMENT = tl.constexpr(64)  # elements: results in a flat tensor start at its multiples, as `lists.SEGMENT` says
ALIGN = tl.constexpr(16)  # elements: a mask that changes only at its multiples leaves 128-bit accesses whole
PROPAGATE = tl.constexpr(tl.PropagateNan.ALL)
# Results go into one flat tensor, into the tensors of a table, or are added to those.
FLAT, TABLE, ADD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def tile_of_rows(itemsize, d=1, reads=1, interpreted=False):
    """(BLOCK, UNROLL): one 128-bit access a thread and block, four loads or more in flight, in all 4096 weights or
    less; fewer for gathers, whose addresses take registers. The interpreter's cost is per operation, so there a block
    is large."""
    if interpreted:
        return 2048, 2
    return 32 * WARPS * 16 // itemsize, 2 if d > 1 else (8 if itemsize == 4 and reads == 1 else 4) // reads


@triton.jit
def chunk_of_program(i, p_tensors, p_owner, n_chunk, D: tl.constexpr):
    """(tensor, column, first row, rows of the column, run) of chunk i."""
    t = tl.load(p_owner + i)
    p_tensor = p_tensors + t * FIELDS
    j = i - tl.load(p_tensor + FIRST_CHUNK)
    return t, (j % D).to(tl.int32), j // D * n_chunk, tl.load(p_tensor + N_ROWS), tl.load(p_tensor + RUN)


@triton.jit
def tensor_pointer(p_table, t, DT: tl.constexpr, ALIGNED: tl.constexpr, ALONE: tl.constexpr = False):
    """Of tensor t in a table of addresses; ALONE: p_table is the only tensor itself."""
    p = p_table if ALONE else tl.load(p_table + t).to(tl.pointer_type(DT))
    return tl.multiple_of(p, 16) if ALIGNED else p


@triton.jit
def target_of_tensor(p_targets, p_tensor, t, elements, TARGET: tl.constexpr, DT: tl.constexpr, ALIGNED: tl.constexpr):
    """(where the results of tensor t lie, where the gap behind them ends)"""
    if TARGET == FLAT:
        p_target = p_targets + tl.multiple_of(tl.load(p_tensor + OFFSET), SEGMENT)
        return p_target, (elements + SEGMENT - 1) // SEGMENT * SEGMENT
    else:
        return tensor_pointer(p_targets, t, DT, ALIGNED), elements


@triton.jit
def zero_gap(p, start, end):
    """Elements [start, end) of the results."""
    while start < end:
        o = start + tl.arange(0, SEGMENT)
        tl.store(p + o, tl.zeros([SEGMENT], p.dtype.element_ty), mask=o < end)
        start += SEGMENT
