"""Hard k-means. One number per row: the exact programme on fine cells, then Lloyd on all rows. More numbers:
k-means++, then Lloyd.

What decides a result is summed in float64 and in an order that depends on the numbers alone: the same bits in every
run, for any number of threads.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

CELLS = 8192  # for the exact programme,
TABLE = 2**22  # fewer where cells x clusters would be more
BLOCK = 64  # numbers per partial sum
SEEDS = 64  # rows per cluster that k-means++ chooses from,
FEWEST_SEEDS = 16384  # and not fewer in all
PAIRS = 2**20  # distances held at once


class _Sums:
    """Sums of the first numbers of a vector, in float64. Blocks are summed from the middle outwards: an outlier at an
    end takes no precision from the rest."""

    def __init__(self, vector):
        n = vector.numel()
        self.size = BLOCK if n >= BLOCK**2 else 1
        blocks = vector[: n // self.size * self.size].view(-1, self.size).double().sum(1)
        self.vector, self.middle = vector, len(blocks) // 2
        self.blocks = _outwards(blocks.cpu(), self.middle).to(vector.device)

    def __call__(self, ends):
        block = ends // self.size
        left = block < self.middle
        index = block[:, None] * self.size + torch.arange(self.size, device=ends.device)
        inside = (index < ends[:, None]) ^ left[:, None]
        begun = torch.where(inside, self.vector[index.clamp_(max=self.vector.numel() - 1)].double(), 0).sum(1)
        return self.blocks[block + left] + torch.where(left, -begun, begun)


def _outwards(x, middle):
    """(..., n + 1) prefix sums that are 0 at `middle`, each side summed from there."""
    left, right = x[..., :middle].flip(-1).cumsum(-1).flip(-1), x[..., middle:].cumsum(-1)
    return torch.cat([-left, x.new_zeros(*x.shape[:-1], 1), right], -1)


def _up_to(values, thresholds):
    """How many of the sorted `values` are <= each float64 threshold."""
    rounded = thresholds.to(values.dtype)
    below = torch.nextafter(rounded, torch.full_like(rounded, -math.inf))
    return torch.searchsorted(values, torch.where(rounded > thresholds, below, rounded), right=True)


def _cells(values, mass, most):
    """Edges of up to `most` cells of the sorted `values`, equal ones together: those that may hold the most inertia
    are halved, by value, again and again."""
    n = values.numel()
    if n <= most:
        first = torch.cat([values.new_ones(1, dtype=torch.bool), values[1:] != values[:-1]])
        return torch.cat([first.nonzero()[:, 0], first.new_tensor([n], dtype=torch.int64)])
    edges = torch.tensor([0, n], device=values.device)
    while True:
        low, high = values[edges[:-1]].double(), values[edges[1:] - 1].double()
        bound, order = (mass(edges).diff() * (high - low).square()).sort(descending=True, stable=True)
        room = min(most - len(order), (len(order) + 1) // 2)
        order = order[:room][bound[:room] > 0]
        if not len(order):
            return edges
        middle = (low[order] + high[order]) / 2
        edges = torch.cat([edges, _up_to(values, torch.where(middle < high[order], middle, low[order]))]).sort().values


def partition(prefix, clusters):
    """The first cell of each of `clusters` runs of cells, of least inertia in all. `prefix`: (3, cells + 1) sums of
    mass, mass x value, mass x value^2.

    `partition` of csrc/cpu/kmeans_programme.h: the same comparisons in the same order, so the same cells.
    """
    mass, first, second = prefix.numpy()
    cells = len(mass) - 1

    def inertia(i, j):
        m, s = mass[j] - mass[i], first[j] - first[i]
        return np.maximum(second[j] - second[i] - np.divide(s * s, m, out=np.zeros_like(m), where=m > 0), 0)

    least, cuts = (
        inertia(np.zeros(cells + 1, np.int64), np.arange(cells + 1)),
        np.zeros((clusters, cells + 1), np.int64),
    )
    for k in range(1, clusters):
        fewer, least, cut = least, np.zeros(cells + 1), cuts[k]
        begin, step = (k + 1 if k + 1 < clusters else cells), 1
        while 2 * step <= cells - begin + 1:
            step *= 2
        while step:  # every second one of the ends of before: between neighbours that are known
            end = np.arange(begin + step - 1, cells + 1, 2 * step)
            low = np.where(end - step < begin, k, cut[end - step])
            high = np.where(end + step > cells, cells - 1, cut[np.minimum(end + step, cells)])
            high = np.minimum(high, end - 1)
            low = np.minimum(np.maximum(low, cuts[k - 1, end]), high)
            count = high - low + 1
            at = np.cumsum(count) - count
            i = np.arange(count.sum()) + np.repeat(low - at, count)
            value = fewer[i] + inertia(i, np.repeat(end, count))
            least[end] = np.minimum.reduceat(value, at)
            hits = np.flatnonzero(value == np.repeat(least[end], count))
            cut[end] = i[hits[np.searchsorted(hits, at)]]
            step //= 2
    starts = [cells]
    for k in reversed(range(clusters)):
        starts.append(cuts[k, starts[-1]])
    return torch.tensor(starts[:0:-1], device="cpu")


def _fit_line(values, weight, clusters, max_iter, partition):
    if weight is not None:
        values, order = values.sort(stable=True)
        weight = weight[order]
        mass, total = _Sums(weight), _Sums(weight * values)
    else:
        if values.device.type == "cpu":
            values.numpy().sort()  # 10 to 30 times as fast as torch.sort
        else:
            values = values.sort().values
        mass, total = Tensor.double, _Sums(values)

    def means(edges, otherwise):
        """Of the values between edges; kept to their range, so that equal values are met exactly."""
        m, t = mass(edges).diff(), total(edges).diff()
        low, high = values[edges[:-1].clamp(max=n - 1)].double(), values[edges[1:] - 1].double()
        return torch.where(m > 0, torch.minimum(torch.maximum(t / m, low), high), otherwise)

    n = values.numel()
    edges = _cells(values, mass, max(clusters, min(CELLS, TABLE // clusters)))
    if len(edges) > clusters + 1:
        m, x = mass(edges).diff().cpu(), means(edges, values[edges[:-1]].double()).cpu()
        x = x - x[len(x) // 2]
        starts = partition(_outwards(torch.stack([m, m * x, m * x * x]), len(x) // 2), clusters)
        edges = torch.cat([edges[starts.to(edges.device)], edges[-1:]])
    edges = torch.cat([edges, edges[-1:].expand(clusters + 1 - len(edges))])
    centroids = values[edges[:-1].clamp(max=n - 1)].double()
    for _ in range(max_iter):
        centroids = means(edges, centroids)
        inner = _up_to(values, (centroids[1:] + centroids[:-1]) / 2)
        if torch.equal(inner, edges[1:-1]):
            break
        edges = torch.cat([edges[:1], inner, edges[-1:]])
    return centroids


def nearest(rows, centroids):
    """The index of the nearest centroid of each row, the lower one of two; distances are taken of differences, in
    blocks of rows."""
    blocks = rows.split(max(1, PAIRS // len(centroids)))
    return torch.cat([torch.cdist(b, centroids, compute_mode="donot_use_mm_for_euclid_dist").argmin(1) for b in blocks])


def draws(n, clusters):
    """What k-means++ draws for n rows, from a fixed seed: (the rows that it chooses from, None for all of them; numbers
    in [0, 1), one for the first centroid and `_tries` for each other)."""
    return _drawn(n if n > max(FEWEST_SEEDS, SEEDS * clusters) else 0, clusters)


def _tries(clusters):
    return 2 + int(math.log(clusters))


@functools.lru_cache(maxsize=16)
def _drawn(n, clusters):
    generator = torch.Generator().manual_seed(0)
    rows = None
    if n:
        rows = torch.randint(n, (max(FEWEST_SEEDS, SEEDS * clusters),), generator=generator, device="cpu")
    tries = 1 + (clusters - 1) * _tries(clusters)
    return rows, torch.rand(tries, generator=generator, dtype=torch.float64, device="cpu")


def _seed(rows, weight, clusters):
    """k-means++, greedy, on the CPU: of some rows drawn in proportion to weight x squared distance from the centroids
    so far, the one that leaves the least."""
    drawn, uniform = draws(len(rows), clusters)
    if drawn is not None:
        drawn = drawn.to(rows.device)
        rows, weight = rows[drawn], None if weight is None else weight[drawn]
    rows = rows.cpu().double()
    weight = rows.new_ones(len(rows)) if weight is None else weight.cpu()
    left, chosen = torch.ones_like(weight), []
    for tries in uniform.split([1] + (clusters - 1) * [_tries(clusters)]):
        share = (left * weight).cumsum(0)
        if share[-1] == 0:
            chosen += chosen[-1:] * (clusters - len(chosen))
            break
        drawn = torch.searchsorted(share, tries * share[-1], right=True).clamp_(max=len(rows) - 1)
        after = torch.cdist(rows[drawn], rows, compute_mode="donot_use_mm_for_euclid_dist").square()
        after = torch.minimum(after, left) if chosen else after
        best = (after * weight).sum(1).argmin()
        left = after[best]
        chosen.append(drawn[best].item())
    return rows[chosen]


def _adder(codes, clusters, in_turn):
    """vector -> its sums by code: number after number, or where that would take atomics (on a GPU) in the order of
    the codes."""
    if in_turn:
        return lambda vector: torch.zeros(clusters, dtype=torch.float64, device=codes.device).index_add_(
            0, codes, vector.double()
        )
    codes, order = codes.sort(stable=True)
    edges = torch.searchsorted(codes, torch.arange(clusters + 1, device=codes.device))
    return lambda vector: _Sums(vector[order])(edges).diff()


def _filled(codes, empty, rows, far):
    """The codes, after each empty cluster has taken the row farthest from its own centroid and from the rows taken
    before."""
    codes = codes.clone()
    for k in empty:
        row = far.argmax()
        if far[row] == 0:
            break
        codes[row] = k
        far = torch.minimum(far, (rows - rows[row]).square().sum(1))
    return codes


def _fit_rows(rows, weight, clusters, max_iter, assign):
    centroids = _seed(rows, weight, clusters).to(rows.device)
    before = None
    for _ in range(max_iter):
        near = centroids.to(rows.dtype)
        found = assign(rows, near).long()
        if before is not None and torch.equal(found, before):
            break
        codes = before = found
        empty = (torch.bincount(codes, minlength=clusters) == 0).nonzero()[:, 0]
        if len(empty):
            codes = _filled(codes, empty, rows, (rows - near[codes]).square().sum(1))
        add = _adder(codes, clusters, rows.device.type == "cpu")
        if weight is None:
            mass, total = torch.bincount(codes, minlength=clusters), [add(x) for x in rows.unbind(1)]
        else:
            mass, total = add(weight), [add(weight * x) for x in rows.unbind(1)]
        centroids = torch.where((mass > 0)[:, None], torch.stack(total, 1) / mass[:, None], centroids)
    return centroids


def fit(rows, clusters, weight, max_iter, *, assign=nearest, partition=partition):
    """Centroids of the rows (N, d), in their dtype: (K,) for d = 1, else (K, d). `weight`: None, or N float64 numbers
    >= 0.

    The pieces that have faster versions: `assign(rows, centroids)`, the code of each row (d > 1), and
    `partition(prefix, clusters)`, as above (d = 1).
    """
    d = rows.shape[1]
    if not math.isfinite(_largest(rows)):
        return rows.new_full((clusters,) if d == 1 else (clusters, d), math.nan)
    if weight is not None:
        rows, weight = rows[weight > 0], weight[weight > 0]
        weight = weight / _power(_largest(weight), 1000)
    scale = _power(_largest(rows), 100 if rows.dtype == torch.float32 else 1000)
    rows = rows * (1 / scale)
    centroids = (
        _fit_line(rows[:, 0], weight, clusters, max_iter, partition)
        if d == 1
        else _fit_rows(rows, weight, clusters, max_iter, assign)
    )
    return (centroids * scale).to(rows.dtype)


def _largest(x):
    low, high = torch.aminmax(x)
    return max(-low.item(), high.item())


def _power(x, limit):
    """The power of two next above x, within limits: divided by it, squares neither overflow nor vanish."""
    return 2.0 ** max(-limit, min(limit, math.frexp(x)[1]))
