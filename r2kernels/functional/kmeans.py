"""Hard k-means: what a user calls."""

from .. import ops
from ..algorithms.kmeans import fit
from ..backends import serving
from ..reference import checks, parameters
from ..reference.columns import columns
from ..reference.zeros import anchored, with_zero
from ..sharding import is_sharded
from ..sharding.whole import on_owners
from .differentiable import weights


def kmeans(W, clusters, *, cluster_dim=1, layout="output", weight=None, max_iter=100, preserve_zeros=False):
    """The K = `clusters` centroids c that (locally) minimise sum_i weight_i min_k |x_i - c_k|^2 over the rows x_i of
    W, without gradient.

    A tensor gives (K,) in ascending order for `cluster_dim=1`, else (K, d); a sequence of tensors gives a list of
    those, and `clusters` may then be a sequence of ints. float32 (float64 for float64 W). Rows are read as
    everywhere: `layout="output"` is `W.transpose(0, -1).reshape(-1, d)`, `"contiguous"` is `W.reshape(-1, d)`; the
    numel mod d leftovers are ignored. `weight` is a floating-point tensor of one number >= 0 per row (any shape; for
    a sequence a sequence of them, each may be None); rows of weight 0 do not count.

    d = 1: the exact programme (Wang and Song 2011, Ckmeans.1d.dp; by divide and conquer, Grønlund et al. 2017) on the
    distinct values of W, or where they are more than 8192 on so many cells of about equal inertia; then Lloyd (1982)
    on all rows. Above 512 clusters there are fewer cells, above 2048 one for each cluster. d > 1: greedy k-means++
    (Arthur and Vassilvitskii 2007) from a fixed seed, on at most max(64 K, 16384) rows, then Lloyd; a cluster left
    empty takes the row farthest from its centroid. Lloyd ends when no row changes its cluster, or after `max_iter`
    rounds.

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
    ws, single = weights("kmeans", W, cluster_dim, layout, empty=False)
    checks.count("max_iter", max_iter)
    counts, masses = checks.clusters(clusters, ws, single), parameters.masses(weight, ws, single, cluster_dim)
    checks.clusters_with_zero(preserve_zeros, counts)
    pieces = {} if serving(ws[0].device) == "reference" else _pieces()

    def work(i, w):
        rows = columns(w.detach(), cluster_dim, layout).t().contiguous().resolve_neg()
        count, mass = counts[i], masses[i]
        checks.warn_of_repeated_centroids(count, rows, mass, "W" if single else f"W[{i}]", stacklevel=3)
        if preserve_zeros:
            rows, mass = anchored(rows, mass)
        c = fit(rows, count, mass, max_iter, **pieces)
        return with_zero(c.reshape(count, -1)).reshape(c.shape) if preserve_zeros else c

    if is_sharded(ws):
        found = on_owners(ws, [(k,) if cluster_dim == 1 else (k, cluster_dim) for k in counts], work)
    else:
        found = []
        for i, w in enumerate(ws):
            found.append(work(i, w))  # no comprehension: warnings count frames
    return found[0] if single else found


def _pieces():
    """The steps of `fit` that have faster versions. Beside Triton the extension may be missing: numpy's
    programme then gives the same cells."""
    from ..backends import native

    pieces = {"assign": lambda rows, c: ops.assign.fwd([rows], c[None], (len(c),), rows.shape[1], "contiguous")[0]}
    try:
        native.load("cpu")
    except (ImportError, OSError):
        return pieces
    return {**pieces, "partition": native.partition}
