"""The standard deviation of a sample of each weight; which numbers are in it is told in reference/sample.py."""

import triton
import triton.language as tl

from .chunks import N_ROWS, field, tensor_pointer

NUMBERS, RUN = tl.constexpr(16384), tl.constexpr(16)


@triton.jit
def std_of_sample(
    p_weights, p_tensors, p_out, DT: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per tensor; sums in float64, which no square of a float32 leaves."""
    t = tl.program_id(0)
    p, rows = tensor_pointer(p_weights, t, DT, ALIGNED), field(p_tensors, t, N_ROWS)
    whole = rows < 2 * NUMBERS
    size, part = tl.where(whole, rows, NUMBERS), tl.where(whole, 1, rows // NUMBERS)
    pivot = tl.load(p).to(tl.float64)
    b_sum, b_squares = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    i = tl.zeros([], tl.int64)
    while i < size:
        o = i + tl.arange(0, BLOCK)
        run = o // RUN
        place = tl.where(whole, 0, (run * 40503 & 0xFFFF) * part >> 16)
        x = tl.load(p + (run * part + place) * RUN + o % RUN, mask=o < size, other=0).to(tl.float64)
        x = tl.where(o < size, x - pivot, 0)
        b_sum, b_squares = b_sum + x, tl.fma(x, x, b_squares)
        i += BLOCK
    total, squares, n = tl.sum(b_sum, 0), tl.sum(b_squares, 0), size.to(tl.float64)
    variance = (squares - total * total / n) / tl.maximum(n - 1, 1)
    tl.store(p_out + t, tl.where(variance <= 0, 0, tl.sqrt(variance)).to(ACC))
