"""Draws of numbers, what k-means minimises of them, and the least that it can be."""

import math

import numpy as np
import torch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def laplace(n, seed=0):
    u = torch.rand(2, n, generator=generator(seed))
    return u[0].log() - u[1].log()


def student(n, seed=0):
    z = normal(4, n, seed=seed)
    return z[0] / (z[1:].square().sum(0) / 3).sqrt()


DRAWS = {"gaussian": normal, "laplace": laplace, "student": student}


def inertia(rows, centroids, weight=1.0):
    """The sum that k-means minimises, in float64; rows (N,) or (N, d)."""
    rows, centroids = (t.double().reshape(len(t), -1) for t in (rows, centroids))
    near = torch.cat(
        [
            torch.cdist(block, centroids, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
            for block in rows.split(4096)
        ]
    )
    return (weight * near.square()).sum().item()


def prefix(values, mass=None):
    """What `partition` takes, of sorted values."""
    x = values.double() - values.double().mean()
    m = torch.ones_like(x) if mass is None else mass.double()
    return torch.cat([torch.zeros(3, 1, dtype=torch.float64), torch.stack([m, m * x, m * x * x]).cumsum(1)], 1)


def textbook(sums, clusters):
    """The least inertia in up to `clusters` clusters, by the plain O(K N^2) programme."""
    m, s, q = sums.numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        cost = (q - q[:, None]) - (s - s[:, None]) ** 2 / (m - m[:, None])
    cost[np.tril_indices(len(m))] = math.inf
    least = [cost[0]]
    for _ in range(clusters - 1):
        least.append(np.min(least[-1][:, None] + cost, 0))
    return [x[-1] for x in least]


def cost_of(sums, starts):
    m, s, q = sums[:, [*starts, sums.shape[1] - 1]].diff()
    return (q - s * s / m).sum().item()
