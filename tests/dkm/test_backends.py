"""DKM's passes on every backend, held to the reference: to 1e-12 in float64, in what people use by budget.py."""

import functools
import importlib
import itertools
import math

import budget
import cases
import pytest
import torch
from dkm.problems import UNITS, Problem, draw, made, solve, truth
from parametrize import first, short
from torch.testing import assert_close

from r2kernels import ops, reference

pytestmark = pytest.mark.usefixtures("nan_filled", "one_thread")

NAMES = [
    "below a vector",
    "a chunk and one",
    "outliers",
    "ties",
    "far from zero",
    "transposed",
    "unaligned",
    "every second",
]
PROBLEMS = [
    ("euclidean", 1, "output"),
    ("sqeuclidean", 1, "output"),
    ("euclidean", 2, "output"),
    ("sqeuclidean", 2, "contiguous"),
    ("sqeuclidean", 4, "output"),
    ("euclidean", 3, "contiguous"),
    ("euclidean", 8, "output"),
]
# for d = 1 one for about every way to search and look up
SIZES = {1: (1, 2, 4, 7, 16, 17, 32, 64, 128, 257, 600), 2: (1, 5, 33, 300), 3: (2, 17), 4: (16, 40), 8: (3, 16)}
problems = pytest.mark.parametrize(("metric", "d", "layout"), PROBLEMS, ids=lambda v: str(v))
METRICS = pytest.mark.parametrize("metric", UNITS)
TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def values(monkeypatch):
    """16-bit scalars of any number go by their values."""
    monkeypatch.setattr(importlib.import_module("r2kernels.backends.native.dkm"), "TABLED", dict.fromkeys(UNITS, 1))


@first("dtype", TYPES[:2], TYPES, short)
@problems
def test_budget(metric, d, layout, dtype, device, variants):
    inputs = ("below a vector", "a chunk and one", "ties", "transposed", "unaligned")
    inputs = [name for name in inputs if made(name, dtype, device, d)]
    drawn = [
        draw(made(name, dtype, device, d, seed), K, sharpness, metric, d, layout, seed)
        for name, K, sharpness, seed in itertools.product(inputs, (3, 16), (1, 0.2, 0.03), range(2 if d == 1 else 1))
    ]
    budget.hold(drawn, variants, solve, truth)


@pytest.mark.parametrize("gradient", ["last", "implicit"])
@METRICS
def test_budget_of_gradients(metric, gradient, device, variants):
    drawn = [
        draw(made(name, torch.float32, device, seed=seed), K, 0.3, metric, seed=seed)
        for name in ("below a vector", "ties")
        for K in (2, 5)
        for seed in range(4)
    ]
    run, judge = (functools.partial(f, gradient=gradient) for f in (solve, truth))
    budget.hold(drawn, variants, run, judge)


@first("name", ["mixed list"], ["mixed list", *NAMES])
@METRICS
def test_budget_of_a_list(metric, name, device, variants):
    for dtype in (torch.float32, torch.bfloat16):
        drawn = [
            draw(made(name, dtype, device, seed=seed), 16, s, metric, seed=seed) for seed in range(3) for s in (1, 0.05)
        ]
        budget.hold(drawn, variants, solve, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@METRICS
def test_budget_by_value(metric, dtype, device, variants, values):
    drawn = [
        draw(made(name, dtype, device, seed=seed), K, s, metric, seed=seed)
        for name in ("mixed list", "ties", "transposed", "a chunk and one")
        for K in (2, 16)
        for s in (1, 0.05)
        for seed in range(2)
    ]
    budget.hold(drawn, variants, solve, truth)


def passes(problem):
    """pass -> its result, each from the same inputs"""
    c, gs, gc = problem.c, problem.gs, problem.gc
    new, moments = reference.DKM(*problem.arguments).update(c)
    one = problem.job()
    found = dict(zip(("update", "moments"), one.update(c), strict=True))
    found["output"] = one.output(c, new)
    found["upstream"] = one.upstream(c, gs)
    found["recur, last"], found["recur"] = one.recur(c, new, gc, moments, gs), one.recur(c, new, gc, moments)
    steps = [(c, new, gc, moments, True), (c + 0.01, new, 2 * gc, moments, False), (c - 0.02, c, gc, moments, False)]
    found["gradient"] = one.gradient(steps, gs)
    if one.signed:
        found["jacobian"] = one.jacobian(c, new, moments)
    return found


def compare(problem, plain, variant, tolerance=1e-12):
    with plain.chosen():
        expected = passes(problem)
    with variant.chosen():
        found = passes(problem)
    for name, exact in expected.items():
        for a, b in zip(found[name], exact, strict=True):
            assert torch.equal(a.isnan(), b.isnan()), f"{name}: NaN in other places"
            a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
            scale = max(b.abs().max().item(), 1 if name in ("recur", "recur, last", "gradient", "jacobian") else 0)
            assert_close(a, b, rtol=0, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("sharpness", [0.3, 0.03])
@problems
def test_every_pass(metric, d, layout, sharpness, device, plain, variant):
    """Float64, to 1e-12 of the largest number, for every number of centroids that is searched in a way of its own; the
    last tensor has fewer."""
    for K in SIZES[d]:
        shapes = [(40, 30), (8, 5, 3), (d,), (1100 * d + 1,)]
        ws = [
            torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64).to(device)
            for i, shape in enumerate(shapes)
        ]
        ws[1] = ws[1].permute(0, 2, 1).contiguous().permute(0, 2, 1)
        clusters = (K, K, K, max(K - 2, 1))
        problem = draw(ws, K, sharpness, metric, d, layout, spread=0.5)._replace(clusters=clusters)
        problem.c[3, clusters[3] :] = problem.gc[3, clusters[3] :] = 0
        compare(problem, plain, variant)


@METRICS
@pytest.mark.parametrize("K", [2, 7, 40, 150])
def test_weights_that_equal_centroids(K, metric, device, plain, variant):
    """They have no slope there; nor where centroids are equal."""
    w = torch.randn(1500, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    problem = draw([w], K, 0.3, metric)
    c = problem.c
    c[0, 1:3] = c[0, :1]
    c[0, K // 2 :] = w[: K - K // 2, None].sort(0).values.clamp(min=c[0, K // 2].item())
    c = c.sort(1).values
    w[100 : 100 + K] = c[0, :, 0]
    compare(problem._replace(c=c), plain, variant)


SPECIALS = {name: values for name, values in cases.SPECIALS.items() if name != "nan and inf"}


@first("dtype", [torch.float32], [torch.float32, torch.bfloat16, torch.float64], short)
@pytest.mark.parametrize("special", [*SPECIALS, "tau = 0", "tau < 0", "tau is nan", "a centroid is nan"])
@problems
def test_invalid_numbers(special, metric, d, layout, dtype, device, plain, variant):
    """NaN where the reference has it."""
    for K in (1, 40):
        w = torch.randn(50 * d, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        problem = draw([w], K, 0.5, metric, d, layout)
        if special in SPECIALS:
            w[7 : 7 + len(SPECIALS[special])] = torch.tensor(SPECIALS[special], dtype=dtype, device=device)
        elif special == "a centroid is nan":
            problem.c[0, -1] = math.nan
        else:
            problem.tau[0] = {"tau = 0": 0, "tau < 0": -1, "tau is nan": math.nan}[special]
        compare(problem, plain, variant, tolerance=1e-10 if dtype == torch.float64 else 0.02)


@METRICS
@pytest.mark.parametrize("special", SPECIALS)
def test_invalid_numbers_by_value(special, metric, device, plain, variant, values):
    w = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    problem = draw([w], 4, 0.5, metric)
    w[7 : 7 + len(SPECIALS[special])] = torch.tensor(SPECIALS[special], dtype=w.dtype, device=device)
    compare(problem, plain, variant, tolerance=0.02)


@problems
def test_empty_clusters_stay(metric, d, layout, device, variant):
    """Without gradient; one row for many clusters, too."""
    w = torch.randn(30 * d, generator=torch.Generator().manual_seed(0)).to(device)
    problem = draw([w], 3, 0.1, metric, d, layout)
    problem.c[0, 2] = 1e4
    new, moments = problem.job().update(problem.c)
    assert torch.equal(new[0, 2], problem.c[0, 2]) and not moments[0, 2].any()
    result = solve(problem)
    assert not result["dC_0"][0][2].any() and all(x.isfinite().all() for xs in result.values() for x in xs)
    alone = solve(problem._replace(ws=[w[:d]], gs=[problem.gs[0][:d]]))
    assert all(x.isfinite().all() for xs in alone.values() for x in xs)


def test_clusters_almost_empty(device, variant):
    """One that weights attend to by e^-80 moves as one that they attend to by e^-5 would."""
    w, c, tau = (
        torch.linspace(0, 0.01, 50, device=device),
        torch.tensor([[[0.0], [0.8]]], device=device),
        torch.tensor([0.01], device=device),
    )
    for metric, units in (("euclidean", 1), ("sqeuclidean", 0.8)):
        exact, moments = reference.DKM([w.double()], (tau * units).double(), (2,), metric, 1, "output").update(
            c.double()
        )
        assert 0 < moments[0, 1, 0] < 1e-30
        problem = Problem([w], c, tau * units, [w], c, metric)
        assert_close(problem.job().update(c)[0], exact.float(), rtol=1e-4, atol=1e-6)


def test_centroids_out_of_order_by_an_ulp(device, variant):
    c = torch.randn(300, generator=torch.Generator().manual_seed(0)).sort().values
    c[1::2] = c[::2].nextafter(torch.tensor(-math.inf))
    w = torch.cat([c, c.nextafter(torch.tensor(9.0)), torch.randn(1000)]).to(device)
    c = c[None, :, None].to(device)
    tau, g = torch.tensor([0.01], device=device), torch.randn(len(w)).to(device)
    result = solve(Problem([w], c, tau, [g], torch.zeros_like(c), "euclidean"))
    assert all(x.isfinite().all() for xs in result.values() for x in xs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@problems
def test_threads_do_not_matter(metric, d, layout, dtype, device, variant):
    if variant.backend == "reference":
        pytest.skip("eager PyTorch does not promise it")
    ws = [
        torch.randn(n, generator=torch.Generator().manual_seed(0)).to(device, dtype) for n in (300_000, 20_000, 7 * d)
    ]
    problem = draw(ws, 5, 0.2, metric, d, layout)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(solve(problem, T=2))
    for other in results[1:]:
        for q, exact in results[0].items():
            assert all(torch.equal(a, b) for a, b in zip(other[q], exact, strict=True)), q


@pytest.mark.parametrize("writer", ["backend", "reference"])
@problems
def test_one_forward_another_backward(metric, d, layout, writer, device, plain, variant):
    problem = draw(made("mixed list", torch.float64, device, d), 5, 0.2, metric, d, layout)
    with plain.chosen():
        expected = solve(problem, gradient="implicit")
    first, second = (variant, plain) if writer == "backend" else (plain, variant)
    with second.chosen():
        found = solve(problem, gradient="implicit", writer=first)
    for q, exact in expected.items():
        for a, b in zip(found[q], exact, strict=True):
            assert_close(a, b, rtol=0, atol=1e-9 * b.abs().max().item())


@pytest.mark.parametrize("K", [1, 16, 300])
@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("layout", ["output", "contiguous"])
def test_codes(layout, d, K, device, plain, variant):
    """In the order of the layout, whatever the strides."""
    for name in ("mixed list", "channels last", "transposed", "every second", "ties"):
        for dtype in (torch.float64, torch.bfloat16):
            one = draw(made(name, dtype, device, d), K, 1, "euclidean", d, layout)
            args = one.ws, one.c.flip(1), (K,) * len(one.ws), d, layout
            with plain.chosen():
                expected = ops.call["assign_fwd"](*args)
            for a, b in zip(ops.call["assign_fwd"](*args), expected, strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("K", [16, 256])
def test_passes_beside_a_larger_list(K, device, variant):
    """Centroids padded for a larger K than any tensor at hand has, as the fixed-point iteration gives them once the
    tensor of that K is done."""
    problem = draw(made("ties", torch.float64, device), K, 0.1, "euclidean")
    c, gs = problem.c, problem.gs
    wide = torch.cat([c, torch.zeros_like(c)], 1)
    one, other = problem.job(), problem._replace(c=wide, clusters=(K,)).job()
    for a, b in zip(
        [*one.update(c), one.upstream(c, gs)], [*other.update(wide), other.upstream(wide, gs)], strict=True
    ):
        assert not b[:, K:].any()
        if variant.backend == "cuda":  # how many threads share a bin follows from the most clusters of the list
            assert_close(a, b[:, :K], rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(a, b[:, :K])
