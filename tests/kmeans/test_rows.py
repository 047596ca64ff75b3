"""k-means of rows of d for all groups of a list in one call, against algorithms.kmeans group by group."""

import importlib
import itertools
import math

import pytest
import torch
from points import generator, inertia, normal

from r2kernels.algorithms import kmeans as tuned
from r2kernels.backends import backends, native
from r2kernels.reference.zeros import anchored

public = importlib.import_module("r2kernels.functional.kmeans")
pytestmark = pytest.mark.skipif(backends()["cpu"] is not None, reason=f"no extension: {backends()['cpu']}")


def fit_rows(rows, clusters, weights=None, max_iter=100):
    return native.fit_rows(rows, clusters, weights, max_iter, tuned.draws)


def drawn(kind, n, d, seed=0):
    rows = normal(n, d, seed=seed)
    if kind == "clustered":
        return 0.05 * rows + normal(12, d, seed=5)[torch.randint(12, (n,), generator=generator(3))]
    if kind == "tied":
        return rows.mul(2).round().div(2)
    if kind == "repeated":
        return rows[torch.randint(max(1, n // 10), (n,), generator=generator(4))]
    return rows


def masses(kind, n):
    if kind is None:
        return None
    weight = torch.rand(n, generator=generator(9), dtype=torch.float64) + 0.01
    if kind == "zeros":
        weight[torch.rand(n, generator=generator(10)) < 0.3] = 0
        weight[0] = 1
    return weight


@pytest.mark.parametrize("d", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("weighted", [None, "weights", "zeros"])
def test_no_more_inertia_than_group_by_group(d, weighted):
    kinds = ["random", "clustered", "tied", "repeated"]
    problems = [
        (drawn(kind, n, d, seed=n), k, masses(weighted, n))
        for kind, n, k in itertools.product(kinds, (1, 5, 64, 65, 700), (1, 2, 16, 100))
    ]
    problems += [(drawn("random", 3000, d), 256, masses(weighted, 3000))]
    problems += [(drawn(kind, 20_000, d), 7, masses(weighted, 20_000)) for kind in kinds]  # more than are seeds
    with_zeros, heavy = anchored(drawn("tied", 500, d), None)
    problems += [(with_zeros, 9, heavy)]
    pieces = {"assign": public._assigned}
    rows, clusters, weights = map(list, zip(*problems, strict=True))
    found = fit_rows(rows, clusters, weights)
    for x, k, w, c in zip(rows, clusters, weights, found, strict=True):
        assert c.shape == (k, d) and c.dtype == x.dtype
        mass = 1.0 if w is None else w
        expected = inertia(x, tuned.fit(x, k, w, 100, **pieces), mass)
        size = (x.double().square().sum(1) * mass).sum().item()
        assert inertia(x, c, mass) <= (1 + 1e-6) * expected + 1e-12 * size


def test_the_same_bits_alone_and_for_any_number_of_threads():
    """Groups for one thread each and groups for all."""
    rows = [drawn("random", n, 2, seed=n) for n in (40_000, 300, 5, 9000, 17, 1200)]
    clusters, weights = [16, 4, 2, 300, 3, 16], [masses("zeros", len(x)) if len(x) % 3 else None for x in rows]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(fit_rows(rows, clusters, weights))
    finally:
        torch.set_num_threads(before)
    found.append([fit_rows([x], [k], [w])[0] for x, k, w in zip(rows, clusters, weights, strict=True)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_every_instruction_set():
    library = native.load("cpu").library
    before, rows = library.isa(), [drawn("clustered", 2000, 3), drawn("random", 100, 3).double()]
    try:
        found = []
        for isa in library.isas():
            library.set_isa(isa)
            found.append([fit_rows([x], [12])[0] for x in rows])
    finally:
        library.set_isa(before)
    for other in found[1:]:
        for a, b, x in zip(found[0], other, rows, strict=True):
            assert inertia(x, b) == pytest.approx(inertia(x, a), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    x = drawn("random", 999, 4).to(dtype)
    (found,) = fit_rows([x], [8])
    wide = torch.promote_types(dtype, torch.float32)
    assert found.dtype == wide and torch.equal(found, fit_rows([x.to(wide)], [8])[0])


@pytest.mark.parametrize(("dtype", "powers"), [(torch.float32, (-120, -40, 100)), (torch.float64, (-1000, 900))])
def test_scales(dtype, powers):
    """Squares neither overflow nor vanish; of weights neither."""
    x, weight = drawn("random", 400, 2).to(dtype), masses("weights", 400)
    (expected,) = fit_rows([x], [6], [weight])
    for power in powers:
        (found,) = fit_rows([x * 2.0**power], [6], [weight * 2.0 ** (power // 2)])
        torch.testing.assert_close(found / 2.0**power, expected, rtol=1e-6, atol=1e-6)


def test_edges():
    """Not finite, fewer rows that differ than clusters, one row, zeros, one round."""
    fine = drawn("random", 5000, 2)
    rows = [fine.clone() for _ in range(3)]
    for x, bad in zip(rows, (math.nan, math.inf, -math.inf), strict=True):
        x[4321, 1] = bad
    weight = torch.ones(5000, dtype=torch.float64)
    weight[4321] = 0
    *bad, good = fit_rows([*rows, fine], [3] * 4, [None, weight, weight, weight])
    assert all(c.isnan().all() and c.shape == (3, 2) for c in bad) and good.isfinite().all()
    few = torch.tensor([[1.0, 2], [3, 4], [1, 2]])
    found = fit_rows([few, few[:1], torch.zeros(7, 2)], [5, 3, 2])
    assert {*map(tuple, found[0].tolist())} == {(1, 2), (3, 4)}
    assert torch.equal(found[1], few[:1].expand(3, 2)) and torch.equal(found[2], torch.zeros(2, 2))
    once, often = (fit_rows([fine], [50], max_iter=m)[0] for m in (1, 50))
    assert inertia(fine, often) < inertia(fine, once)


def test_what_is_drawn_is_kept():
    assert tuned.draws(10, 4)[1] is tuned.draws(16384, 4)[1] and tuned.draws(10, 4)[0] is None
    assert tuned.draws(16385, 4)[0] is tuned.draws(16385, 4)[0] and len(tuned.draws(16385, 4)[0]) == 16384
