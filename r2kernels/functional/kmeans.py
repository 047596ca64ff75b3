"""Hard k-means: what a user calls."""

import functools

import torch

from .. import ops
from ..algorithms.kmeans import draws, fit
from ..backends import select, serving
from ..reference import checks, parameters
from ..reference.columns import columns
from ..reference.zeros import anchored, with_zero
from ..sharding import is_sharded
from ..sharding.whole import on_owners
from .differentiable import weights

MOST = 2**31  # numbers of a tensor that the extension sorts with 32-bit places


def kmeans(W, clusters, *, cluster_dim=1, layout="output", weight=None, max_iter=100, preserve_zeros=False):
    """The K = `clusters` centroids c that (locally) minimise sum_i weight_i min_k |x_i - c_k|^2 over the rows x_i of
    W, without gradient.

    A tensor gives (K,) in ascending order for `cluster_dim=1`, else (K, d); a sequence of tensors gives a list of
    those, and `clusters` may then be a sequence of ints. float32 (float64 for float64 W). Rows are read as
    everywhere: `layout="output"` is `W.transpose(0, -1).reshape(-1, d)`, `"contiguous"` is `W.reshape(-1, d)`; the
    numel mod d leftovers are ignored. `weight` is a floating-point tensor of one number >= 0 per row (any shape; for
    a sequence a sequence of them, each may be None); rows of weight 0 do not count.

    d = 1: the exact programme (Wang and Song 2011, Ckmeans.1d.dp; by divide and conquer, Grønlund et al. 2017) on cells
    of about equal inertia that become finer around the best cuts until they are the distinct values of W; then Lloyd
    (1982) on all rows. Above 724 clusters there is one stage, of 2^22 / K cells, above 2048 one for each cluster. Of a
    list all tensors are clustered in one call, whose cost depends on their numbers alone; numbers of 16 bits (and of
    float8, which is taken here) are counted by value. On other devices than the CPU, and without the extension, there
    is one stage, of 8192 cells; in CUDA C++, which serves all tensors of at most 65536 numbers and 512 clusters in one
    call, of 2048. d > 1: greedy k-means++ (Arthur and Vassilvitskii 2007) from a fixed seed, on at most max(64 K,
    16384) rows, then Lloyd; a cluster left empty takes the row farthest from its centroid. Lloyd ends when no row
    changes its cluster, or after `max_iter` rounds.

    preserve_zeros: one centroid is exactly 0 and the K - 1 others (K >= 2) fit the rows that are not, so that zeros of
    W (of rows of d: rows of d zeros) are zeros of what is looked up. Other rows to which 0 is nearest take it as well:
    the inertia is the least with a centroid there.

    A DTensor is brought to one of the ranks that share it, one layer at a time on each rank; all ranks must call.
    `weight` is then whole on every rank, or a DTensor as W.

    The same bits in every run and for any number of threads. A NaN or an infinity anywhere in W gives NaN centroids.
    With more clusters than distinct rows, centroids are repeated (d = 1: the largest); more clusters than rows warn.
    Values are read back to the host: this is for setting up, not for a training step.

    TypeError or ValueError for a wrong type, dtype, device, shape or length; for an empty tensor; for `clusters` or
    `max_iter` below 1; for a `weight` that is negative, infinite, NaN, or 0 for every row.
    """
    ws, single = weights("kmeans", _widened(W), cluster_dim, layout, empty=False)
    checks.count("max_iter", max_iter)
    counts, masses = checks.clusters(clusters, ws, single), parameters.masses(weight, ws, single, cluster_dim)
    checks.clusters_with_zero(preserve_zeros, counts)
    for i, (w, count, mass) in enumerate(zip(ws, counts, masses, strict=True)):
        name, rows = "W" if single else f"W[{i}]", w.numel() // cluster_dim
        checks.warn_of_repeated_centroids(count, rows, mass, name, stacklevel=2)

    def work(some):
        """Of some tensors by number: [(number, whole tensor)]."""
        wholes = [w for _, w in some]
        how = [counts[i] for i, _ in some], [masses[i] for i, _ in some], max_iter, preserve_zeros
        if cluster_dim == 1 and _has_lines(wholes):
            return _lines(wholes, *how)
        return _rows([columns(w.detach(), cluster_dim, layout).t() for w in wholes], *how)

    if is_sharded(ws):
        shapes = [(k,) if cluster_dim == 1 else (k, cluster_dim) for k in counts]
        found = on_owners(ws, shapes, lambda i, w: work([(i, w)])[0])
    else:
        found = work(list(enumerate(ws)))
    return found[0] if single else found


def grouped(W, clusters, *, weight=None, max_iter=100, preserve_zeros=False):
    """`kmeans` of every row of W (G, n), as (G, K) in one call; `weight` (G, n) or None, not 0 for a whole row.

    Checks nothing, and warns of nothing: for groups that the caller has cut from a weight.
    """
    if _has_lines([W]):
        mass = None if weight is None else weight.double().contiguous()
        c = _native().fit_block(W.detach().contiguous().resolve_neg(), clusters, mass, max_iter, preserve_zeros)
        return with_zero(c.unsqueeze(-1)).squeeze(-1) if preserve_zeros else c
    masses = [None] * len(W) if weight is None else list(weight.double().unbind())
    rows = [columns(w.detach()).t() for w in W.unbind()]
    return torch.stack(_rows(rows, [clusters] * len(W), masses, max_iter, preserve_zeros))


def _widened(W):
    """8-bit numbers in the 16 bits that hold them all."""
    if isinstance(W, (list, tuple)):
        return [_widened(w) for w in W]
    is_narrow = isinstance(W, torch.Tensor) and W.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    return W.to(torch.bfloat16) if is_narrow else W


def _native():
    """The launchers of the extension, or None where there is none."""
    from ..backends import native

    return native if _loads(native.load) else None


@functools.cache
def _loads(load):
    try:
        load("cpu")
    except (ImportError, OSError):
        return False
    return True


def _has_lines(ws):
    """Whether the extension can cluster the numbers of these tensors."""
    device = ws[0].device
    small = all(w.numel() < MOST for w in ws)
    return device.type == "cpu" and small and serving(device) != "reference" and _native() is not None


def _lines(ws, counts, masses, max_iter, preserve_zeros):
    """Centroids (K,) of the numbers of tensors on the CPU, all in one call."""
    flat = [w.detach().resolve_neg().contiguous() for w in ws]
    masses = [None if m is None else m.contiguous() for m in masses]
    found = _native().fit_lines(flat, counts, masses, max_iter, preserve_zeros)
    return [with_zero(c[:, None])[:, 0] for c in found] if preserve_zeros else found


def _rows(rows, counts, masses, max_iter, preserve_zeros):
    """Centroids of the rows (N, d) of tensors: what a kernel takes in one call, the others one after the other."""
    rows = [x.contiguous().resolve_neg() for x in rows]
    if preserve_zeros:
        pairs = [anchored(x, mass) for x, mass in zip(rows, masses, strict=True)]
        rows, masses = [x for x, _ in pairs], [mass for _, mass in pairs]
    found = _fitted(rows, counts, masses, max_iter)
    return [with_zero(c.reshape(len(c), -1)).reshape(c.shape) for c in found] if preserve_zeros else found


def _assigned(x, c):
    """The code of each row (N, d)."""
    return ops.assign.fwd([x], c[None], (len(c),), x.shape[1], "contiguous")[0]


def _fitted(rows, counts, masses, max_iter):
    device, d = rows[0].device, rows[0].shape[1]
    name = serving(device, scatters=True)
    if name == "reference":
        return [fit(x, k, mass, max_iter) for x, k, mass in zip(rows, counts, masses, strict=True)]
    native, found = _native(), {}
    if d > 1 and name == "cpu":
        return native.fit_rows(rows, counts, masses, max_iter, draws)
    if d == 1 and name == "cuda":
        cuda = select(device, scatters=True)
        some = [i for i, (x, k) in enumerate(zip(rows, counts, strict=True)) if cuda.serves_line(len(x), k)]
        values, clusters, weights = ([of[i] for i in some] for of in (rows, counts, masses))
        made = cuda.fit_lines([x[:, 0] for x in values], clusters, weights, max_iter) if some else []
        found = dict(zip(some, made, strict=True))
    pieces = {"assign": _assigned}
    if native is not None:
        pieces["partition"] = native.partition
    return [
        found[i] if i in found else fit(x, k, mass, max_iter, **pieces)
        for i, (x, k, mass) in enumerate(zip(rows, counts, masses, strict=True))
    ]
