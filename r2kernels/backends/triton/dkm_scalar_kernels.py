"""DKM of scalars in the Euclidean metric: W_hat and dL/dW in O(1) per weight, whatever K.

exp(-|w - c_j| / tau) is a factor of w times a factor of c_j on either side of w. So between two neighbouring centroids
the attention to any numbers h_j is (1 - s) l + s r: l and r are averages of h over the centroids on the left and on the
right, which the interval alone determines, and s = 1 / (1 + 2^-t), with t linear in w, is the weight of the right side.
By w this grows with 2 / tau s (1 - s) (r - l); so dL/dW of an iteration is

    (1 - s) l[v] + s r[v] + 2 / tau s (1 - s) (x (r - l)[v] - (r - l)[e] + g (r - l)[o])

with x = w - reference, o = c' - reference and e = v o.

`interval_tables` makes all that depends on the interval, in float64. Interval k of 0..K begins at c_k, its reference
(c_1 where k = 0), and is found on a uniform grid over [c_1, c_K], whose cells hold how many centroids lie in the cells
before. A weight that equals a centroid has no slope to it: an interval of its own.
"""

import triton
import triton.language as tl

from .chunks import PROPAGATE, chunk_of_program, tensor_pointer
from .range_losses_kernels import LOG2E

BLOCK = 1024  # weights at once
OUTPUT_RECORD, GRADIENT_RECORD = tl.constexpr(4), tl.constexpr(11)  # arrays of BUCKET numbers, for W_hat and for dL/dW
INTERVALS, LANES = 16, 32  # of a program of `interval_tables`; centroids that it reads at once
# Of a tensor and iteration: inverse width of a cell, its base, -dt/dw, 2 / tau, stride of the search.
HEADER = tl.constexpr(8)
ASM = tl.constexpr(not triton.knobs.runtime.interpret)  # which the interpreter cannot run
RECIPROCAL = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")


def most_registers(gradient, wide):
    """Of a thread of `map_scalars`. Left to itself, ptxas takes fewer than a block of weights needs, and spills."""
    return 168 if wide else 72 if gradient else 64


def numbers_of_record(gradient, bucket):
    return (GRADIENT_RECORD if gradient else OUTPUT_RECORD).value * bucket


def bucket_of(clusters):
    """Places for the K + 1 intervals and one behind them."""
    return max(triton.next_power_of_2(clusters + 2), 32)


def cells_of(bucket):
    """Of the grid: in bytes a few lines of the cache, and mostly at most one centroid in each."""
    return max(min(8 * bucket, 1024), 2 * bucket)


@triton.jit
def cell_of(x, inverse, base, CELLS: tl.constexpr):
    """The cell of x. It rises with x however this rounds: one formula for centroids and weights leaves no doubt about
    which lies before which.

    `base` holds a power of two so large that the last bits of the sum are an integer.
    """
    wide: tl.constexpr = x.dtype.is_fp64()
    lowest: tl.constexpr = 4503599627370496.0 if wide else 8388608.0
    v = tl.minimum(tl.maximum(tl.fma(x, inverse, base), lowest), lowest + (CELLS - 1))
    return (v.to(tl.uint64 if wide else tl.uint32, bitcast=True) & (CELLS - 1)).to(tl.uint32)


@triton.jit
def is_crowded(p, K, inverse, base, distance, CELLS: tl.constexpr, LANES: tl.constexpr):
    """Whether any cell has more than `distance` of the centroids at p."""
    found = tl.full([], 0, tl.int32)
    j = 0
    while j + distance < K:
        i = j + tl.arange(0, LANES)
        m = i + distance < K
        one = cell_of(tl.load(p + i, mask=m), inverse, base, CELLS)
        other = cell_of(tl.load(p + i + distance, mask=m), inverse, base, CELLS)
        found = tl.maximum(found, tl.max(((one == other) & m).to(tl.int32), 0))
        j += LANES
    return found > 0


@triton.jit
def fill_cells(p, p_cell, K, tile, inverse, base, CELLS: tl.constexpr, EACH: tl.constexpr, LANES: tl.constexpr):
    """How many of the centroids at p lie before each of the cells of this program; K - 1 at most, so that a byte holds
    the counts of 256 centroids."""
    own = (tile * EACH + tl.arange(0, EACH)).to(tl.uint32)
    before = tl.zeros([EACH], tl.int32)
    j = 0
    while j < K:
        i = j + tl.arange(0, LANES)
        m = i < K
        cells = cell_of(tl.load(p + i, mask=m), inverse, base, CELLS)
        before += tl.sum(((cells[None, :] < own[:, None]) & m[None, :]).to(tl.int32), 1)
        j += LANES
    tl.store(p_cell + own, tl.minimum(before, K - 1).to(p_cell.dtype.element_ty))


@triton.jit(do_not_specialize=["n_tensors", "n_most", "n_moments"])
def interval_tables(
    p_c,
    p_new,
    p_u,
    p_moments,
    p_tau,
    p_clusters,
    p_records,
    p_cells,
    p_headers,
    n_tensors,
    n_most,
    n_moments,
    GRADIENT: tl.constexpr,
    ACC: tl.constexpr,
    BUCKET: tl.constexpr,
    CELLS: tl.constexpr,
    INTERVALS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Program (i, j): the j-th few intervals, and cells, of iteration i // n_tensors of tensor i % n_tensors.

    A record is of arrays of BUCKET numbers: references; base of -t, l, r of the output. Or behind the references, of
    twice BUCKET numbers: base of -t, l[v], r[v], (l - r)[e], (r - l)[o], for weights between centroids and for those
    that equal one.
    """
    RECORD: tl.constexpr = (GRADIENT_RECORD if GRADIENT else OUTPUT_RECORD) * BUCKET
    job, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    K, tau = tl.load(p_clusters + job % n_tensors), tl.load(p_tau + job % n_tensors).to(tl.float64)
    p_c, p_new = p_c + job * n_most, p_new + job * n_most
    low, high = tl.load(p_c), tl.load(p_c + K - 1)
    span = high.to(tl.float64) - low.to(tl.float64)
    tau = tl.where(tau > 0, tau, float("nan"))
    scale = LOG2E / tau

    wide: tl.constexpr = ACC.is_fp64()
    per_cell = tl.where(span > 0, (CELLS - 1) / span, 0)
    inverse = tl.where(per_cell < 1e37, per_cell, 0).to(ACC)
    base = ((4503599627370496.0 if wide else 8388608.0) - low.to(tl.float64) * inverse).to(ACC)
    fill_cells(p_c, p_cells + job * CELLS, K, tile, inverse, base, CELLS, CELLS * INTERVALS // BUCKET, LANES)
    if tile == 0:
        stride = tl.full([], 1, tl.int32)
        more = is_crowded(p_c, K, inverse, base, 1, CELLS, LANES)
        while more:
            stride *= 2
            more = is_crowded(p_c, K, inverse, base, 2 * stride - 1, CELLS, LANES)
        p_header = p_headers + job * HEADER
        tl.store(p_header, inverse)
        tl.store(p_header + 1, base)
        tl.store(p_header + 2, tl.maximum(-2 * scale, -1e38, PROPAGATE).to(ACC))
        tl.store(p_header + 3, tl.minimum(2 / tau, 1e38, PROPAGATE).to(ACC))
        tl.store(p_header + 4, stride.to(ACC))

    k = tile * INTERVALS + tl.arange(0, INTERVALS)
    begin = tl.load(p_c + tl.minimum(tl.maximum(k - 1, 0), K - 1)).to(tl.float64)
    end = tl.load(p_c + tl.minimum(k, K - 1)).to(tl.float64)
    zero = tl.zeros([INTERVALS], tl.float64)
    l_1, l_o, l_v, l_e = zero, zero, zero, zero
    r_1, r_o, r_v, r_e = zero, zero, zero, zero
    equal_1, equal_o, equal_e = zero, zero, zero
    j = 0
    while j < K:
        i = j + tl.arange(0, LANES)
        m = i < K
        c = tl.load(p_c + i, mask=m).to(tl.float64)[None, :]
        left = i[None, :] < k[:, None]
        a = tl.where(m[None, :], tl.exp2(-scale * tl.abs(c - tl.where(left, begin[:, None], end[:, None]))), 0)
        new = tl.load(p_new + i, mask=m, other=0).to(tl.float64)[None, :]
        o = new - begin[:, None]
        a_l, a_r = tl.where(left, a, 0), tl.where(left, 0, a)
        l_1, l_o = l_1 + tl.sum(a_l, 1), l_o + tl.sum(a_l * o, 1)
        r_1, r_o = r_1 + tl.sum(a_r, 1), r_o + tl.sum(a_r * (new - end[:, None]), 1)
        if GRADIENT:
            S = tl.load(p_moments + (job * n_most + i) * n_moments, mask=m, other=0).to(tl.float64)
            u = tl.load(p_u + job * n_most + i, mask=m, other=0).to(tl.float64)
            v = tl.where(S == 0, 0, u / tl.where(S == 0, 1, S))[None, :]
            e = v * o
            l_v, l_e = l_v + tl.sum(a_l * v, 1), l_e + tl.sum(a_l * e, 1)
            r_v, r_e = r_v + tl.sum(a_r * v, 1), r_e + tl.sum(a_r * e, 1)
            same = left & m[None, :] & (c == begin[:, None])
            equal_1 += tl.sum(tl.where(same, 1.0, 0.0), 1)
            equal_o += tl.sum(tl.where(same, o, 0), 1)
            equal_e += tl.sum(tl.where(same, e, 0), 1)
        j += LANES

    first, last, real = k == 0, k == K, k <= K
    l_1, r_1 = tl.where(first, 1, l_1), tl.where(last, 1, r_1)
    l_o, r_o = l_o / l_1, r_o / r_1
    l_o, r_o = tl.where(first, r_o, l_o), tl.where(last, l_o, r_o)
    d_o = r_o - l_o + (end - begin)
    start = tl.minimum(scale * (end - begin) - tl.log2(r_1 / l_1), 1e38)  # finite in float32
    start = tl.where(first, -float("inf"), tl.where(last, float("inf"), start))

    p = p_records + job * RECORD + k
    tl.store(p, tl.where(real, begin, float("nan")).to(ACC))
    p += BUCKET
    if GRADIENT:
        l_v, r_v, l_e, r_e = l_v / l_1, r_v / r_1, l_e / l_1, r_e / r_1
        l_v, r_v = tl.where(first, r_v, l_v), tl.where(last, l_v, r_v)
        l_e, r_e = tl.where(first, r_e, l_e), tl.where(last, l_e, r_e)
        store_interval(p, start, l_v, r_v, l_e - r_e, d_o, BUCKET, ACC)
        # w = c_k: a constant and a multiple of g. -t = 0 gives s = 1 / 2
        s = 1 / (1 + tl.exp2(start))
        without = (1 - s) / l_1
        a_v, a_e, a_o = l_v + s * (r_v - l_v), l_e + s * (r_e - l_e), l_o + s * d_o
        b_1 = 1 - 2 * s - without * equal_1
        b_e, b_o = (1 - s) * l_e - s * r_e - without * equal_e, (1 - s) * l_o - s * (l_o + d_o) - without * equal_o
        a_v += (b_e - a_e * b_1) / tau
        store_interval(p + BUCKET, zero, a_v, a_v, zero, 2 * (a_o * b_1 - b_o), BUCKET, ACC)
    else:
        tl.store(p, start.to(ACC))
        tl.store(p + BUCKET, (begin + l_o).to(ACC))
        tl.store(p + 2 * BUCKET, (end + r_o).to(ACC))


@triton.jit
def store_interval(p, start, l_v, r_v, d_e, d_o, BUCKET: tl.constexpr, ACC: tl.constexpr):
    """What a record holds behind the references, for the gradient."""
    tl.store(p, start.to(ACC))
    tl.store(p + 2 * BUCKET, l_v.to(ACC))
    tl.store(p + 4 * BUCKET, r_v.to(ACC))
    tl.store(p + 6 * BUCKET, d_e.to(ACC))
    tl.store(p + 8 * BUCKET, d_o.to(ACC))


@triton.jit
def count_up_to(b_w, p_record, p_cell, inverse, base, stride, BUCKET: tl.constexpr, CELLS: tl.constexpr):
    """How many centroids are <= w: those in the cells before, and by bisection those in its own, fewer than 2 * stride.
    NaN fills up the references."""
    k = tl.load(p_cell + cell_of(b_w, inverse, base, CELLS)).to(tl.uint32)
    while stride > 1:
        k = tl.where(tl.load(p_record + tl.minimum(k + stride, BUCKET - 1)) <= b_w, k + stride, k)
        stride //= 2
    return tl.where(tl.load(p_record + 1 + k) <= b_w, k + 1, k)


@triton.jit
def reciprocal(x):
    if ASM and x.dtype.is_fp32():
        return tl.inline_asm_elementwise(RECIPROCAL, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1 / x


@triton.jit
def interval_of(b_w, p_record, p_cell, p_header, BUCKET: tl.constexpr, CELLS: tl.constexpr):
    """(interval, w - reference)"""
    stride = tl.load(p_header + 4).to(tl.uint32)
    k = count_up_to(b_w, p_record, p_cell, tl.load(p_header), tl.load(p_header + 1), stride, BUCKET, CELLS)
    return k, b_w - tl.load(p_record + k)


@triton.jit
def weights_of_sides(x, p_header, p):
    """(1 - s, s), the weights of the left and the right, each with all its digits near 0"""
    e = tl.exp2(tl.fma(x, tl.load(p_header + 2), tl.load(p)))
    s = reciprocal(1 + e)
    return tl.where(e > 1e30, 1, e * s), s


@triton.jit
def output_of_scalars(b_w, p_record, p_cell, p_header, BUCKET: tl.constexpr, CELLS: tl.constexpr):
    """W_hat"""
    k, x = interval_of(b_w, p_record, p_cell, p_header, BUCKET, CELLS)
    p = p_record + BUCKET + k
    a_l, a_r = weights_of_sides(x, p_header, p)
    return tl.fma(a_l, tl.load(p + BUCKET), a_r * tl.load(p + 2 * BUCKET))


@triton.jit
def gradient_of_scalars(
    b_w, b_g, p_record, p_cell, p_header, LAST: tl.constexpr, BUCKET: tl.constexpr, CELLS: tl.constexpr
):
    """dL/dW of one iteration"""
    k, x = interval_of(b_w, p_record, p_cell, p_header, BUCKET, CELLS)
    p = p_record + BUCKET + tl.where(x == 0, k + BUCKET, k)
    a_l, a_r = weights_of_sides(x, p_header, p)
    l_v, r_v = tl.load(p + 2 * BUCKET), tl.load(p + 4 * BUCKET)
    steep = tl.fma(x, r_v - l_v, tl.load(p + 6 * BUCKET))
    if LAST:
        steep = tl.fma(b_g, tl.load(p + 8 * BUCKET), steep)
    return tl.fma(a_l * a_r * tl.load(p_header + 3), steep, tl.fma(a_l, l_v, a_r * r_v))


@triton.jit
def map_scalar_block(
    b_w,
    b_g,
    p_record,
    p_cell,
    p_header,
    n_steps,
    n_tensors,
    GRADIENT: tl.constexpr,
    BUCKET: tl.constexpr,
    CELLS: tl.constexpr,
):
    """W_hat, or dL/dW summed over the iterations, of a block of weights."""
    if GRADIENT:
        total = gradient_of_scalars(b_w, b_g, p_record, p_cell, p_header, True, BUCKET, CELLS)
        step = 1
        while step < n_steps:
            p_record += n_tensors.to(tl.int64) * (GRADIENT_RECORD * BUCKET)
            p_cell += n_tensors.to(tl.int64) * CELLS
            p_header += n_tensors.to(tl.int64) * HEADER
            total += gradient_of_scalars(b_w, b_g, p_record, p_cell, p_header, False, BUCKET, CELLS)
            step += 1
        return total
    else:
        return output_of_scalars(b_w, p_record, p_cell, p_header, BUCKET, CELLS)


@triton.jit(do_not_specialize=["n_steps", "n_tensors"])
def map_scalars(
    p_weights,
    p_grads,
    p_targets,
    p_tensors,
    p_owner,
    p_records,
    p_cells,
    p_headers,
    n_chunk,
    n_steps,
    n_tensors,
    GRADIENT: tl.constexpr,
    DT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BUCKET: tl.constexpr,
    CELLS: tl.constexpr,
):
    """One program per chunk: W_hat, or dL/dW summed over the iterations, the last one first."""
    t, _, start, n, _ = chunk_of_program(tl.program_id(0), p_tensors, p_owner, n_chunk, 1)
    job = t.to(tl.int64)
    p_record = p_records + job * ((GRADIENT_RECORD if GRADIENT else OUTPUT_RECORD) * BUCKET)
    p_cell, p_header = p_cells + job * CELLS, p_headers + job * HEADER
    p = tensor_pointer(p_weights, t, DT, ALIGNED) + start
    p_g = tensor_pointer(p_grads, t, DT, ALIGNED) + start if GRADIENT else p
    p_out = tensor_pointer(p_targets, t, DT, ALIGNED) + start
    count = tl.minimum(n - start, n_chunk).to(tl.int32)
    o = tl.arange(0, BLOCK)
    i = 0
    while i + BLOCK <= count:
        w = tl.load(p + i + o).to(ACC)
        g = tl.load(p_g + i + o).to(ACC) if GRADIENT else w
        tl.store(
            p_out + i + o,
            map_scalar_block(w, g, p_record, p_cell, p_header, n_steps, n_tensors, GRADIENT, BUCKET, CELLS).to(DT),
        )
        i += BLOCK
    while i < count:
        m = i + o < count
        w = tl.load(p + i + o, mask=m, other=0).to(ACC)
        g = tl.load(p_g + i + o, mask=m, other=0).to(ACC) if GRADIENT else w
        tl.store(
            p_out + i + o,
            map_scalar_block(w, g, p_record, p_cell, p_header, n_steps, n_tensors, GRADIENT, BUCKET, CELLS).to(DT),
            mask=m,
        )
        i += BLOCK
