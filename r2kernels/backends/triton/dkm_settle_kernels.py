"""What a step of training ends with: new centroids where they are finite, and how far apart they are."""

import triton
import triton.language as tl


@triton.jit
def settle_groups(
    p_old, p_new, p_made, p_spacings, p_sound, n_clusters, D: tl.constexpr, SQUARED: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per group. Distances are float64."""
    i = tl.program_id(0).to(tl.int64)
    first, k = i * n_clusters * D, tl.arange(0, BLOCK)
    m = k < n_clusters
    n_wrong = tl.zeros([BLOCK], tl.int32)
    for j in range(D):
        new = tl.load(p_new + first + k * D + j, mask=m, other=0)
        n_wrong += tl.where(tl.abs(new) < float("inf"), 0, 1)
    sound = tl.sum(n_wrong, 0) == 0
    for j in range(D):
        o = first + k * D + j
        new, old = tl.load(p_new + o, mask=m), tl.load(p_old + o, mask=m)
        tl.store(p_made + o, tl.where(sound, new.to(old.dtype), old), mask=m)
    nearest = tl.full([BLOCK], float("inf"), tl.float64)
    for other in range(n_clusters):
        square = tl.zeros([BLOCK], tl.float64)
        for j in range(D):
            o, at = first + k * D + j, first + other * D + j
            new, old = tl.load(p_new + o, mask=m, other=0), tl.load(p_old + o, mask=m, other=0)
            c = tl.where(sound, new.to(old.dtype), old).to(tl.float64)
            far = tl.where(sound, tl.load(p_new + at).to(old.dtype), tl.load(p_old + at)).to(tl.float64)
            square = tl.abs(c - far) if D == 1 else square + (c - far) * (c - far)
        distance = square if D == 1 else tl.sqrt(square)
        nearest = tl.where((k == other) | (nearest < distance), nearest, distance)
    mean = tl.sum(tl.where(m, nearest, 0), 0) / n_clusters
    mean = tl.where((mean > 0) & (mean < float("inf")), mean, 1.0)
    tl.store(p_spacings + i, mean * mean if SQUARED else mean)
    tl.store(p_sound + i, sound)
