"""DKM's sums over the rows of chunks, for any metric and number of columns, and their merge in float64.

Triton cannot scatter into shared memory, so every row meets every centroid, O(K) work for each, in lanes that keep sums
of their own. A program has a tile of centroids; where K exceeds that, `row_states` leaves what a row needs of all tiles
(names as in dkm_rows_kernels.py).
"""

import triton
import triton.language as tl

from .chunks import FIRST_CHUNK, N_ROWS, chunk_of_program, field, tensor_pointer
from .dkm_rows_kernels import (
    Centroids,
    distances,
    inverse_temperature,
    load_centroids,
    load_rows,
    load_v,
    new_of_nearest,
    pull_P,
    repeat_columns,
    row_offsets,
    softmax_of_rows,
    times_slope,
    with_sign_of,
)

BESIDE = tl.constexpr(4)  # columns of the Jacobian that a program sums beside one another
UPDATE, UPSTREAM, RECUR, JACOBIAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


def sums_of_mode(mode, d, is_signed):
    """How many sums a centroid has."""
    return {UPDATE.value: 1 + d + (2 if is_signed else 0), JACOBIAN.value: BESIDE.value}.get(mode, d)


@triton.jit(do_not_specialize=["n_most", "n_moments", "first_row", "n_window"])
def row_states(
    p_weights,
    p_grads,
    p_tensors,
    p_owner,
    p_tau,
    p_unit,
    p_clusters,
    p_c,
    p_new,
    p_u,
    p_moments,
    p_states,
    n_chunk,
    n_most,
    n_moments,
    first_row,
    n_window,
    PLANES: tl.constexpr,
    MEAN: tl.constexpr,
    WITH_G: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    DT: tl.constexpr,
    ACC: tl.constexpr,
    D: tl.constexpr,
    ALIGNED: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
):
    """One program per chunk: low, 1 / Z, if MEAN the mean of P, and then if WITH_G `near`, each in a plane, of its
    rows in the window [first_row, first_row + n_window)."""
    i = tl.program_id(0).to(tl.int64)
    t, _, start, n, run = chunk_of_program(i, p_tensors, p_owner, n_chunk, 1)
    p, p_g = tensor_pointer(p_weights, t, DT, ALIGNED), tensor_pointer(p_grads, t, DT, ALIGNED) if WITH_G else p_weights
    scale, K, unit = inverse_temperature(p_tau + t, ACC), tl.load(p_clusters + t), tl.load(p_unit + t)
    first = t.to(tl.int64) * n_most
    end = tl.minimum(tl.minimum(n - start, n_chunk), first_row + n_window).to(tl.int32)
    r = first_row
    while r < end:
        k = r + tl.arange(0, R)
        m, o = k < end, row_offsets(start + k, run, D)
        b_w = load_rows(p, o, m, run, ACC, D, unit)
        b_g = load_rows(p_g, o, m, run, ACC, D) if WITH_G else b_w
        low, rest, mean, b_near = softmax_of_rows(
            b_w,
            b_g,
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
            MEAN,
            WITH_G,
        )
        p_state = p_states + i * PLANES * n_window + (k - first_row)
        tl.store(p_state, low, mask=m)
        tl.store(p_state + n_window, rest, mask=m)
        if MEAN:
            tl.store(p_state + 2 * n_window, mean, mask=m)
        if MEAN and WITH_G:
            for c in tl.static_range(D):
                tl.store(p_state + (3 + c) * n_window, b_near[c], mask=m)
        r += R


@triton.jit
def add_terms(sums, terms):
    """One term to each of the sums."""
    result = ()
    for s in tl.static_range(len(sums)):
        result += (sums[s] + terms[s],)
    return result


@triton.jit(do_not_specialize=["n_most", "n_moments", "first_tile", "first_row", "n_window"])
def cluster_sums(
    p_weights,
    p_grads,
    p_tensors,
    p_owner,
    p_tau,
    p_unit,
    p_clusters,
    p_c,
    p_new,
    p_u,
    p_moments,
    p_states,
    p_partial,
    n_chunk,
    n_most,
    n_moments,
    first_tile,
    n_width,
    first_row,
    n_window,
    MODE: tl.constexpr,
    PLANES: tl.constexpr,
    WITH_G: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    SUMS: tl.constexpr,
    DT: tl.constexpr,
    ACC: tl.constexpr,
    D: tl.constexpr,
    ALIGNED: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
):
    """Program (i, j, l): the sums of chunk i for the j-th tile of centroids, over the rows of a window, added to those
    of the windows before; of the Jacobian, for its l-th few columns. PLANES 0: the only tile.

    UPDATE: a, a x, and for scalars in the Euclidean metric sign(x) a, a |x|. UPSTREAM: a g. RECUR: Q slope. JACOBIAN:
    a_j (w - c'_j) a_l sign(w - c_l).
    """
    i, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, _, start, n, run = chunk_of_program(i, p_tensors, p_owner, n_chunk, 1)
    p, p_g = tensor_pointer(p_weights, t, DT, ALIGNED), tensor_pointer(p_grads, t, DT, ALIGNED) if WITH_G else p_weights
    scale, K, unit = inverse_temperature(p_tau + t, ACC), tl.load(p_clusters + t), tl.load(p_unit + t)
    first = t.to(tl.int64) * n_most
    j = (first_tile + tile) * J + tl.arange(0, J)
    m_j = j < K
    b_c = load_centroids(p_c + first * D, j, m_j, float("inf"), D)
    b_new = load_centroids(p_new + first * D, j, m_j, 0, D) if MODE >= RECUR else b_c
    b_v = b_c
    if MODE == RECUR:
        b_v = load_v(
            Centroids(p_c, p_new, p_u + first * D, p_moments + first * n_moments, K, n_moments, scale, EUCLIDEAN, D, J),
            j,
            m_j,
        )
    sums = repeat_columns(tl.zeros([J, R], ACC), SUMS)
    ALONE: tl.constexpr = PLANES == 0
    end = tl.minimum(tl.minimum(n - start, n_chunk), first_row + n_window).to(tl.int32)
    r = first_row
    while r < end:
        k = r + tl.arange(0, R)
        m, o = k < end, row_offsets(start + k, run, D)
        o_state = i * PLANES * n_window + (k - first_row)
        b_w = load_rows(p, o, m, run, ACC, D, unit)
        b_g = load_rows(p_g, o, m, run, ACC, D) if WITH_G else b_w
        far = distances(b_w, b_c, EUCLIDEAN)
        if ALONE:
            low = tl.min(far, 0)
            e = tl.exp2((low[None, :] - far) * scale)
            rest = tl.where(m, 1 / tl.sum(e, 0), 0)
        else:
            low = tl.load(p_states + o_state, mask=m, other=0)
            rest = tl.load(p_states + o_state + n_window, mask=m, other=0)
            e = tl.exp2((low[None, :] - far) * scale)
        a = e * rest[None, :]
        if MODE == UPDATE:
            terms = (a,)
            for c in tl.static_range(D):
                terms += (a * (b_w[c][None, :] - b_c[c][:, None]),)
            if EUCLIDEAN and D == 1:
                x = b_w[0][None, :] - b_c[0][:, None]
                terms += (with_sign_of(x, a), a * tl.abs(x))
        elif MODE == UPSTREAM:
            terms = ()
            for c in tl.static_range(D):
                terms += (a * b_g[c][None, :],)
        elif MODE == RECUR:
            b_near = b_g
            if WITH_G:
                if ALONE:
                    b_near = new_of_nearest(far, low, b_new, b_w)
                else:
                    b_near = load_rows(p_states + 3 * n_window, o_state, m, n_window, ACC, D)
            P = pull_P(b_w, b_g, b_near, b_new, b_v, WITH_G)
            mean = tl.sum(a * P, 0) if ALONE else tl.load(p_states + o_state + 2 * n_window, mask=m, other=0)
            terms = times_slope(b_w, b_c, a * (P - mean[None, :]), far, EUCLIDEAN)
        else:
            pull = a * (b_w[0][None, :] - b_new[0][:, None])
            terms = ()
            for f in tl.static_range(BESIDE):
                x = b_w[0] - tl.load(p_c + first + tl.minimum(tl.program_id(2) * BESIDE + f, K - 1))
                terms += (pull * with_sign_of(x, tl.exp2((low - tl.abs(x)) * scale) * rest)[None, :],)
        sums = add_terms(sums, terms)
        r += R
    p_sum = p_partial + ((i * tl.num_programs(2) + tl.program_id(2)) * SUMS) * n_width + tile * J + tl.arange(0, J)
    before = tl.zeros([J], tl.int32) < first_row
    for s in tl.static_range(SUMS):
        tl.store(p_sum + s * n_width, tl.load(p_sum + s * n_width, mask=before, other=0) + tl.sum(sums[s], 1))


@triton.jit(do_not_specialize=["n_most", "first_tile"])
def merge_sums(
    p_partial,
    p_tensors,
    p_tau,
    p_clusters,
    p_c,
    p_out,
    p_moments,
    n_chunk,
    n_most,
    first_tile,
    n_width,
    MODE: tl.constexpr,
    SIGNED: tl.constexpr,
    SUMS: tl.constexpr,
    ACC: tl.constexpr,
    D: tl.constexpr,
    J: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Program (t, j, l): the sums over the chunks of tensor t, in float64 and in a fixed order, for a few centroids;
    and what the pass makes of them."""
    t = tl.program_id(0).to(tl.int64)
    n, first, K = field(p_tensors, t, N_ROWS), field(p_tensors, t, FIRST_CHUNK), tl.load(p_clusters + t)
    o = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    j = first_tile * J + o
    m_j = (o < n_width) & (j < K)
    sums = repeat_columns(tl.zeros([LANES, COLUMNS], tl.float64), SUMS)
    i = tl.arange(0, LANES).to(tl.int64)
    while tl.min(i, 0) * n_chunk < n:
        m = (i * n_chunk < n)[:, None] & m_j[None, :]
        p = p_partial + (((first + i) * tl.num_programs(2) + tl.program_id(2)) * (SUMS * n_width))[:, None] + o[None, :]
        terms = ()
        for s in tl.static_range(SUMS):
            terms += (tl.load(p + s * n_width, mask=m, other=0).to(tl.float64),)
        sums = add_terms(sums, terms)
        i += LANES
    m = (o < n_width) & (j < n_most)
    o_out = t * n_most + j
    if MODE == UPDATE:
        S = tl.sum(sums[0], 0)
        MOMENTS: tl.constexpr = 3 if SIGNED else 1
        moved = tl.zeros([COLUMNS], tl.float64)
        for c in tl.static_range(D):
            old = tl.load(p_c + o_out * D + c, mask=m_j, other=0)
            new = (old.to(tl.float64) + tl.where(S == 0, 0, tl.sum(sums[1 + c], 0) / tl.where(S == 0, 1, S))).to(ACC)
            tl.store(p_out + o_out * D + c, new, mask=m)
            moved = new.to(tl.float64) - old.to(tl.float64)
        tl.store(p_moments + o_out * MOMENTS, S.to(ACC), mask=m)
        if SIGNED:
            balance = tl.sum(sums[2], 0)
            tl.store(p_moments + o_out * 3 + 1, balance.to(ACC), mask=m)
            tl.store(p_moments + o_out * 3 + 2, (tl.sum(sums[3], 0) - moved * balance).to(ACC), mask=m)
    elif MODE == JACOBIAN:
        for s in tl.static_range(SUMS):
            column = tl.program_id(2) * BESIDE + s
            tl.store(
                p_out + o_out * n_most + column,
                tl.where(column < K, tl.sum(sums[s], 0), 0),
                mask=m & (tl.zeros_like(j) + column < n_most),
            )
    else:
        factor = 1 / tl.load(p_tau + t).to(tl.float64) if MODE == RECUR else tl.full([], 1, tl.float64)
        for c in tl.static_range(D):
            tl.store(p_out + o_out * D + c, (tl.sum(sums[c], 0) * factor).to(ACC), mask=m)
