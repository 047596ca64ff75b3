"""Hard k-means as Lloyd (1982) has it: every row to its nearest centroid, every centroid to the mean of its rows.

Started RESTARTS times by k-means++ (Arthur and Vassilvitskii 2007); what leaves the least inertia is kept. Equal rows
count as one of their summed weight. Everything is computed in float64, from a fixed seed.
"""

import torch

from . import checks, parameters
from .columns import columns
from .zeros import anchored, with_zero

RESTARTS = 10


def kmeans(W, clusters, *, cluster_dim=1, layout="output", weight=None, max_iter=100, preserve_zeros=False):
    ws, single = checks.weights(W, cluster_dim, layout, empty=False)
    checks.count("max_iter", max_iter)
    counts, masses = checks.clusters(clusters, ws, single), parameters.masses(weight, ws, single, cluster_dim)
    checks.clusters_with_zero(preserve_zeros, counts)
    found = []
    for i, (w, count, mass) in enumerate(zip(ws, counts, masses, strict=True)):
        rows = columns(w.detach(), cluster_dim, layout).t()
        checks.warn_of_repeated_centroids(count, len(rows), mass, "W" if single else f"W[{i}]", stacklevel=2)
        if preserve_zeros:
            c = fit(*anchored(rows, mass), count, max_iter)
            found.append(with_zero(c.reshape(count, -1)).reshape(c.shape))
        else:
            found.append(fit(rows, mass, count, max_iter))
    return found[0] if single else found


def fit(rows, mass, clusters, max_iter):
    """Centroids of the rows (N, d): (K,) in ascending order for d = 1, else (K, d)."""
    n, d = rows.shape
    if not rows.isfinite().all():
        return rows.new_full((clusters,) if d == 1 else (clusters, d), torch.nan)
    mass = rows.new_ones(n, dtype=torch.float64) if mass is None else mass
    x, place = rows[mass > 0].double().unique(dim=0, return_inverse=True)
    mass = mass.new_zeros(len(x)).index_add(0, place, mass[mass > 0])
    if len(x) <= clusters:
        c = torch.cat([x, x[-1:].expand(clusters - len(x), d)])
    else:
        generator = torch.Generator().manual_seed(0)
        starts = [seed(x, mass, clusters, generator) for _ in range(RESTARTS)]
        c = min((lloyd(x, mass, start, max_iter) for start in starts), key=lambda c: inertia(x, mass, c))
    return (c[:, 0].sort().values if d == 1 else c).to(rows.dtype)


def distance(x, c):
    """(N, K), of differences."""
    return torch.cdist(x, c, compute_mode="donot_use_mm_for_euclid_dist")


def inertia(x, mass, c):
    """sum_i mass_i min_k |x_i - c_k|^2"""
    return (mass * distance(x, c).amin(1).square()).sum().item()


def seed(x, mass, clusters, generator):
    """k-means++: each next row is drawn in proportion to mass x squared distance from those drawn before."""
    share, drawn = mass, []
    for _ in range(clusters):
        drawn.append(torch.multinomial((share / share.sum()).cpu(), 1, generator=generator).item())
        share = mass * distance(x, x[drawn]).amin(1).square()
    return x[drawn]


def lloyd(x, mass, c, max_iter):
    """The centroids that `c` settles at; one without rows stays where it is."""
    for _ in range(max_iter):
        codes = distance(x, c).argmin(1)
        total = mass.new_zeros(len(c)).index_add(0, codes, mass)[:, None]
        new = torch.zeros_like(c).index_add(0, codes, mass[:, None] * x) / total
        new = torch.where(total > 0, new, c)
        if torch.equal(new, c):
            break
        c = new
    return c
