"""DKM of rows of D numbers: W_hat, dL/dW and nearest centroids, by attention that is recomputed and never stored.

A program works on tiles of J centroids by R rows: the rows along its threads and the centroids within each, so that
nothing crosses threads. The smallest distance is the shift of the softmax: a = 2^((low - distance) log2(e) / tau) / Z.
With v = u / S, of the backward of an iteration (g only of the last one):

    P = (w - c') v + g (c' - near)       Q = a (P - mean of P)       dL/dW = sum a v - sum Q slope / tau

Any `near` will do that is the same for all centroids of a row. The new one of the nearest keeps P small whether
attention is sharp or flat.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .chunks import EDGE, N_ELEMENTS, PROPAGATE, WARPS, chunk_of_program, field, tensor_pointer
from .dkm_scalar_kernels import reciprocal
from .range_losses_kernels import LOG2E


class Centroids(NamedTuple):
    """Of one iteration of a tensor. Only ever built as an argument of a call, like `Rows`."""

    p: tl.tensor
    p_new: tl.tensor
    p_u: tl.tensor
    p_moments: tl.tensor
    K: tl.tensor
    n_moments: tl.tensor  # numbers of a centroid there, S first
    scale: tl.tensor  # log2(e) / tau
    EUCLIDEAN: tl.constexpr
    D: tl.constexpr
    J: tl.constexpr  # of a tile


def tile_of_centroids(clusters, d, sums, interpreted=False):
    """(J, R): as many centroids and rows as registers allow, which hold sums for every centroid, row and column, or
    else numbers of rows."""
    most = 16 if d <= 2 else 8 if d <= 4 else max(32 // triton.next_power_of_2(d), 1)
    J = min(triton.next_power_of_2(clusters), most if sums else max(most // 2, 1))
    return J, 1024 if interpreted else 32 * WARPS * (1 if sums else 2)


@triton.jit
def inverse_temperature(p_tau, ACC: tl.constexpr):
    """log2(e) / tau, NaN unless tau > 0; never 0, so that an infinite distance is never multiplied by that."""
    tau = tl.load(p_tau).to(tl.float64)
    scale = LOG2E / tl.where(tau > 0, tau, float("nan"))
    return tl.maximum(tl.minimum(scale, 1e38, PROPAGATE), 1e-37, PROPAGATE).to(ACC)


@triton.jit
def row_offsets(k, run, D: tl.constexpr):
    """Where row k begins in a tensor."""
    return k if D == 1 else k // run * (D * run) + k % run


@triton.jit
def load_rows(p, o, m, run, ACC: tl.constexpr, D: tl.constexpr, unit=1.0):
    """The D columns of rows that begin at p + o, times a unit of lengths."""
    b_w = ()
    for c in tl.static_range(D):
        b_w += (tl.load(p + o + c * run, mask=m, other=0).to(ACC) * unit,)
    return b_w


@triton.jit
def load_centroids(p, j, m_j, other, D: tl.constexpr):
    """The D columns of centroids j."""
    b_c = ()
    for c in tl.static_range(D):
        b_c += (tl.load(p + j * D + c, mask=m_j, other=other),)
    return b_c


@triton.jit
def repeat_columns(x, D: tl.constexpr):
    """x, D times over."""
    result = ()
    for _ in tl.static_range(D):
        result += (x,)
    return result


@triton.jit
def load_v(centroids, j, m_j):
    """The D columns of u / S of centroids j, 0 where no weight belongs to them."""
    S = tl.load(centroids.p_moments + j * centroids.n_moments, mask=m_j, other=0)
    b_v = ()
    for c in tl.static_range(centroids.D):
        u = tl.load(centroids.p_u + j * centroids.D + c, mask=m_j, other=0)
        b_v += (tl.where(S == 0, 0, u / tl.where(S == 0, 1, S)),)
    return b_v


@triton.jit
def distances(b_w, b_c, EUCLIDEAN: tl.constexpr):
    """(J, R), of every centroid of a tile to every row"""
    x = b_w[0][None, :] - b_c[0][:, None]
    if EUCLIDEAN and len(b_w) == 1:
        return tl.abs(x)
    else:
        far = x * x
        for c in tl.static_range(1, len(b_w)):
            x = b_w[c][None, :] - b_c[c][:, None]
            far = tl.fma(x, x, far)
        return tl.sqrt(far) if EUCLIDEAN else far


@triton.jit
def pull_P(b_w, b_g, b_near, b_new, b_v, WITH_G: tl.constexpr):
    """P (J, R); the last iteration's, WITH_G, has the incoming gradients too."""
    P = (b_w[0][None, :] - b_new[0][:, None]) * b_v[0][:, None]
    for c in tl.static_range(1, len(b_w)):
        P = tl.fma(b_w[c][None, :] - b_new[c][:, None], b_v[c][:, None], P)
    if WITH_G:
        for c in tl.static_range(len(b_w)):
            P = tl.fma(b_g[c][None, :], b_new[c][:, None] - b_near[c][None, :], P)
    return P


@triton.jit
def new_of_nearest(far, low, b_new, b_near):
    """D columns of the new centroid of the nearest one; `b_near` where none of the tile is `low`, that is nearest."""
    result = ()
    for c in tl.static_range(len(b_new)):
        value = tl.max(tl.where(far == low[None, :], b_new[c][:, None], -float("inf")), 0)
        result += (tl.where(value == -float("inf"), b_near[c], value),)
    return result


@triton.jit
def with_sign_of(x, a):
    """sign(x) a, and x where that is 0 or NaN."""
    return tl.where(x > 0, a, tl.where(x < 0, -a, x))


@triton.jit
def times_slope(b_w, b_c, Q, far, EUCLIDEAN: tl.constexpr):
    """Q dD/dw: D columns"""
    D: tl.constexpr = len(b_w)
    if EUCLIDEAN and D > 1:
        Q = tl.where(far == 0, 0, Q * reciprocal(far))
    result = ()
    for c in tl.static_range(D):
        x = b_w[c][None, :] - b_c[c][:, None]
        result += (with_sign_of(x, Q) if EUCLIDEAN and D == 1 else Q * x if EUCLIDEAN else 2 * Q * x,)
    return result


@triton.jit
def softmax_of_rows(b_w, b_g, centroids, MEAN: tl.constexpr, WITH_G: tl.constexpr):
    """(low, 1 / Z, mean of P if MEAN, what P is relative to if WITH_G) of rows"""
    zero = tl.zeros_like(b_w[0])
    low, Z, mean, b_near = zero + float("inf"), zero, zero, repeat_columns(zero, centroids.D)
    j0 = 0
    while j0 < centroids.K:
        j = j0 + tl.arange(0, centroids.J)
        m_j = j < centroids.K
        far = distances(b_w, load_centroids(centroids.p, j, m_j, float("inf"), centroids.D), centroids.EUCLIDEAN)
        below = tl.minimum(low, tl.min(far, 0))
        f, e = tl.exp2((below - low) * centroids.scale), tl.exp2((below[None, :] - far) * centroids.scale)
        if MEAN:
            b_new = load_centroids(centroids.p_new, j, m_j, 0, centroids.D)
            if WITH_G:
                b_next = new_of_nearest(far, below, b_new, b_near)
                for c in tl.static_range(centroids.D):
                    mean = tl.fma(Z * b_g[c], b_near[c] - b_next[c], mean)
                b_near = b_next
            mean = tl.fma(mean, f, tl.sum(e * pull_P(b_w, b_g, b_near, b_new, load_v(centroids, j, m_j), WITH_G), 0))
        Z = tl.fma(Z, f, tl.sum(e, 0))
        low = below
        j0 += centroids.J
    return low, 1 / Z, mean / Z, b_near


@triton.jit
def attend_rows(b_w, centroids):
    """D columns of W_hat"""
    zero = tl.zeros_like(b_w[0])
    low, Z = zero + float("inf"), zero
    total = repeat_columns(zero, centroids.D)
    j0 = 0
    while j0 < centroids.K:
        j = j0 + tl.arange(0, centroids.J)
        m_j = j < centroids.K
        far = distances(b_w, load_centroids(centroids.p, j, m_j, float("inf"), centroids.D), centroids.EUCLIDEAN)
        below = tl.minimum(low, tl.min(far, 0))
        f, e = tl.exp2((below - low) * centroids.scale), tl.exp2((below[None, :] - far) * centroids.scale)
        Z = tl.fma(Z, f, tl.sum(e, 0))
        b_new, more = load_centroids(centroids.p_new, j, m_j, 0, centroids.D), ()
        for c in tl.static_range(centroids.D):
            more += (tl.fma(total[c], f, tl.sum(e * b_new[c][:, None], 0)),)
        total, low = more, below
        j0 += centroids.J
    result = ()
    for c in tl.static_range(centroids.D):
        result += (total[c] / Z,)
    return result


@triton.jit
def add_row_gradient(b_w, b_g, total, centroids, scale_of_Q, WITH_G: tl.constexpr):
    """`total` and D columns of dL/dW of one iteration"""
    low, rest, mean, b_near = softmax_of_rows(b_w, b_g, centroids, True, WITH_G)
    j0 = 0
    while j0 < centroids.K:
        j = j0 + tl.arange(0, centroids.J)
        m_j = j < centroids.K
        b_v = load_v(centroids, j, m_j)
        far = distances(b_w, load_centroids(centroids.p, j, m_j, float("inf"), centroids.D), centroids.EUCLIDEAN)
        a = tl.exp2((low[None, :] - far) * centroids.scale) * rest[None, :]
        P = pull_P(b_w, b_g, b_near, load_centroids(centroids.p_new, j, m_j, 0, centroids.D), b_v, WITH_G)
        b_c = load_centroids(centroids.p, j, m_j, 0, centroids.D)
        terms = times_slope(b_w, b_c, a * (mean[None, :] - P) * scale_of_Q, far, centroids.EUCLIDEAN)
        more = ()
        for c in tl.static_range(centroids.D):
            more += (total[c] + tl.sum(tl.fma(a, b_v[c][:, None], terms[c]), 0),)
        total = more
        j0 += centroids.J
    return total


@triton.jit
def copy_leftovers(p_from, p_to, start, end, D: tl.constexpr, DT: tl.constexpr):
    """The numbers that are left over: fewer than D, behind the rows."""
    while start < end:
        o = start + tl.arange(0, EDGE)
        tl.store(p_to + o, tl.load(p_from + o, mask=o < end), mask=o < end)
        start += EDGE


@triton.jit(do_not_specialize=["n_most", "n_moments", "n_steps", "n_tensors"])
def map_rows(
    p_weights,
    p_grads,
    p_targets,
    p_tensors,
    p_owner,
    p_tau,
    p_unit,
    p_clusters,
    p_c,
    p_new,
    p_u,
    p_moments,
    n_chunk,
    n_most,
    n_moments,
    n_steps,
    n_tensors,
    GRADIENT: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    DT: tl.constexpr,
    ACC: tl.constexpr,
    D: tl.constexpr,
    ALIGNED: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
):
    """One program per chunk: W_hat, or dL/dW summed over the iterations, the last one first. p_unit: what tau and the
    lengths of centroids were multiplied by."""
    t, _, start, n, run = chunk_of_program(tl.program_id(0), p_tensors, p_owner, n_chunk, 1)
    p = tensor_pointer(p_weights, t, DT, ALIGNED)
    p_g = tensor_pointer(p_grads, t, DT, ALIGNED) if GRADIENT else p
    p_target = tensor_pointer(p_targets, t, DT, ALIGNED)
    scale, K = inverse_temperature(p_tau + t, ACC), tl.load(p_clusters + t)
    over_tau, unit = scale * 0.6931471805599453, tl.load(p_unit + t)
    back = 1 / unit
    count = tl.minimum(n - start, n_chunk).to(tl.int32)
    r = 0
    while r < count:
        k = r + tl.arange(0, R)
        m, o = k < count, row_offsets(start + k, run, D)
        b_w = load_rows(p, o, m, run, ACC, D, unit)
        first = t.to(tl.int64) * n_most
        if GRADIENT:
            b_g = load_rows(p_g, o, m, run, ACC, D)
            result = add_row_gradient(
                b_w,
                b_g,
                repeat_columns(tl.zeros_like(b_w[0]), D),
                Centroids(
                    p_c + first * D,
                    p_new + first * D,
                    p_u + first * D,
                    p_moments + first * n_moments,
                    K,
                    n_moments,
                    scale,
                    EUCLIDEAN,
                    D,
                    J,
                ),
                over_tau,
                True,
            )
            step = 1
            while step < n_steps:
                first += n_tensors.to(tl.int64) * n_most
                result = add_row_gradient(
                    b_w,
                    b_g,
                    result,
                    Centroids(
                        p_c + first * D,
                        p_new + first * D,
                        p_u + first * D,
                        p_moments + first * n_moments,
                        K,
                        n_moments,
                        scale,
                        EUCLIDEAN,
                        D,
                        J,
                    ),
                    over_tau,
                    False,
                )
                step += 1
        else:
            result = attend_rows(
                b_w, Centroids(p_c + first * D, p_new + first * D, p_c, p_c, K, n_moments, scale, EUCLIDEAN, D, J)
            )
        for c in tl.static_range(D):
            tl.store(p_target + o + c * run, (result[c] if GRADIENT else result[c] * back).to(DT), mask=m)
        r += R
    if start + n_chunk >= n:
        copy_leftovers(p_g if GRADIENT else p, p_target, n * D, field(p_tensors, t, N_ELEMENTS), D, DT)


@triton.jit(do_not_specialize=["n_most"])
def nearest_centroids(
    p_weights,
    p_codes,
    p_tensors,
    p_owner,
    p_unit,
    p_clusters,
    p_c,
    n_chunk,
    n_most,
    DT: tl.constexpr,
    ACC: tl.constexpr,
    D: tl.constexpr,
    ALIGNED: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
):
    """One program per chunk: the index of the nearest centroid, the lower of two as near, 0 of a row with NaN; in a
    byte for up to 256 centroids, else in four."""
    t, _, start, n, run = chunk_of_program(tl.program_id(0), p_tensors, p_owner, n_chunk, 1)
    p, K, unit = tensor_pointer(p_weights, t, DT, ALIGNED), tl.load(p_clusters + t), tl.load(p_unit + t)
    p_c += t.to(tl.int64) * n_most * D
    count = tl.minimum(n - start, n_chunk).to(tl.int32)
    r = 0
    while r < count:
        k = r + tl.arange(0, R)
        m = k < count
        b_w = load_rows(p, row_offsets(start + k, run, D), m, run, ACC, D, unit)
        low, code = tl.full([R], float("inf"), ACC), tl.zeros([R], tl.int32)
        j0 = 0
        while j0 < K:
            j = j0 + tl.arange(0, J)
            m_j = j < K
            far = distances(b_w, load_centroids(p_c, j, m_j, float("inf"), D), D == 1)
            best = tl.min(far, 0)
            first = tl.min(tl.where(far == best[None, :], j[:, None], 2147483647), 0)
            code = tl.where(best < low, first, code)
            low = tl.minimum(low, best)
            j0 += J
        if K <= 256:
            tl.store(
                tensor_pointer(p_codes, t, tl.uint8, False).to(tl.pointer_type(tl.uint8)) + start + k,
                code.to(tl.uint8),
                mask=m,
            )
        else:
            tl.store(
                tensor_pointer(p_codes, t, tl.int32, False).to(tl.pointer_type(tl.int32)) + start + k, code, mask=m
            )
        r += R
