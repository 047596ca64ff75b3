"""The CUDA kernel of k-means over scalars, on the host, against algorithms.kmeans group by group."""

import importlib
import itertools
import math

import pytest
import torch
from emulate import emulated
from points import DRAWS, generator, inertia, normal, student

import r2kernels as r2
from r2kernels.algorithms import kmeans as tuned
from r2kernels.backends import native

public = importlib.import_module("r2kernels.functional.kmeans")
pytestmark = pytest.mark.usefixtures("nan_filled", "one_thread")
needs_emulation = pytest.mark.skipif(emulated.why_not() is not None, reason=f"cannot be built: {emulated.why_not()}")


@pytest.fixture
def fit_lines(device):
    """With `--device cuda` on the GPU, twice; else in both orders of blocks and threads: the same bits."""
    if device != "cuda" and emulated.why_not() is not None:
        pytest.skip(f"cannot be built: {emulated.why_not()}")

    def emulated_in(order, *given):
        with order.chosen():
            return emulated.backend().fit_lines(*given)

    def on_gpu(values, clusters, weights, max_iter):
        put = [None if w is None else w.cuda() for w in weights or [None] * len(values)]
        return [c.cpu() for c in native.load("cuda").fit_lines([x.cuda() for x in values], clusters, put, max_iter)]

    def fit(values, clusters, weights=None, max_iter=100):
        given = values, clusters, weights, max_iter
        if device == "cuda":
            found = [on_gpu(*given) for _ in range(2)]
        else:
            found = [emulated_in(order, *given) for order in emulated.ORDERS]
        assert all(torch.equal(a.nan_to_num(-7), b.nan_to_num(-7)) for a, b in zip(*found, strict=True))
        return found[0]

    return fit


def masses(n, zeros):
    weight = torch.rand(n, generator=generator(9), dtype=torch.float64) + 0.01
    if zeros:
        weight[torch.rand(n, generator=generator(10)) < 0.3] = 0
        weight[0] = 1
    return weight


def hold(fit_lines, problems, slack):
    """No more inertia than of `fit`, but for this share."""
    values, clusters, weights = map(list, zip(*problems, strict=True))
    for x, k, w, c in zip(values, clusters, weights, fit_lines(values, clusters, weights), strict=True):
        mass = 1.0 if w is None else w
        expected = inertia(x, tuned.fit(x[:, None], k, w, 100), mass)
        size = (x.double().square() * mass).sum().item()
        assert c.shape == (k,) and c.dtype == x.dtype and torch.equal(c, c.sort().values)
        assert inertia(x, c, mass) <= (1 + slack) * expected + 1e-13 * size


@pytest.mark.parametrize("weighted", [None, "weights", "zeros"])
def test_no_more_inertia_than_group_by_group(weighted, fit_lines):
    draws = [*DRAWS.values(), lambda n, seed: normal(n, seed=seed).mul(3).round().div(3)]
    shapes = [*itertools.product((1, 2, 17, 256, 257), (1, 2, 16, 300)), (2047, 16), (2048, 3)]
    problems = [
        (draw(n, seed=n), k, None if weighted is None else masses(n, weighted == "zeros"))
        for draw, (n, k) in itertools.product(draws, shapes)
    ]
    hold(fit_lines, [*problems, (student(100), 4, None)], 1e-9)
    hold(fit_lines, [(x.double(), k, w) for x, k, w in problems[::5]], 1e-9)


def test_cells(fit_lines):
    """More values than cells; outliers have clusters of their own."""
    many = [
        (draw(n, seed=n), k, None) for draw, n, k in zip(DRAWS.values(), (2049, 4096, 9000), (16, 8, 4), strict=True)
    ]
    hold(fit_lines, [*many, (student(5000), 16, masses(5000, False))], 1e-5)
    outliers = torch.tensor([-3e7, 1e6, 4e12])
    (found,) = fit_lines([torch.cat([outliers, normal(4000)])], [16])
    assert torch.equal(found[[0, 14, 15]], outliers)
    ties = torch.cat([torch.zeros(3000), torch.arange(3000.0)])
    assert fit_lines([ties], [1])[0].item() == ties.mean().item()


def test_edges(fit_lines):
    """Not finite; fewer values that differ than clusters; scales; one round; groups of all kinds in one call."""
    fine = normal(300)
    bad = [fine.clone() for _ in range(3)]
    for x, worst in zip(bad, (math.nan, math.inf, -math.inf), strict=True):
        x[200] = worst
    unused = torch.ones(300, dtype=torch.float64)
    unused[200] = 0
    found = fit_lines([*bad, fine, fine], [3, 4, 3, 3, 5], [None, unused, unused, unused, None])
    assert all(c.isnan().all() for c in found[:3]) and all(c.isfinite().all() for c in found[3:])
    few = torch.tensor([5.0, 1, 5, 1, 1])
    assert fit_lines([few, few[:1], torch.zeros(9)], [4, 2, 3])[0].tolist() == [1, 5, 5, 5]
    for power, dtype in ((-140, torch.float32), (100, torch.float32), (-1060, torch.float64), (1000, torch.float64)):
        scaled = torch.tensor([1.0, 1, 4, 4, 9], dtype=dtype) * 2.0**power
        assert torch.equal(fit_lines([scaled], [3])[0], scaled[[0, 2, 4]])
    once, often = (fit_lines([student(3000)], [16], max_iter=m)[0] for m in (1, 50))
    assert inertia(student(3000), often) <= inertia(student(3000), once)


@needs_emulation
def test_what_kmeans_calls():
    """Groups that it serves; of others the same as ever."""
    rows = [normal(n)[:, None] for n in (300, 70_000, 20)]
    with emulated.RISING.chosen():
        found = public._fitted(rows, [4, 3, 2], [None, None, masses(20, True)], 100)
        alone = emulated.backend().fit_lines([rows[0][:, 0], rows[2][:, 0]], [4, 2], [None, masses(20, True)], 100)
    assert torch.equal(found[0], alone[0]) and torch.equal(found[2], alone[1])
    assert torch.equal(found[1], tuned.fit(rows[1], 3, None, 100))


@pytest.mark.parametrize("d", [1, 2])
def test_lists_on_a_device(d, device):
    """The public function, on the device that the tests are for, against group by group on the CPU."""
    ws = [normal(n) for n in (600, 90, 4000)]
    weight = [None, masses(90 // d, True), masses(4000 // d, False)]
    given = [None if m is None else m.to(device) for m in weight]
    found = r2.kmeans([w.to(device) for w in ws], [4, 16, 8], cluster_dim=d, layout="contiguous", weight=given)
    for w, m, c in zip(ws, weight, found, strict=True):
        rows, mass = w.reshape(-1, d), 1.0 if m is None else m
        expected = tuned.fit(rows, len(c), m, 100)
        assert c.device.type == device and c.shape == expected.shape
        assert inertia(rows, c.cpu(), mass) <= 1.001 * inertia(rows, expected, mass)


def test_what_it_serves():
    serves = native.NativeLines.serves_line
    assert serves(65536, 512) and not serves(65537, 2) and not serves(9, 513)
