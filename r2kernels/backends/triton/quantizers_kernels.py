"""LSQ, EWGS, PACT and DoReFa: a map of the list that may leave sums of every chunk, the merge of those sums, and DoReFa's correction.

An op is SETUP(parameters, column), the numbers that a column needs; a formula (x, g, constants) -> (result, terms of its sums); and FINISH, the gradients
of its parameters. Codes equal the reference's to the bit: quotients are IEEE's, no product is fused with a sum but by `tl.fma` (the launchers turn
`enable_fp_fusion` off), and what is rounded is within 2^22, where adding 1.5 * 2^23 leaves the nearest integer, half to even.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .skeletons import ALIGN, FIELDS, FLAT, PROPAGATE, SEGMENT, WARPS, clear

WHOLE, RUNS, SPREAD, HUGE = (
    tl.constexpr(0),
    tl.constexpr(1),
    tl.constexpr(2),
    tl.constexpr(3),
)  # a channel: the tensor; dense; neither; rows past 2^31
LOG2E = tl.constexpr(1.4426950408889634)
FUSES = tl.constexpr(not triton.knobs.runtime.interpret)  # whether tl.fma rounds once


class Span(NamedTuple):
    """The rows of a chunk in one tensor. Only ever built as an argument of a call, as common.Rows."""

    p: tl.tensor  # of the first row; where they are spread, of the first row of the channel
    start: tl.tensor
    run: tl.tensor
    stride: tl.tensor  # between runs
    PLACE: tl.constexpr


def tile(itemsize, reads, interpreted=False):
    """(BLOCK, UNROLL): one 128-bit access a thread and block, and four loads or more in flight."""
    if interpreted:
        return 2048, 2
    return 32 * WARPS * 16 // itemsize, (8 if itemsize == 4 and reads == 1 else 4) // reads


@triton.jit
def place(span, i, o):
    """Of the rows i + o."""
    if span.PLACE == WHOLE or span.PLACE == RUNS:
        return span.p + i + o
    else:
        k, run = span.start + i + o, span.run
        if span.PLACE == SPREAD:
            k, run = k.to(tl.uint32), run.to(tl.uint32)
        return span.p + (k // run).to(tl.int64) * span.stride + (k % run)


@triton.jit
def moved(p, by, ALIGNED: tl.constexpr):
    p += by
    return tl.multiple_of(p, 16) if ALIGNED else p


@triton.jit
def base(p_table, t, ALONE: tl.constexpr, DT: tl.constexpr, ALIGNED: tl.constexpr):
    """Of tensor t in a table of addresses; ALONE: of the only one."""
    p = p_table if ALONE else tl.load(p_table + t).to(tl.pointer_type(DT))
    return tl.multiple_of(p, 16) if ALIGNED else p


@triton.jit
def target(p_targets, p_t, t, TARGET: tl.constexpr, DT: tl.constexpr, ALIGNED: tl.constexpr):
    """(where the results of tensor t lie, where the gap behind them ends)"""
    numel = tl.load(p_t + 1)
    if TARGET == FLAT:
        return p_targets + tl.multiple_of(tl.load(p_t + 4), SEGMENT), (numel + SEGMENT - 1) // SEGMENT * SEGMENT
    else:
        return base(p_targets, t, False, DT, ALIGNED), numel


@triton.jit
def chunk(i, p_tensors, p_owner, n_chunk, PLACE: tl.constexpr):
    """(tensor, its fields, channel, channels, first row, rows, run, elements before the chunk's first row or its channel)"""
    t = tl.load(p_owner + i)
    p_t = p_tensors + t * FIELDS
    j, rows, run, columns = i - tl.load(p_t + 3), tl.load(p_t), tl.load(p_t + 2), tl.load(p_t + 5)
    if PLACE == WHOLE:
        return t, p_t, j * 0, columns, j * n_chunk, rows, run, j * n_chunk
    else:
        c, start = j % columns, j // columns * n_chunk
        return t, p_t, c, columns, start, rows, run, c * run + (start if PLACE == RUNS else 0)


@triton.jit
def read(xs, gs, i, o, m, WITH_G: tl.constexpr):
    x = tl.load(place(xs, i, o), mask=m)
    return x, tl.load(place(gs, i, o), mask=m) if WITH_G else x


@triton.jit
def write(
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
    y, terms = FORMULA(x.to(ACC), g.to(ACC), constants, LOW, HIGH, FLAG)
    tl.store(place(ys, i, o), y.to(x.dtype), mask=m)
    kept = ()
    for s in tl.static_range(len(sums)):
        kept += (sums[s] + (terms[s] if m is None else tl.where(m, terms[s], 0)),)
    return kept


@triton.jit
def each(
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
            x, g = read(xs, gs, i, u * BLOCK + o, None, WITH_G)
            b_x, b_g = b_x + (x,), b_g + (g,)
        for u in tl.static_range(UNROLL):
            sums = write(ys, i, u * BLOCK + o, None, b_x[u], b_g[u], constants, sums, FORMULA, LOW, HIGH, FLAG, ACC)
        i += TILE
    while i < n_wide:
        m = i + o < n_wide
        x, g = read(xs, gs, i, o, m, WITH_G)
        sums = write(ys, i, o, m, x, g, constants, sums, FORMULA, LOW, HIGH, FLAG, ACC)
        i += BLOCK
    if n_wide < count:
        m_rest = n_wide + o < count
        x_rest, g_rest = read(xs, gs, n_wide, o, m_rest, WITH_G)
        sums = write(ys, n_wide, o, m_rest, x_rest, g_rest, constants, sums, FORMULA, LOW, HIGH, FLAG, ACC)
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
    TARGET: tl.constexpr,
    ALONE: tl.constexpr,
    PLACE: tl.constexpr,
    DT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program per chunk: FORMULA of every element, to where the targets lie, and the chunk's sums."""
    i = tl.program_id(0)
    t, p_t, c, columns, start, n, run, before = chunk(i, p_tensors, p_owner, n_chunk, PLACE)
    WITH_G: tl.constexpr = p_gs is not None
    p = base(p_xs, t, ALONE, DT, ALIGNED)
    p_y, end = target(p_ys, p_t, t, TARGET, DT, ALIGNED)
    p_g = base(p_gs, t, ALONE, DT, ALIGNED) if WITH_G else p
    sums = ()
    for _ in tl.static_range(SUMS):
        sums += (tl.zeros([BLOCK], ACC),)
    stride = columns * run
    sums = each(
        Span(moved(p, before, ALIGNED), start, run, stride, PLACE),
        Span(moved(p_g, before, ALIGNED), start, run, stride, PLACE),
        Span(moved(p_y, before, ALIGNED), start, run, stride, PLACE),
        tl.minimum(n - start, n_chunk).to(tl.int32),
        SETUP(p_parameters, tl.load(p_t + 6) + c),
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
    if (c == columns - 1) & (start + n_chunk >= n):
        clear(p_y, n * columns, end)


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
    """Program (t, j): from the sums of their chunks, in float64 and in a fixed order, the gradients of the parameters of a few channels of tensor t."""
    p_t = p_tensors + tl.program_id(0).to(tl.int64) * FIELDS
    rows, first, columns, at = tl.load(p_t), tl.load(p_t + 3), tl.load(p_t + 5), tl.load(p_t + 6)
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
    gradients = FINISH(totals, p_parameters, at + c, m_c, rows.to(tl.float64), HIGH)
    for s in tl.static_range(len(p_gradients)):
        tl.store(p_gradients[s] + at + c, gradients[s], mask=m_c)


@triton.jit
def divide(a, b):
    """As IEEE 754 has it; `/` of float32 is not."""
    if a.dtype.is_fp64():
        return a / b
    else:
        return tl.math.div_rn(a, b)


@triton.jit
def share(c, HIGH: tl.constexpr):
    """c / HIGH for an integer c of at most HIGH = 2^bits - 1: a corrected product is the IEEE quotient for all of them."""
    if FUSES:
        q = c * (1 / HIGH)
        return tl.fma(tl.fma(q, 0 - HIGH, c), 1 / HIGH, q)
    else:
        return divide(c, tl.full([], HIGH, c.dtype))


@triton.jit
def nearest(v):
    """The nearest integer, half to even, with the sign of v; |v| < 2^22."""
    if v.dtype.is_fp64():
        r = (v + 6755399441055744.0) - 6755399441055744.0
        return (r.to(tl.int64, bitcast=True) | (v.to(tl.int64, bitcast=True) & -9223372036854775808)).to(
            tl.float64, bitcast=True
        )
    else:
        r = (v + 12582912.0) - 12582912.0
        return (r.to(tl.int32, bitcast=True) | (v.to(tl.int32, bitcast=True) & -2147483648)).to(
            tl.float32, bitcast=True
        )


@triton.jit
def clip(v, low, high):
    return tl.minimum(tl.maximum(v, low, PROPAGATE), high, PROPAGATE)


@triton.jit
def positive(p):
    return tl.where(p > 0, p, float("nan"))


@triton.jit
def sign_or_one(v):
    """+1 for 0, NaN for NaN"""
    return tl.where(v < 0, -1.0, tl.where(v >= 0, 1.0, v))


@triton.jit
def code(v, LOW: tl.constexpr, HIGH: tl.constexpr):
    """LSQ's code of v = x / step. Only one signed bit has LOW = 1."""
    return sign_or_one(v) if LOW == 1 else nearest(clip(v, 0 - LOW, HIGH))


@triton.jit
def lsq_setup(p_parameters, column):
    return (positive(tl.load(p_parameters[0] + column)),)


@triton.jit
def lsq_fwd(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, FLAG: tl.constexpr):
    return constants[0] * code(divide(x, constants[0]), LOW, HIGH), ()


@triton.jit
def lsq_bwd(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, FLAG: tl.constexpr):
    v = divide(x, constants[0])
    below, above = v < -LOW, v > HIGH
    slope = tl.where(below, -LOW, tl.where(above, HIGH, code(v, LOW, HIGH) - v))
    return tl.where(below | above, 0, g), (g * slope,)


@triton.jit
def lsq_finish(sums, p_parameters, column, m, rows, HIGH: tl.constexpr):
    return (sums[0] / tl.sqrt(rows * HIGH),)


@triton.jit
def ewgs_setup(p_parameters, column):
    lower, upper = tl.load(p_parameters[0] + column), tl.load(p_parameters[1] + column)
    span = positive(upper - lower)
    return lower, span, 1 / span, tl.load(p_parameters[2] + column)


@triton.jit
def ewgs_fwd(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, SIGNED: tl.constexpr):
    lower, span, _, _ = constants
    c = nearest(clip(divide(x - lower, span), 0.0, 1.0) * HIGH)
    return share(2 * c - HIGH if SIGNED else c, HIGH), ()


@triton.jit
def ewgs_bwd(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, SIGNED: tl.constexpr):
    lower, span, inverse, delta = constants
    v = divide(x - lower, span)
    clipped = clip(v, 0.0, 1.0)
    g = 2 * g if SIGNED else g
    off = tl.fma(nearest(clipped * HIGH), -1 / HIGH, clipped)
    g = tl.where((v < 0) | (v > 1), 0, tl.fma(delta * tl.abs(g), off, g))
    return g * inverse, (g * (v - 1), g * v)


@triton.jit
def ewgs_finish(sums, p_parameters, column, m, rows, HIGH: tl.constexpr):
    span = positive(tl.load(p_parameters[1] + column, mask=m) - tl.load(p_parameters[0] + column, mask=m)).to(
        tl.float64
    )
    return sums[0] / span, -sums[1] / span


@triton.jit
def pact_setup(p_parameters, column):
    return (positive(tl.load(p_parameters[0] + column)),)


@triton.jit
def pact_fwd(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, PLUS: tl.constexpr):
    a = constants[0]
    s = divide(a, tl.full([], HIGH, x.dtype))
    return s * nearest(divide(tl.where(x >= a, a, tl.where(x < 0, 0, x)), s)), ()


@triton.jit
def pact_bwd(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, PLUS: tl.constexpr):
    a = constants[0]
    above, below = x >= a, x < 0
    inside = tl.zeros_like(x)
    if PLUS:
        z = divide(x, divide(a, tl.full([], HIGH, x.dtype)))
        inside = (nearest(z) - z) * (1 / HIGH)
    return tl.where(above | below, 0, g), (g * tl.where(above, 1, tl.where(below, 0, inside)),)


@triton.jit
def pact_finish(sums, p_parameters, column, m, rows, HIGH: tl.constexpr):
    return (sums[0],)


@triton.jit
def tanh(x):
    """To about an ulp: by a polynomial where |x| < 0.75, which interpolates tanh(x) / x - 1 at the zeros of a Chebyshev polynomial in x^2."""
    u, a = x * x, tl.abs(x)
    if x.dtype.is_fp64():
        p = tl.fma(u, -1.6408599646831442e-06, 1.0048053928129499e-05)
        p = tl.fma(u, tl.fma(u, tl.fma(u, p, -3.4494724699982165e-05), 9.42476297649358e-05), -0.00023809406936979282)
        p = tl.fma(u, tl.fma(u, tl.fma(u, p, 0.0005897469986953327), -0.0014557818253310693), 0.0035921213885060418)
        p = tl.fma(u, tl.fma(u, tl.fma(u, p, -0.008863234987439102), 0.021869488509711037), -0.05396825396758208)
        p = tl.fma(u, tl.fma(u, p, 0.13333333333332661), -0.3333333333333333)
    else:
        p = tl.fma(u, tl.fma(u, 0.0019095024520666551, -0.007933807623248752), 0.021615318898138572)
        p = tl.fma(u, tl.fma(u, tl.fma(u, p, -0.05393585355058975), 0.13333179635256998), -0.3333333213635708)
    far = 1 - 2 / (tl.exp2(a * (2 * LOG2E)) + 1)
    return tl.where(a < 0.75, tl.fma(x, u * p, x), tl.where(x < 0, -far, far))


@triton.jit
def dorefa_setup(p_parameters, column):
    """(max|w|, m, 1 / m)"""
    top = tl.load(p_parameters[0] + 2 * column)
    m = tanh(top)
    m = tl.where(m == 0, 1, m)
    return top, m, 1 / m


@triton.jit
def dorefa_fwd(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, FLAG: tl.constexpr):
    _, m, _ = constants
    c = nearest((divide(tanh(x), 2 * m) + 0.5) * HIGH)
    return share(2 * c - HIGH, HIGH), ()


@triton.jit
def dorefa_bwd(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, FLAG: tl.constexpr):
    top, _, inverse = constants
    t = tanh(x)
    return g * ((1 - t) * (1 + t)) * inverse, (g * t, tl.where(tl.abs(x) == top, 1.0, 0.0))


@triton.jit
def dorefa_detached(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, FLAG: tl.constexpr):
    t = tanh(x)
    return g * ((1 - t) * (1 + t)) * constants[2], ()


@triton.jit
def mean_setup(p_parameters, column):
    return (tl.load(p_parameters[0] + 2 * column),)


@triton.jit
def sign_fwd(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, FLAG: tl.constexpr):
    return sign_or_one(x) * constants[0], ()


@triton.jit
def sign_bwd(x, g, constants, LOW: tl.constexpr, HIGH: tl.constexpr, FLAG: tl.constexpr):
    return g, ()


@triton.jit
def correct_maxima(
    p_xs,
    p_gs,
    p_ys,
    p_tensors,
    p_owner,
    p_parameters,
    p_sums,
    n_chunk,
    TARGET: tl.constexpr,
    ALONE: tl.constexpr,
    DT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program per chunk: DoReFa's gradient where |x| is the maximum, less what comes through it. Most chunks have none, and nothing to do."""
    i = tl.program_id(0)
    if tl.load(p_sums + i.to(tl.int64) * 2 + 1) > 0:
        t, p_t, _, _, start, n, _, _ = chunk(i, p_tensors, p_owner, n_chunk, WHOLE)
        total, j = tl.zeros([LANES], tl.float64), tl.arange(0, LANES).to(tl.int64)
        while tl.min(j, 0) * n_chunk < n:
            total += tl.load(p_sums + (tl.load(p_t + 3) + j) * 2, mask=j * n_chunk < n, other=0).to(tl.float64)
            j += LANES
        top, _, inverse = dorefa_setup(p_parameters, t)
        through = (tl.sum(total, 0) * inverse * inverse / tl.load(p_parameters[0] + 2 * t + 1)).to(ACC)
        p, p_g = base(p_xs, t, ALONE, DT, ALIGNED), base(p_gs, t, ALONE, DT, ALIGNED)
        p_y, _ = target(p_ys, p_t, t, TARGET, DT, ALIGNED)
        end, k = tl.minimum(start + n_chunk, n), start + tl.arange(0, BLOCK)
        while tl.min(k, 0) < end:
            x = tl.load(p + k, mask=k < end, other=0).to(ACC)
            m_top = (k < end) & (tl.abs(x) == top)
            g = tl.load(p_g + k, mask=m_top, other=0).to(ACC)
            tanh_x = tanh(x)
            slope = (1 - tanh_x) * (1 + tanh_x)
            sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))
            tl.store(p_y + k, (g * slope * inverse - sign * slope * through).to(DT), mask=m_top)
            k += BLOCK
