"""How many |w| have each value of a digit, by integer histograms: what `digits` gives, and how partial_l2 finds its
threshold, byte by byte from the highest on."""

import triton
import triton.language as tl

from .chunks import chunk_of_program, tensor_pointer

DIGIT = tl.constexpr(256)  # values of a digit of a weight's bits


@triton.jit
def magnitude_bits(w, DT: tl.constexpr):
    """The bits of |w|, read as an integer, which order as the numbers do, with NaN above all."""
    if DT.primitive_bitwidth == 64:
        return w & 0x7FFFFFFFFFFFFFFF
    elif DT.primitive_bitwidth == 32:
        return w & 0x7FFFFFFF
    else:
        return w.to(tl.int32) & 0x7FFF


@triton.jit
def leading_digits(p_counts, rank, n_tensors, PASS: tl.constexpr):
    """(the first PASS digits of the number of this rank, its rank among those that begin so); p_counts of the tensor,
    in the first pass."""
    prefix = tl.full([], 0, tl.int64)
    for k in tl.static_range(PASS):
        before = tl.cumsum(tl.load(p_counts + k * n_tensors.to(tl.int64) * DIGIT + tl.arange(0, DIGIT)).to(tl.int64), 0)
        prefix = prefix * DIGIT + tl.minimum(tl.sum((before < rank).to(tl.int32), 0), DIGIT - 1)
        rank -= tl.max(tl.where(before < rank, before, 0), 0)
    return prefix, rank


@triton.jit
def digit_of(w, prefix, m, PASS: tl.constexpr, DT: tl.constexpr):
    """(the digit, whether it counts)"""
    key = magnitude_bits(w, DT)
    SHIFT: tl.constexpr = DT.primitive_bitwidth - 8 * (PASS + 1)
    which = ((key >> SHIFT) & (DIGIT - 1)).to(tl.int32)
    return which, m if PASS == 0 else m & ((key >> (SHIFT + 8)) == prefix.to(key.dtype))


@triton.jit(do_not_specialize=["n_tensors"])
def count_chunks(
    p_weights,
    p_tensors,
    p_owner,
    p_rank,
    p_prefix,
    p_counts,
    n_chunk,
    n_tensors,
    PASS: tl.constexpr,
    DT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk: how many of its |w| that begin with certain digits, PASS of them, have each value of the
    next. These are `p_prefix`, or without it those of the number of rank `p_rank`, which the passes before have
    found, each with counts of its own. Integer sums, so their order is of no matter."""
    t, _, start, n, _ = chunk_of_program(tl.program_id(0), p_tensors, p_owner, n_chunk, 1)
    INT: tl.constexpr = (
        tl.int64 if DT.primitive_bitwidth == 64 else tl.int32 if DT.primitive_bitwidth == 32 else tl.int16
    )
    p = tensor_pointer(p_weights, t, DT, ALIGNED).to(tl.pointer_type(INT)) + start
    p_counts += t.to(tl.int64) * DIGIT
    if p_prefix is not None:
        prefix = tl.load(p_prefix + t)
    else:
        prefix, _ = leading_digits(p_counts, tl.load(p_rank + t), n_tensors, PASS)
        p_counts += PASS * n_tensors.to(tl.int64) * DIGIT
    count = tl.minimum(n - start, n_chunk).to(tl.int32)
    counts = tl.zeros([DIGIT], tl.int32)
    o = tl.arange(0, BLOCK)
    i = 0
    while i < count:
        m = i + o < count
        which, m_counted = digit_of(tl.load(p + i + o, mask=m, other=0), prefix, m, PASS, DT)
        counts += tl.histogram(which, DIGIT, mask=m_counted)
        i += BLOCK
    tl.atomic_add(p_counts + tl.arange(0, DIGIT), counts.to(p_counts.dtype.element_ty), mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["n_tensors"])
def store_threshold(p_rank, p_counts, p_saved, n_tensors, PASSES: tl.constexpr, DT: tl.constexpr):
    """The |w| of this rank of every tensor; NaN where the rank is below 1."""
    t = tl.program_id(0)
    rank = tl.load(p_rank + t)
    found, _ = leading_digits(p_counts + t.to(tl.int64) * DIGIT, rank, n_tensors, PASSES)
    if DT.primitive_bitwidth == 64:
        theta = found.to(tl.float64, bitcast=True)
    elif DT.primitive_bitwidth == 32:
        theta = found.to(tl.int32).to(tl.float32, bitcast=True)
    else:
        theta = found.to(tl.int16).to(DT, bitcast=True).to(tl.float32)
    tl.store(p_saved + t, tl.where(rank < 1, float("nan"), theta))
