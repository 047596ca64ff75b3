"""What kmeans finds: the exact optimum where it is known, and the same bits always.

Its arguments and edges are in test_calls.py.
"""

import importlib
import itertools
import math

import numpy as np
import pytest
import torch
from points import DRAWS, cost_of, generator, inertia, laplace, normal, prefix, student, textbook

import r2kernels

public = importlib.import_module("r2kernels.functional.kmeans")
tuned = importlib.import_module("r2kernels.algorithms.kmeans")
kmeans = public.kmeans


@pytest.fixture
def native():
    found = public._native()
    return found.partition if found else pytest.skip("the extension is not usable")


SMALL = [normal(150), normal(150).round(decimals=1), torch.arange(120.0), student(150).pow(3), torch.arange(101) // 50]


@pytest.mark.parametrize("values", SMALL, ids=["gaussian", "ties", "grid", "tails", "three values"])
def test_the_programme_is_exact(values, native):
    """Against the textbook, ties and all; native and eager give the same cells to the last."""
    values = values.sort().values
    for mass in (None, torch.rand(len(values), generator=generator(1)) + 0.1):
        sums = prefix(values, mass)
        best = textbook(sums, 30)
        for k in (1, 2, 3, 4, 7, 16, 30):
            starts = tuned.partition(sums, k)
            assert starts[0] == 0 and (starts.diff() > 0).all() and len(starts) == k and starts[-1] < len(values)
            assert cost_of(sums, starts) == pytest.approx(best[k - 1], rel=1e-9, abs=1e-12 * sums[2, -1].item())
            assert torch.equal(native(sums, k), starts)
    assert torch.equal(native(sums, len(values)), torch.arange(len(values)))
    assert torch.equal(tuned.partition(sums, len(values)), torch.arange(len(values)))


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("n", [5_000, 20_000])
def test_optimum(draw, n, native):
    """Within 0.1 % of the exact optimum on the points themselves, with cells and without."""
    values = DRAWS[draw](n).sort().values
    for clusters in (4, 16, 64):
        best = cost_of(prefix(values), native(prefix(values), clusters))
        assert inertia(values, kmeans(values, clusters)) <= 1.001 * best


@pytest.mark.parametrize("draw", DRAWS)
def test_optimum_with_weights(draw, native):
    values, order = DRAWS[draw](20_000).sort()
    weight = laplace(20_000, seed=1).abs()[order]
    for clusters in (4, 16, 64):
        best = cost_of(prefix(values, weight), native(prefix(values, weight), clusters))
        assert inertia(values, kmeans(values, clusters, weight=weight), weight) <= 1.001 * best


def test_outliers_take_one_centroid_each_and_nothing_more():
    values = normal(50_000)
    outliers = torch.tensor([-3e7, 1e6, 4e12])
    alone, found = kmeans(values, 13), kmeans(torch.cat([outliers, values]), 16)
    assert torch.equal(found[[0, 14, 15]], outliers)
    assert inertia(values, found[1:14]) <= 1.0001 * inertia(values, alone)


def test_lloyd_has_settled():
    """Every centroid is the mean of the rows nearest to it."""
    for clusters, d in ((4, 1), (16, 1), (5, 2), (9, 4)):
        rows = student(12_000).reshape(-1, d)
        found = kmeans(rows, clusters, cluster_dim=d, layout="contiguous", max_iter=1000).reshape(-1, d)
        codes = tuned.nearest(rows, found)
        for k in range(clusters):
            torch.testing.assert_close(found[k], rows[codes == k].double().mean(0).float(), rtol=1e-5, atol=1e-6)
    few, many = (inertia(rows, kmeans(rows, 32, cluster_dim=4, layout="contiguous", max_iter=m)) for m in (1, 30))
    assert many < few


@pytest.mark.parametrize("d", [1, 2, 4])
def test_the_same_bits_for_any_number_of_threads(d):
    rows, weight = laplace(120_000).reshape(-1, d), torch.rand(120_000 // d, generator=generator(2))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            found.append(
                [kmeans(rows, 11, cluster_dim=d, layout="contiguous", weight=w, max_iter=5) for w in (None, weight)]
            )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0]) and torch.equal(other[1], found[0][1])


def test_the_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    kmeans(normal(4000), 8, cluster_dim=2)
    assert torch.equal(torch.rand(3), expected)


def test_no_way_leaves_less(monkeypatch):
    """The backend chosen, the extension missing: each its own programme; none leaves less than the extension."""
    ws = [student(100_000), normal(300, 40), normal(7), normal(5000).round(decimals=1)]
    found, others = kmeans(ws, 6), []
    with r2kernels.use_backend("reference"):
        others.append(kmeans(ws, 6))
    monkeypatch.setattr(
        importlib.import_module("r2kernels.backends.native"),
        "load",
        lambda name: (_ for _ in ()).throw(ImportError("not built")),
    )
    assert public._native() is None
    others += [kmeans(ws, 6), r2kernels.reference.kmeans(ws[1:], 6)]
    assert all(torch.equal(a, b) for a, b in zip(*others[:2], strict=True))
    for other in others:
        for w, c, less in zip(ws[-len(other) :], other, found[-len(other) :], strict=True):
            assert inertia(w.reshape(-1), less) <= inertia(w.reshape(-1), c) * (1 + 1e-9)
    with (
        pytest.raises(RuntimeError, match="backend 'cuda' was chosen explicitly but cannot be used"),
        r2kernels.use_backend("cuda"),
    ):
        kmeans(ws, 6)


def test_an_assign_of_another_make():
    rows, calls = normal(3000, 2), []

    def assign(rows, centroids):
        calls.append(rows.shape)
        return torch.cdist(rows, centroids).argmin(1).to(torch.uint8)

    found = tuned.fit(rows, 6, None, 100, assign=assign)
    assert calls and inertia(rows, found) == pytest.approx(inertia(rows, tuned.fit(rows, 6, None, 100)), rel=1e-3)


def test_sums_by_code():
    """What a GPU does, in the order of the codes, against number after number."""
    codes, vector = torch.randint(37, (10_001,), generator=generator()), student(10_001)
    codes[codes == 5] = 6
    a, b = (tuned._adder(codes, 40, in_turn)(vector) for in_turn in (True, False))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert a.dtype == b.dtype == torch.float64 and b[5] == 0 == b[39]


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, 5000])
def test_sums_of_a_sorted_vector(n):
    vector = student(n).sort().values
    vector[0] = -1e12
    ends = torch.tensor(sorted({0, n, n // 2, n // 3, min(n, 64), n - 1, min(n, 2)}))
    expected = torch.stack([vector[a:b].double().sum() for a, b in itertools.pairwise(ends)])
    torch.testing.assert_close(tuned._Sums(vector)(ends).diff(), expected, rtol=1e-9, atol=1e-9)


def test_integer_weights_are_repetitions():
    for d in (1, 2, 3):
        rows, weight = laplace(1200 * d).reshape(-1, d), torch.randint(1, 5, (1200,), generator=generator(3))
        found = kmeans(rows, 7, cluster_dim=d, layout="contiguous", weight=weight.float())
        torch.testing.assert_close(
            found, kmeans(rows.repeat_interleave(weight, 0), 7, cluster_dim=d, layout="contiguous")
        )


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_weight_zero_do_not_count(d, dtype):
    rows = normal(9000 * d).reshape(-1, d)
    weight = torch.randint(0, 3, (9000,), generator=generator(1)).to(dtype)
    rows[weight == 0] *= 1e20
    found = kmeans(rows, 5, cluster_dim=d, layout="contiguous", weight=weight)
    assert torch.equal(
        found, kmeans(rows[weight > 0], 5, cluster_dim=d, layout="contiguous", weight=weight[weight > 0])
    )
    assert found.abs().max() < 10
    assert torch.equal(found, kmeans(rows, 5, cluster_dim=d, layout="contiguous", weight=weight.double() * 2.0**-900))


def test_equal_weights_are_none():
    values = student(30_000)
    torch.testing.assert_close(kmeans(values, 9, weight=torch.full((300, 100), 0.3)), kmeans(values, 9))
    assert torch.equal(kmeans(values, 9, weight=torch.full((30_000,), 4.0)), kmeans(values, 9))


def test_order_and_shape_do_not_matter_for_single_numbers():
    values = student(30_000)
    found = kmeans(values, 16)
    for other in (
        values.flip(0),
        values[torch.randperm(30_000, generator=generator())],
        values.view(30, 100, 10).permute(2, 0, 1),
        values.view(300, 100).t(),
    ):
        assert torch.equal(kmeans(other, 16), found)
    assert torch.equal(kmeans(values.view(300, 100), 16, layout="contiguous"), found)


@pytest.mark.parametrize("d", [2, 3, 4, 8])
def test_rows_against_scikit_learn(d):
    """On average no worse than one run of its k-means++ by more than 5 %."""
    cluster = pytest.importorskip("sklearn.cluster")
    ratios = []
    for clusters in (8, 32):
        blobs = (
            normal(clusters, d, seed=9)[torch.randint(clusters, (5000,), generator=generator(4))] * 4
            + normal(5000, d) * 0.3
        )
        for rows in (normal(5000, d), student(5000 * d).reshape(-1, d), blobs, normal(20_000, d, seed=1)):
            theirs = [
                cluster.KMeans(clusters, n_init=1, max_iter=100, tol=0, random_state=seed).fit(rows.numpy()).inertia_
                for seed in range(3)
            ]
            ratios.append(inertia(rows, kmeans(rows, clusters, cluster_dim=d, layout="contiguous")) / np.mean(theirs))
    assert np.mean(ratios) <= 1.05


def test_empty_clusters_take_the_farthest_rows(monkeypatch):
    rows = torch.cat([normal(500, 2) * 0.01 + centre for centre in torch.tensor([[0.0, 0], [5, 0], [0, 5], [7, 7]])])
    monkeypatch.setattr(tuned, "_seed", lambda rows, weight, clusters: rows[:1].double().expand(clusters, -1).clone())
    found = kmeans(rows, 4, cluster_dim=2, layout="contiguous")
    assert sorted(found.round().abs().tolist()) == [[0, 0], [0, 5], [5, 0], [7, 7]]


def test_many_numbers():
    """Two million of them, and as many clusters as cells and more."""
    values = normal(2_000_000)
    found = kmeans([values, values[:30_000]], [256, 3000])
    assert all((f.diff() > 0).all() and f.isfinite().all() for f in found)
    # Panter and Dite: sqrt(3) pi / 2 / K^2 of the variance, in the limit
    assert inertia(values[:200_000], found[0]) / 200_000 == pytest.approx(math.sqrt(3) * math.pi / 2 / 256**2, rel=0.03)
