"""kmeans with preserve_zeros: a centroid that is exactly 0, and the best others beside it."""

import math

import pytest
import torch
from points import generator, inertia, normal

import r2kernels as r2

LAYERS = pytest.mark.parametrize("layer", [r2, r2.reference], ids=["r2kernels", "reference"])


def best(values, clusters):
    """The least inertia of sorted numbers with 0 as a centroid, by trying every cut: with 0 one run is its own."""
    x = values.double().tolist()
    n = len(x)

    def cost(i, j, at_zero):
        run = x[i:j]
        mean = 0 if at_zero or not run else sum(run) / len(run)
        return sum((v - mean) ** 2 for v in run)

    free, with_zero = [0.0] + [math.inf] * n, [math.inf] * (n + 1)  # least costs of the first j numbers
    for _ in range(clusters):
        fits = [(i, j) for j in range(n + 1) for i in range(j + 1)]
        before, free, with_zero = (free, with_zero), [math.inf] * (n + 1), [math.inf] * (n + 1)
        for i, j in fits:
            mean, zero = cost(i, j, False), cost(i, j, True)
            free[j] = min(free[j], before[0][i] + mean)
            with_zero[j] = min(with_zero[j], before[1][i] + mean, before[0][i] + zero)
    return with_zero[n]


@pytest.mark.parametrize("clusters", [2, 3, 5])
def test_optimum(clusters):
    """Of few numbers, pruned or not, the exact one."""
    for seed, pruned in ((0, 0), (1, 10), (2, 15)):
        w = normal(20, seed=seed) + 0.3
        w[:pruned] = 0
        c = r2.kmeans(w, clusters, preserve_zeros=True)
        assert (c == 0).sum() == 1 and torch.equal(c, c.sort().values)
        assert inertia(w, c) == pytest.approx(best(w.sort().values, clusters), rel=1e-5)


@LAYERS
def test_two_clusters(layer):
    """One is 0, and the other the mean of what is nearer to it than to 0."""
    w = torch.tensor([0.0, 0, 0, -1, -1, 1, 3, 3])
    assert layer.kmeans(w, 2, preserve_zeros=True).tolist() == [0, 3]
    assert layer.kmeans(-w, 2, preserve_zeros=True).tolist() == [-3, 0]


@LAYERS
def test_rows(layer):
    g = generator(1)
    w = torch.randn(8, 6, generator=g)
    w[2:6] = 0
    c = layer.kmeans(w, 3, cluster_dim=2, layout="contiguous", preserve_zeros=True)
    assert c.shape == (3, 2) and (c == 0).all(1).sum() == 1
    codes = r2.assign(w, c, cluster_dim=2, layout="contiguous")
    assert (c[codes.long()].reshape(8, 6)[2:6] == 0).all()


@LAYERS
def test_edges(layer):
    """Nothing but zeros, nothing that is 0, numbers whose squares vanish, few values, NaN; weights of rows."""
    assert layer.kmeans(torch.zeros(9), 4, preserve_zeros=True).tolist() == [0] * 4
    assert layer.kmeans(torch.tensor([1.0, 5.0, 6.0]), 2, preserve_zeros=True).tolist() == [0, 5.5]
    tiny = 1e-30 * torch.tensor([0.0, 1, 1, 4, 4])
    torch.testing.assert_close(layer.kmeans(tiny, 3, preserve_zeros=True), tiny[[0, 1, 3]], rtol=1e-6, atol=0)
    few = torch.tensor([0.0, 2.0, 2.0, 2.0])
    assert layer.kmeans(few, 4, preserve_zeros=True).tolist() == [0, 2, 2, 2]
    assert layer.kmeans(torch.tensor([0.0, torch.nan, 2.0]), 2, preserve_zeros=True).isnan().all()
    w, mass = torch.tensor([0.0, 4, 8, 8]), torch.tensor([1.0, 3, 1, 0])
    assert layer.kmeans(w, 2, preserve_zeros=True, weight=mass).tolist() == [0, 5]


@LAYERS
def test_bad_input(layer):
    with pytest.raises(ValueError, match=r"clusters must be >= 2 with preserve_zeros=True, of which one is 0, got 1"):
        layer.kmeans([torch.ones(3)] * 2, [2, 1], preserve_zeros=True)
    with pytest.raises(TypeError, match="preserve_zeros must be True or False, got 'yes'"):
        layer.kmeans(torch.ones(3), 2, preserve_zeros="yes")
