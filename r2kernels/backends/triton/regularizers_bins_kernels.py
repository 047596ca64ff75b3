"""The forward of bin_reg: of every bin the weights in it and their squared errors, by comparing each weight with each
bin, for Triton cannot scatter. No atomics of floating-point numbers, so sums have a fixed order."""

import triton
import triton.language as tl

from .chunks import FIRST_CHUNK, N_ROWS, chunk_of_program, field, tensor_pointer
from .regularizers_kernels import bin_of, error_and_code, is_wanting, step_and_unit, wider_unit
from .skeletons import Rows, fold_rows, sum_blocks, zero_block

LANES = 128  # weights at once: one of each thread
UNROLL = 4
MERGED = 2048  # counts, and as many sums, of a step of the merge


def bins_of_program(bits, itemsize):
    """So many that their counts and sums stay in registers."""
    return min(2**bits, 16 if itemsize == 8 else 32)


@triton.jit
def bins_step(b_w, constants, state, BITS: tl.constexpr):
    """Counts of some bins, then the sums of squared errors in them."""
    step, inverse, first = constants
    BINS: tl.constexpr = len(state) // 2
    for u in tl.static_range(len(b_w)):
        error, c = error_and_code(b_w[u], step, BITS)
        error *= inverse
        squared, at = error * error, bin_of(c, BITS) - first
        counts, sums = (), ()
        for b in tl.static_range(BINS):
            counts += (tl.where(at == b, state[b] + 1, state[b]),)
            sums += (tl.where(at == b, state[BINS + b] + squared, state[BINS + b]),)
        state = counts + sums
    return state


@triton.jit
def fold_bins(rows, step, inverse, first, BINS: tl.constexpr, BITS: tl.constexpr):
    """(counts and sums, the largest sum)"""
    zeros = ()
    for _ in tl.static_range(2 * BINS):
        zeros += (zero_block(rows),)
    found = sum_blocks(fold_rows(rows, (step, inverse, first), zeros, bins_step, BITS))
    most = found[BINS]
    for b in tl.static_range(1, BINS):
        most = tl.maximum(most, found[BINS + b])
    return found, most


@triton.jit
def sum_bins_of_rows(rows, p_step, p_sums, t, first, BINS: tl.constexpr, BITS: tl.constexpr):
    """A function of its own because `Rows` must be an argument."""
    step, unit, inverse = step_and_unit(p_step, t)
    found, most = fold_bins(rows, step, inverse, first, BINS, BITS)
    while is_wanting(most, unit):
        unit, inverse = wider_unit(unit)
        found, most = fold_bins(rows, step, inverse, first, BINS, BITS)
    for s in tl.static_range(2 * BINS):
        tl.store(p_sums + s, found[s])
    tl.store(p_sums + 2 * BINS, unit)


@triton.jit
def sum_bins(
    p_weights,
    p_tensors,
    p_owner,
    p_step,
    p_sums,
    n_chunk,
    BITS: tl.constexpr,
    BINS: tl.constexpr,
    DT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Program (chunk, part): of each of BINS bins of the part how many weights are in it, then the sums of their
    squared errors, and the unit of errors."""
    i = tl.program_id(0)
    t, _, start, n, run = chunk_of_program(i, p_tensors, p_owner, n_chunk, 1)
    p = tensor_pointer(p_weights, t, DT, ALIGNED) + start
    count = tl.minimum(n - start, n_chunk).to(tl.int32)
    PAIRED: tl.constexpr = DT.primitive_bitwidth == 16 and ALIGNED
    row = i.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    sum_bins_of_rows(
        Rows(p, run, run, run, count, ACC, 1, PAIRED, BLOCK, UNROLL),
        p_step,
        p_sums + row * (2 * BINS + 1),
        t,
        tl.program_id(1) * BINS,
        BINS,
        BITS,
    )


@triton.jit
def merge_bins(
    p_sums,
    p_tensors,
    p_loss,
    p_saved,
    n_chunk,
    BINS: tl.constexpr,
    ALL: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
):
    """A program for each tensor, over the sums of its chunks: counts, mean squared errors and their sum."""
    t = tl.program_id(0)
    n, first = field(p_tensors, t, N_ROWS), field(p_tensors, t, FIRST_CHUNK)
    SIZE: tl.constexpr = 2 * BINS + 1
    b = tl.arange(0, ALL)[None, :]
    part, at = b // BINS, b % BINS
    counts, errors = tl.zeros([LANES, ALL], tl.float64), tl.zeros([LANES, ALL], tl.float64)
    j, chunks = 0, tl.cdiv(n, n_chunk)
    while j < chunks:
        i = j + tl.arange(0, LANES)[:, None]
        m = (i < chunks) & (b < ALL)
        p = p_sums + ((first + i).to(tl.int64) * (ALL // BINS) + part) * SIZE
        unit = tl.load(p + 2 * BINS, mask=m, other=0).to(tl.float64)
        counts += tl.load(p + at, mask=m, other=0).to(tl.float64)
        errors += tl.load(p + BINS + at, mask=m, other=0).to(tl.float64) * unit * unit
        j += LANES
    count = tl.sum(counts, 0)
    means = tl.sum(errors, 0) / tl.maximum(count, 1)
    o, p_saved = tl.arange(0, ALL), p_saved + t.to(tl.int64) * (2 * ALL)
    tl.store(p_saved + o, count)
    tl.store(p_saved + ALL + o, means)
    tl.store(p_loss + t, tl.sum(means, 0))
