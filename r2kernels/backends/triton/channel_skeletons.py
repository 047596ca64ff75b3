"""The skeletons of the quantizers: a map by channel that may leave sums of every chunk, and the merge of those sums."""

from typing import NamedTuple

import triton
import triton.language as tl

from .chunks import ALIGN, FIRST_CHUNK, FIRST_COLUMN, N_COLUMNS, N_ROWS, RUN, field, owner, tensor_pointer

# How the rows of a channel lie: it is the whole tensor; dense; in runs apart; so, and there may be more than 2^31 rows.
WHOLE, RUNS, SPREAD, HUGE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


class Span(NamedTuple):
    """The rows of a chunk in one tensor. Only ever built as an argument of a call, as `skeletons.Rows`."""

    p: tl.tensor  # of the first row; where they are spread, of the first row of the channel
    start: tl.tensor
    run: tl.tensor
    stride: tl.tensor  # between runs
    PLACE: tl.constexpr


@triton.jit
def element_addresses(span, i, o):
    """Of the rows i + o of a chunk."""
    if span.PLACE == WHOLE or span.PLACE == RUNS:
        return span.p + i + o
    else:
        k, run = span.start + i + o, span.run
        if span.PLACE == SPREAD:
            k, run = k.to(tl.uint32), run.to(tl.uint32)
        return span.p + (k // run).to(tl.int64) * span.stride + (k % run)


@triton.jit
def advance_pointer(p, by, ALIGNED: tl.constexpr):
    """`ALIGNED` promises that the chunk begins on a 128-bit boundary too."""
    p += by
    return tl.multiple_of(p, 16) if ALIGNED else p


@triton.jit
def channel_chunk_of_program(i, p_tensors, p_owner, n_chunk, PLACE: tl.constexpr):
    """Of chunk i: (tensor, channel, channels, first row, rows, run, elements before the first row of the chunk, or of
    the channel where that is spread)"""
    t = owner(p_owner, i)
    j, rows = i - field(p_tensors, t, FIRST_CHUNK), field(p_tensors, t, N_ROWS)
    run, columns = field(p_tensors, t, RUN), field(p_tensors, t, N_COLUMNS)
    if PLACE == WHOLE:
        return t, j * 0, columns, j * n_chunk, rows, run, j * n_chunk
    else:
        c, start = j % columns, j // columns * n_chunk
        return t, c, columns, start, rows, run, c * run + (start if PLACE == RUNS else 0)


@triton.jit
def load_with_incoming(xs, gs, i, o, m, WITH_G: tl.constexpr):
    """The elements of rows i + o, and the incoming gradients there in a backward."""
    x = tl.load(element_addresses(xs, i, o), mask=m)
    return x, tl.load(element_addresses(gs, i, o), mask=m) if WITH_G else x


@triton.jit
def store_result(
    ys,
    i,
    o,
    m,
    x,
    g,
    constants,
    sums,
    FORMULA: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    FLAG: tl.constexpr,
    ACC: tl.constexpr,
):
    """The formula of a block; the sums with its terms."""
    y, terms = FORMULA(x.to(ACC), g.to(ACC), constants, LOW, HIGH, FLAG)
    tl.store(element_addresses(ys, i, o), y.to(x.dtype), mask=m)
    kept = ()
    for s in tl.static_range(len(sums)):
        kept += (sums[s] + (terms[s] if m is None else tl.where(m, terms[s], 0)),)
    return kept


@triton.jit
def quantize_rows(
    xs,
    gs,
    ys,
    count,
    constants,
    sums,
    FORMULA: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    FLAG: tl.constexpr,
    WITH_G: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The formula of all rows of a chunk; its sums by lanes."""
    TILE: tl.constexpr = BLOCK * UNROLL
    o = tl.arange(0, BLOCK)
    i, n_wide = 0, count // ALIGN * ALIGN
    while i + TILE <= count:
        b_x, b_g = (), ()
        for u in tl.static_range(UNROLL):
            x, g = load_with_incoming(xs, gs, i, u * BLOCK + o, None, WITH_G)
            b_x, b_g = b_x + (x,), b_g + (g,)
        for u in tl.static_range(UNROLL):
            sums = store_result(
                ys, i, u * BLOCK + o, None, b_x[u], b_g[u], constants, sums, FORMULA, LOW, HIGH, FLAG, ACC
            )
        i += TILE
    while i < n_wide:
        m = i + o < n_wide
        x, g = load_with_incoming(xs, gs, i, o, m, WITH_G)
        sums = store_result(ys, i, o, m, x, g, constants, sums, FORMULA, LOW, HIGH, FLAG, ACC)
        i += BLOCK
    if n_wide < count:
        m_rest = n_wide + o < count
        x_rest, g_rest = load_with_incoming(xs, gs, n_wide, o, m_rest, WITH_G)
        sums = store_result(ys, n_wide, o, m_rest, x_rest, g_rest, constants, sums, FORMULA, LOW, HIGH, FLAG, ACC)
    return sums


@triton.jit
def quantize_chunks(
    p_xs,
    p_gs,
    p_ys,
    p_tensors,
    p_owner,
    p_parameters,
    p_sums,
    n_chunk,
    SETUP: tl.constexpr,
    FORMULA: tl.constexpr,
    SUMS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    FLAG: tl.constexpr,
    PLACE: tl.constexpr,
    DT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program per chunk: FORMULA of every element, to where the targets lie, and the chunk's sums."""
    i = tl.program_id(0)
    t, c, columns, start, n, run, before = channel_chunk_of_program(i, p_tensors, p_owner, n_chunk, PLACE)
    WITH_G: tl.constexpr = p_gs is not None
    p, p_y = tensor_pointer(p_xs, t, DT, ALIGNED), tensor_pointer(p_ys, t, DT, ALIGNED)
    p_g = tensor_pointer(p_gs, t, DT, ALIGNED) if WITH_G else p
    sums = ()
    for _ in tl.static_range(SUMS):
        sums += (tl.zeros([BLOCK], ACC),)
    stride = columns * run
    sums = quantize_rows(
        Span(advance_pointer(p, before, ALIGNED), start, run, stride, PLACE),
        Span(advance_pointer(p_g, before, ALIGNED), start, run, stride, PLACE),
        Span(advance_pointer(p_y, before, ALIGNED), start, run, stride, PLACE),
        tl.minimum(n - start, n_chunk).to(tl.int32),
        SETUP(p_parameters, field(p_tensors, t, FIRST_COLUMN) + c),
        sums,
        FORMULA,
        LOW,
        HIGH,
        FLAG,
        WITH_G,
        ACC,
        BLOCK,
        UNROLL,
    )
    for s in tl.static_range(SUMS):
        tl.store(p_sums + i.to(tl.int64) * SUMS + s, tl.sum(sums[s], 0))


@triton.jit
def quantize_columns(
    p_xs,
    p_gs,
    p_ys,
    p_tensors,
    p_owner,
    p_parameters,
    p_gradients,
    SETUP: tl.constexpr,
    FORMULA: tl.constexpr,
    FINISH: tl.constexpr,
    SUMS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    FLAG: tl.constexpr,
    DT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr,
    EACH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program for COLUMNS short channels of EACH numbers (WIDTH: the power of two above), one behind the other:
    FORMULA of every element, and the gradients of the channels' parameters."""
    i = tl.program_id(0)
    t = owner(p_owner, i)
    columns, first = field(p_tensors, t, N_COLUMNS), (i - field(p_tensors, t, FIRST_CHUNK)) * COLUMNS
    c, o = first + tl.arange(0, COLUMNS), tl.arange(0, WIDTH)
    m = (c < columns)[:, None] if EACH == WIDTH else (c < columns)[:, None] & (o < EACH)[None, :]
    at = (first * EACH) + (tl.arange(0, COLUMNS) * EACH)[:, None] + o[None, :]
    x = tl.load(tensor_pointer(p_xs, t, DT, ALIGNED) + at, mask=m)
    g = x if p_gs is None else tl.load(tensor_pointer(p_gs, t, DT, ALIGNED) + at, mask=m)
    column = field(p_tensors, t, FIRST_COLUMN) + tl.minimum(c, columns - 1)
    y, terms = FORMULA(x.to(ACC), g.to(ACC), SETUP(p_parameters, column[:, None]), LOW, HIGH, FLAG)
    tl.store(tensor_pointer(p_ys, t, DT, ALIGNED) + at, y.to(DT), mask=m)
    if SUMS > 0:
        totals = ()
        for s in tl.static_range(SUMS):
            totals += (tl.sum(tl.where(m, terms[s], 0), 1).to(tl.float64),)
        gradients = FINISH(totals, p_parameters, column, c < columns, field(p_tensors, t, N_ROWS).to(tl.float64), HIGH)
        for s in tl.static_range(len(p_gradients)):
            tl.store(p_gradients[s] + column, gradients[s], mask=c < columns)


@triton.jit
def merge_columns(
    p_sums,
    p_tensors,
    p_parameters,
    p_gradients,
    n_chunk,
    FINISH: tl.constexpr,
    SUMS: tl.constexpr,
    HIGH: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Program (t, j): from the sums of their chunks, in float64 and in a fixed order, the gradients of the parameters
    of a few channels of tensor t."""
    t = tl.program_id(0).to(tl.int64)
    rows, first = field(p_tensors, t, N_ROWS), field(p_tensors, t, FIRST_CHUNK)
    columns, first_column = field(p_tensors, t, N_COLUMNS), field(p_tensors, t, FIRST_COLUMN)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = c < columns
    sums = ()
    for _ in tl.static_range(SUMS):
        sums += (tl.zeros([LANES, COLUMNS], tl.float64),)
    j = tl.arange(0, LANES).to(tl.int64)
    while tl.min(j, 0) * n_chunk < rows:
        m = (j * n_chunk < rows)[:, None] & m_c[None, :]
        p = p_sums + ((first + j * columns)[:, None] + c[None, :]) * SUMS
        more = ()
        for s in tl.static_range(SUMS):
            more += (sums[s] + tl.load(p + s, mask=m, other=0).to(tl.float64),)
        sums = more
        j += LANES
    totals = ()
    for s in tl.static_range(SUMS):
        totals += (tl.sum(sums[s], 0),)
    gradients = FINISH(totals, p_parameters, first_column + c, m_c, rows.to(tl.float64), HIGH)
    for s in tl.static_range(len(p_gradients)):
        tl.store(p_gradients[s] + first_column + c, gradients[s], mask=m_c)
