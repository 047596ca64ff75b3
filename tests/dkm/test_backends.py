"""DKM's passes on every backend, held to the reference: to 1e-12 in float64, and in what people use by the budget of budget.py.

Natural scales: max|w| for W_hat and centroids, since those are averages of weights; for dL/dW its RMS and a hundredth of that of the incoming gradient; for
dL/dC_0 its RMS and that of dL/dC_T.
"""

import importlib
import itertools
import math

import budget
import cases
import pytest
import torch
from torch.testing import assert_close

from r2kernels import ops, reference
from r2kernels.algorithms import iterations
from r2kernels.backends import select
from r2kernels.lists import carve_gradients, like_weights
from r2kernels.reference.columns import accumulator

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
METRICS = pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
SLOW = pytest.mark.exhaustive


def some(values, count):
    """The first few of the values; the others are marked as exhaustive."""
    return [v if i < count else pytest.param(v, marks=SLOW) for i, v in enumerate(values)]


@pytest.fixture
def values(monkeypatch):
    """16-bit scalars of any number go by their values."""
    monkeypatch.setattr(
        importlib.import_module("r2kernels.backends.native"), "TABLED", {"euclidean": 1, "sqeuclidean": 1}
    )


def draw(ws, K, sharpness, metric, d=1, layout="output", seed=0, spread=0.3):
    """(weights, centroids (L, K, d), tau, gradients of W_hat, of the centroids); tau is in units of the weights' deviation, or its square."""
    g = torch.Generator().manual_seed(seed + 7)
    dtype, device = ws[0].dtype, ws[0].device
    cs, tau = [], []
    for w in ws:
        x = reference.columns(w.cpu().double(), d, layout).t()
        std = x.std(correction=0).item() or cases.SCALE
        cs.append(
            x[torch.randint(len(x), (K,), generator=g)]
            + spread * std * torch.randn(K, d, generator=g, dtype=torch.float64)
        )
        tau.append(sharpness * (std if metric == "euclidean" else std**2))
    c = torch.stack(cs).to(device, accumulator(dtype))
    gs = [torch.empty_like(w).copy_(torch.randn(w.shape, generator=g, dtype=torch.float64)) for w in ws]
    tau = torch.tensor(tau, dtype=c.dtype, device=device)
    return ws, c.sort(1).values if d == 1 else c, tau, gs, torch.randn(c.shape, generator=g, dtype=torch.float64).to(c)


def made(name, dtype, device, d=1, seed=0):
    return [w for w in cases.make(name, dtype, device, seed) if w.numel() >= d]


def to(problem, dtype):
    ws, c, tau, gs, gc = problem
    wide = accumulator(dtype)
    return [w.to(dtype) for w in ws], c.to(wide), tau.to(wide), [g.to(dtype) for g in gs], gc.to(wide)


def job(ws, c, tau, metric, d=1, layout="output", clusters=None):
    backend = select(ws[0].device, True)
    make = ops._DKM if backend is None else backend.DKM
    return make(ws, tau, clusters or (c.shape[1],) * len(ws), metric, d, layout)


def solve(problem, metric, d=1, layout="output", T=3, gradient="unrolled", writer=None):
    """quantity -> tensors; `writer`: the backend that runs forward."""
    ws, c, tau, gs, gc = problem

    def forward():
        return iterations.forward(job(ws, c, tau, metric, d, layout), c, T)

    if writer is None:
        out, history, moments = forward()
    else:
        with writer.chosen():
            out, history, moments = forward()
    dw, first = iterations.backward(
        job(ws, c, tau, metric, d, layout), gc, like_weights(gs, ws) if d == 1 else gs, history, moments, gradient, True
    )
    found = {
        "W_hat": carve_gradients(out, ws, d, layout),
        "centroids": list(history[-1]),
        "dW": carve_gradients(dw, ws, d, layout),
    }
    return found if gradient != "unrolled" else {**found, "dC_0": list(first)}


def truth(problem, plain, *args, **options):
    """(the reference in float64 on the same numbers, natural scales)"""
    with plain.chosen():
        wide = to(problem, torch.float64)
        exact = solve(wide, *args, **options)
    scales = {
        "W_hat": [w.abs().max() for w in wide[0]],
        "centroids": [w.abs().max() for w in wide[0]],
        "dW": [rms(e) + 0.01 * rms(g) for e, g in zip(exact["dW"], wide[3], strict=True)],
    }
    if "dC_0" in exact:
        scales["dC_0"] = [rms(e) + rms(g) for e, g in zip(exact["dC_0"], wide[4], strict=True)]
    return exact, scales


def rms(x):
    return x.double().square().mean().sqrt()


def errors(found, exact, scales):
    return {
        q: torch.stack([rms(a.double() - e) / s for a, e, s in zip(found[q], exact[q], scales[q], strict=True)])
        for q in exact
    }


def exceeded(drawn, variants, plain, *args, **options):
    """'' if every variant keeps within the budget over these problems, else a line for each one that does not."""
    own, pools = budget.Pool(), {v: budget.Pool() for v in variants}
    for problem in drawn:
        dtype = problem[0][0].dtype
        exact, scales = truth(problem, plain, *args, **options)
        with plain.chosen():
            own.add(errors(solve(problem, *args, **options), exact, scales))
        for v, pool in pools.items():
            with v.chosen():
                pool.add(errors(solve(problem, *args, **options), exact, scales))
    limits = {
        q: 2 * r + torch.finfo(dtype if q in ("W_hat", "dW") else accumulator(dtype)).eps for q, r in own.rms().items()
    }
    return "\n".join(
        f"{v}: {q} errs by {r:.3g}, allowed is {limits[q]:.3g}"
        for v, pool in pools.items()
        for q, r in pool.rms().items()
        if not r <= limits[q]
    )


def within_budget(drawn, variants, plain, *args, **options):
    failures = exceeded(drawn, variants, plain, *args, **options)
    assert not failures, "\n" + failures


@pytest.mark.parametrize(
    "dtype", some([torch.float32, torch.bfloat16, torch.float16], 2), ids=lambda dtype: str(dtype)[6:]
)
@problems
def test_budget(metric, d, layout, dtype, device, variants, plain):
    names = [
        name
        for name in ("below a vector", "a chunk and one", "ties", "transposed", "unaligned")
        if made(name, dtype, device, d)
    ]
    drawn = [
        draw(made(name, dtype, device, d, seed), K, sharpness, metric, d, layout, seed)
        for name, K, sharpness, seed in itertools.product(names, (3, 16), (1, 0.2, 0.03), range(2 if d == 1 else 1))
    ]
    within_budget(drawn, variants, plain, metric, d, layout)


@pytest.mark.parametrize("gradient", ["last", "implicit"])
@METRICS
def test_budget_of_gradients(metric, gradient, device, variants, plain):
    drawn = [
        draw(made(name, torch.float32, device, seed=seed), K, 0.3, metric, seed=seed)
        for name in ("below a vector", "ties")
        for K in (2, 5)
        for seed in range(4)
    ]
    within_budget(drawn, variants, plain, metric, gradient=gradient)


@pytest.mark.parametrize("name", some(["mixed list", *NAMES], 1))
@METRICS
def test_budget_of_a_list(metric, name, device, variants, plain):
    for dtype in (torch.float32, torch.bfloat16):
        within_budget(
            [
                draw(made(name, dtype, device, seed=seed), 16, s, metric, seed=seed)
                for seed in range(3)
                for s in (1, 0.05)
            ],
            variants,
            plain,
            metric,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@METRICS
def test_budget_by_value(metric, dtype, device, variants, plain, values):
    drawn = [
        draw(made(name, dtype, device, seed=seed), K, s, metric, seed=seed)
        for name in ("mixed list", "ties", "transposed", "a chunk and one")
        for K in (2, 16)
        for s in (1, 0.05)
        for seed in range(2)
    ]
    within_budget(drawn, variants, plain, metric)


def passes(problem, metric, d=1, layout="output", clusters=None):
    """pass -> its result, each from the same inputs"""
    ws, c, tau, gs, gc = problem
    new, moments = reference.DKM(ws, tau, clusters or (c.shape[1],) * len(ws), metric, d, layout).update(c)
    one = job(ws, c, tau, metric, d, layout, clusters)
    found = dict(zip(("update", "moments"), one.update(c), strict=True))
    found["output"] = carve_gradients(one.output(c, new), ws, d, layout)
    found["upstream"] = one.upstream(c, gs)
    found["recur, last"], found["recur"] = one.recur(c, new, gc, moments, gs), one.recur(c, new, gc, moments)
    steps = [(c, new, gc, moments, True), (c + 0.01, new, 2 * gc, moments, False), (c - 0.02, c, gc, moments, False)]
    found["gradient"] = carve_gradients(one.gradient(steps, gs), ws, d, layout)
    if one.signed:
        found["jacobian"] = one.jacobian(c, new, moments)
    return found


def compare(problem, plain, variant, *args, tolerance=1e-12, **options):
    with plain.chosen():
        expected = passes(problem, *args, **options)
    with variant.chosen():
        found = passes(problem, *args, **options)
    for name, exact in expected.items():
        for a, b in zip(found[name], exact, strict=True):
            assert torch.equal(a.isnan(), b.isnan()), f"{name}: NaN in other places"
            a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
            scale = max(b.abs().max().item(), 1 if name in ("recur", "recur, last", "gradient", "jacobian") else 0)
            assert_close(a, b, rtol=0, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("sharpness", [0.3, 0.03])
@problems
def test_every_pass(metric, d, layout, sharpness, device, plain, variant):
    """Float64, to 1e-12 of the largest number, for every number of centroids that is searched in a way of its own; the last tensor has fewer."""
    for K in SIZES[d]:
        shapes = [(40, 30), (8, 5, 3), (d,), (1100 * d + 1,)]
        ws = [
            torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64).to(device)
            for i, shape in enumerate(shapes)
        ]
        ws[1] = ws[1].permute(0, 2, 1).contiguous().permute(0, 2, 1)
        ws, c, tau, gs, gc = draw(ws, K, sharpness, metric, d, layout, spread=0.5)
        clusters = (K, K, K, max(K - 2, 1))
        c[3, clusters[3] :] = gc[3, clusters[3] :] = 0
        compare((ws, c, tau, gs, gc), plain, variant, metric, d, layout, clusters=clusters)


@METRICS
@pytest.mark.parametrize("K", [2, 7, 40, 150])
def test_weights_that_equal_centroids(K, metric, device, plain, variant):
    """They have no slope there; nor where centroids are equal."""
    w = torch.randn(1500, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    ws, c, *rest = draw([w], K, 0.3, metric)
    c[0, 1:3] = c[0, :1]
    c[0, K // 2 :] = w[: K - K // 2, None].sort(0).values.clamp(min=c[0, K // 2].item())
    c = c.sort(1).values
    w[100 : 100 + K] = c[0, :, 0]
    compare((ws, c, *rest), plain, variant, metric)


SPECIALS = {"nan": [math.nan], "inf": [math.inf], "-inf": [-math.inf], "both": [math.inf, -math.inf]}


@pytest.mark.parametrize(
    "dtype", some([torch.float32, torch.bfloat16, torch.float64], 1), ids=lambda dtype: str(dtype)[6:]
)
@pytest.mark.parametrize("special", [*SPECIALS, "tau = 0", "tau < 0", "tau is nan", "a centroid is nan"])
@problems
def test_invalid_numbers(special, metric, d, layout, dtype, device, plain, variant):
    """NaN where the reference has it."""
    for K in (1, 40):
        w = torch.randn(50 * d, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        (w,), c, tau, gs, gc = draw([w], K, 0.5, metric, d, layout)
        if special in SPECIALS:
            w[7 : 7 + len(SPECIALS[special])] = torch.tensor(SPECIALS[special], dtype=dtype, device=device)
        elif special == "a centroid is nan":
            c[0, -1] = math.nan
        else:
            tau[0] = {"tau = 0": 0, "tau < 0": -1, "tau is nan": math.nan}[special]
        compare(
            ([w], c, tau, gs, gc),
            plain,
            variant,
            metric,
            d,
            layout,
            tolerance=1e-10 if dtype == torch.float64 else 0.02,
        )


@METRICS
@pytest.mark.parametrize("special", SPECIALS)
def test_invalid_numbers_by_value(special, metric, device, plain, variant, values):
    w = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    problem = draw([w], 4, 0.5, metric)
    w[7 : 7 + len(SPECIALS[special])] = torch.tensor(SPECIALS[special], dtype=w.dtype, device=device)
    compare(problem, plain, variant, metric, tolerance=0.02)


@problems
def test_empty_clusters_stay(metric, d, layout, device, variant):
    """Without gradient; one row for many clusters, too."""
    w = torch.randn(30 * d, generator=torch.Generator().manual_seed(0)).to(device)
    (w,), c, tau, gs, gc = draw([w], 3, 0.1, metric, d, layout)
    c[0, 2] = 1e4
    one = job([w], c, tau, metric, d, layout)
    new, moments = one.update(c)
    assert torch.equal(new[0, 2], c[0, 2]) and not moments[0, 2].any()
    result = solve(([w], c, tau, gs, gc), metric, d, layout)
    assert not result["dC_0"][0][2].any() and all(x.isfinite().all() for xs in result.values() for x in xs)
    alone = solve(([w[:d]], c, tau, [gs[0][:d]], gc), metric, d, layout)
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
        assert_close(job([w], c, tau * units, metric).update(c)[0], exact.float(), rtol=1e-4, atol=1e-6)


def test_centroids_out_of_order_by_an_ulp(device, variant):
    c = torch.randn(300, generator=torch.Generator().manual_seed(0)).sort().values
    c[1::2] = c[::2].nextafter(torch.tensor(-math.inf))
    w = torch.cat([c, c.nextafter(torch.tensor(9.0)), torch.randn(1000)]).to(device)
    c = c[None, :, None].to(device)
    result = solve(
        ([w], c, torch.tensor([0.01], device=device), [torch.randn(len(w)).to(device)], torch.zeros_like(c)),
        "euclidean",
    )
    assert all(x.isfinite().all() for xs in result.values() for x in xs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
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
        results.append(solve(problem, metric, d, layout, T=2))
    for other in results[1:]:
        for q, exact in results[0].items():
            assert all(torch.equal(a, b) for a, b in zip(other[q], exact, strict=True)), q


@pytest.mark.parametrize("writer", ["backend", "reference"])
@problems
def test_one_forward_another_backward(metric, d, layout, writer, device, plain, variant):
    problem = draw(made("mixed list", torch.float64, device, d), 5, 0.2, metric, d, layout)
    with plain.chosen():
        expected = solve(problem, metric, d, layout, gradient="implicit")
    first, second = (variant, plain) if writer == "backend" else (plain, variant)
    with second.chosen():
        found = solve(problem, metric, d, layout, gradient="implicit", writer=first)
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
            ws, c, *_ = draw(made(name, dtype, device, d), K, 1, "euclidean", d, layout)
            args = ws, c.flip(1), (K,) * len(ws), d, layout
            with plain.chosen():
                expected = ops.call["assign_fwd"](*args)
            for a, b in zip(ops.call["assign_fwd"](*args), expected, strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("K", [16, 256])
def test_passes_beside_a_larger_list(K, device, variant):
    """Centroids padded for a larger K than any tensor at hand has, as the fixed-point iteration gives them once that tensor is done."""
    (w,), c, tau, gs, _ = draw(made("ties", torch.float64, device), K, 0.1, "euclidean")
    wide = torch.cat([c, torch.zeros_like(c)], 1)
    one, other = job([w], c, tau, "euclidean"), job([w], wide, tau, "euclidean", clusters=(K,))
    for a, b in zip(
        [*one.update(c), one.upstream(c, gs)], [*other.update(wide), other.upstream(wide, gs)], strict=True
    ):
        assert not b[:, K:].any()
        if variant.backend == "cuda":  # how many threads share a bin follows from the most clusters of the list
            assert_close(a, b[:, :K], rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(a, b[:, :K])
