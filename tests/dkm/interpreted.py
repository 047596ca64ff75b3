"""DKM in Triton's interpreter. test_triton_static.py runs this file, in a process of its own:

TRITON_INTERPRET=1 pytest tests/dkm/interpreted.py
"""

import math

import pytest
import torch
from torch.testing import assert_close

import r2kernels as r2
from r2kernels import reference
from r2kernels.backends import select
from r2kernels.reference.columns import accumulator

METRICS = pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])


@pytest.fixture
def triton():
    with r2.use_backend("triton"):
        yield select(torch.device("cpu"))


def draw(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def start(k, d=1, seed=0, dtype=torch.float64):
    c = draw(k, d, seed=seed, dtype=dtype)
    return c[:, 0] if d == 1 else c


def results(layer, ws, cs, tau, **options):
    ws, cs = [w.detach().requires_grad_() for w in ws], [c.detach().requires_grad_() for c in cs]
    w_hat, fresh = layer.dkm(ws, cs, tau, **options)
    grads = [draw(*w.shape, seed=50 + i, dtype=w.dtype) for i, w in enumerate(ws)] + [
        draw(*c.shape, seed=70 + i, dtype=c.dtype) for i, c in enumerate(cs)
    ]
    found = torch.autograd.grad([*w_hat, *fresh], [*ws, *cs], grads, allow_unused=True)
    return [*w_hat, *fresh, *[f for f in found if f is not None]]


LISTS = {  # shapes, clusters, cluster_dim, layout
    "scalars": ([(9, 7), (11,), ()], (4, 3, 1), 1, "output"),
    "a tile and more": ([(40, 9), (301,)], (19, 40), 1, "output"),
    "pairs": ([(8, 5), (7, 3)], (3, 5), 2, "output"),
    "three, left over": ([(7, 5, 2), (10,)], (9, 2), 3, "contiguous"),
    "four": ([(8, 3, 3), (4, 2)], (5, 2), 4, "output"),
    "eight": ([(16, 6), (8,)], (6, 1), 8, "output"),
}


@METRICS
@pytest.mark.parametrize("name", LISTS)
@pytest.mark.filterwarnings("ignore:centroids")
def test_equals_the_reference(name, metric, triton):
    shapes, clusters, d, layout = LISTS[name]
    ws = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    if d == 2:
        ws[0] = ws[0].t().contiguous().t()
    if d == 1:
        ws[0].view(-1)[:2] = start(clusters[0], seed=clusters[0])[:2]  # where |w - c| has a kink
    cs = [start(k, d, seed=k) for k in clusters]
    for gradient in ("unrolled", "implicit") if name in ("scalars", "pairs") else ("unrolled",):
        options = {"iterations": 3, "metric": metric, "gradient": gradient, "cluster_dim": d, "layout": layout}
        tau = [0.3 + 0.2 * i for i in range(len(ws))]
        for ours, exact in zip(
            results(r2, ws, cs, tau, **options), results(reference, ws, cs, tau, **options), strict=True
        ):
            assert ours.stride() == exact.stride() or d > 1
            assert_close(ours, exact, rtol=1e-10, atol=1e-11)


BUDGET = [  # cluster_dim, metric, K, tau of weights with deviation 0.05, their centre
    (1, "euclidean", 16, 2e-3, 0),
    (1, "euclidean", 5, 1, 0),
    (1, "euclidean", 8, 5e-3, 3),
    (1, "euclidean", 20, 5e-4, 0),
    (1, "sqeuclidean", 8, 1e-4, 0),
    (2, "euclidean", 9, 3e-3, 0),
    (4, "sqeuclidean", 10, 2e-4, 0),
    (8, "euclidean", 4, 0.5, 0),
]


@pytest.mark.parametrize("case", BUDGET, ids=str)
def test_error_budget(case, triton):
    """Pooled RMS error at most twice the reference's in the same dtype plus one unit in the last place: W_hat,
    centroids, dL/dW, dL/dC_0."""
    d, metric, k, tau, centre = case
    for dtype, draws in ((torch.float32, 4), (torch.bfloat16, 2)):
        ulps = [torch.finfo(t).eps for t in (dtype, accumulator(dtype), dtype, accumulator(dtype))]
        own, ours = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        for seed in range(draws):
            w = (draw(400, d, seed=seed) * 0.05 + centre).to(dtype)
            c = (draw(k, d, seed=seed + 100) * 0.05 + centre).to(accumulator(dtype)).reshape(k, d)
            c = c[:, 0] if d == 1 else c
            options = {"iterations": 3, "metric": metric, "cluster_dim": d, "layout": "contiguous"}
            exact = results(reference, [w.double()], [c.double()], tau, **options)
            scales = [w.double().abs().amax(), w.double().abs().amax(), *[e.square().mean().sqrt() for e in exact[2:]]]
            for layer, sums in ((reference, own), (r2, ours)):
                for i, (x, e, scale) in enumerate(
                    zip(results(layer, [w], [c], tau, **options), exact, scales, strict=True)
                ):
                    sums[i] += ((x.double() - e) / scale).square().mean() / draws
        assert (ours.sqrt() <= 2 * own.sqrt() + torch.tensor(ulps, dtype=torch.float64)).all(), (
            dtype,
            ours.sqrt(),
            own.sqrt(),
        )


CENTROIDS = {
    "crowded": [0, 1e-6, 1.5e-6, 1.7e-6, 2e-6, 2.1e-6, 0.5, 0.50001, 0.50002, 1],
    "duplicates": [0.2, 0.2, 0.2, 0.7, 0.7],
    "one": [0.3],
    "equal": [0.3] * 4,
    "far": [-1e30, 0, 1e-30, 1e30],
    "out of order by an ulp": [0.1, 0.3, math.nextafter(0.3, 0), 0.8],
}


@pytest.mark.parametrize("name", CENTROIDS)
def test_intervals_are_found_exactly(name, triton):
    """Wherever the centroids lie, also where a cell of the grid holds many, and at the centroids themselves."""
    c = torch.tensor(CENTROIDS[name], dtype=torch.float64)
    w = torch.cat(
        [c, c.nextafter(torch.tensor(9e30)), c.nextafter(torch.tensor(-9e30)), draw(300), 1e-6 * draw(100)]
    ).repeat(3)
    problem = [w], torch.tensor([0.05], dtype=torch.float64), (len(c),), "euclidean", 1, "output"
    new, g = c + 0.01 * draw(len(c)), draw(len(w), seed=3)
    u, moments = draw(1, len(c), 1, seed=4), draw(1, len(c), 3, seed=5).abs()
    steps = [(c[None, :, None], new[None, :, None], u, moments, last) for last in (True, False)]
    ours, exact = triton.DKM(*problem), reference.DKM(*problem)
    assert_close(ours.output(*steps[0][:2])[0], exact.output(*steps[0][:2])[0], rtol=1e-9, atol=1e-9)
    gradient = ours.gradient(steps, [g])[0]
    assert gradient.isfinite().all()
    if name in (
        "crowded",
        "duplicates",
        "one",
        "equal",
    ):  # numbers of 1e30 take all digits of the others; an ulp decides about a slope
        assert_close(gradient, exact.gradient(steps, [g])[0], rtol=1e-8, atol=1e-8)


def test_many_centroids(triton):
    """More than a byte holds."""
    w, k = draw(500), 300
    options = {"iterations": 1}
    for ours, exact in zip(
        results(r2, [w], [start(k)], 0.01, **options), results(reference, [w], [start(k)], 0.01, **options), strict=True
    ):
        assert_close(ours, exact, rtol=1e-9, atol=1e-10)


@METRICS
@pytest.mark.parametrize("d", [1, 2])
def test_invalid_numbers_give_nan(d, metric, triton):
    w = draw(30, 6).float()
    for special in (math.nan, math.inf, -math.inf):
        bad = w.clone()
        bad[3, 2] = special
        for ours, exact in zip(
            results(r2, [bad], [start(4, d).float()], 0.2, iterations=2, metric=metric, cluster_dim=d),
            results(reference, [bad], [start(4, d).float()], 0.2, iterations=2, metric=metric, cluster_dim=d),
            strict=True,
        ):
            assert ours.isnan()[exact.isnan()].all()
        one = triton.DKM([bad], torch.tensor([0.2]), (4,), metric, d, "output").output(
            *[start(4, d).float().sort(0).values.reshape(1, 4, d)] * 2
        )[0]
        exact = reference.DKM([bad], torch.tensor([0.2]), (4,), metric, d, "output").output(
            *[start(4, d).float().sort(0).values.reshape(1, 4, d)] * 2
        )[0]
        assert torch.equal(one.isnan(), exact.isnan())
    c = start(4, d).float().sort(0).values.reshape(1, 4, d).expand(4, 4, d)
    job = triton.DKM([w] * 4, torch.tensor([0.0, -1.0, math.nan, 0.3]), (4,) * 4, metric, d, "output")
    new, moments = job.update(c)
    assert new[:3].isnan().all() and moments[:3].isnan().all() and new[3].isfinite().all()
    outputs = job.output(c, c)
    u = job.recur(c, c, torch.ones_like(c), moments, [w] * 4)
    gradients = job.gradient([(c, c, u, moments, True)], [w] * 4)
    assert (
        all(x.isnan().all() for x in (*outputs[:3], *gradients[:3], u[:3]))
        and outputs[3].isfinite().all()
        and gradients[3].isfinite().all()
    )


def test_empty_clusters_stay(triton):
    for d in (1, 2):
        w, c = draw(20, 2).float(), start(3, d).float().reshape(1, 3, d).sort(1).values
        c[0, 2] = 1e6
        job = triton.DKM([w], torch.tensor([0.1]), (3,), "euclidean", d, "output")
        new, moments = job.update(c)
        assert torch.equal(new[0, 2], c[0, 2]) and (moments[0, 2] == 0).all()
        u = job.recur(c, new, torch.ones_like(c), moments)
        assert (u[0, 2] == 0).all() and u.isfinite().all()


def test_jacobian(triton):
    for k in (3, 21):
        w, c, tau = draw(200), start(k).sort().values[None, :, None], torch.tensor([0.3], dtype=torch.float64)
        ours, exact = (layer.DKM([w], tau, (k,), "euclidean", 1, "output") for layer in (triton, reference))
        new, moments = exact.update(c)
        assert_close(ours.update(c)[1], moments, rtol=1e-11, atol=1e-11)
        assert_close(ours.jacobian(c, new, moments), exact.jacobian(c, new, moments), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("k", "d"), [(5, 1), (300, 1), (3, 2), (40, 3)])
def test_assign(k, d, triton):
    ws = [draw(24, 10, seed=2).float(), draw(9, 4, seed=3).float().t()]
    cs = [start(k, d, seed=1).float(), start(k + 1, d, seed=2).float()]
    for layout in ("output", "contiguous"):
        with pytest.warns(UserWarning) if k > 9 else torch.no_grad():
            codes = r2.assign(ws, cs, cluster_dim=d, layout=layout)
        for w, c, found in zip(ws, cs, codes, strict=True):
            D = torch.cdist(
                reference.columns(w, d, layout).t().double(),
                c.double().reshape(-1, d),
                compute_mode="donot_use_mm_for_euclid_dist",
            )
            assert found.dtype == (torch.uint8 if len(c) <= 256 else torch.int32)
            assert_close(D.gather(1, found.long()[:, None])[:, 0], D.amin(1), rtol=1e-6, atol=0)
    w = torch.tensor([-9.0, 0.5, 1.5, 2.0, math.nan, math.inf])
    assert r2.assign(w, torch.tensor([2.0, 1.0, 2.0, 0.0])).tolist() == [3, 1, 0, 0, 0, 0]


def test_chunks_groups_and_bits(triton, monkeypatch):
    """Several chunks of each plan; few partial sums at a time; a padding longer than the largest number of clusters;
    the same bits again; rows in windows."""
    from r2kernels.backends.triton import dkm as clustering

    ws, tau = [draw(20000).float(), draw(17).float()], torch.tensor([0.2, 0.1])
    for metric in ("euclidean", "sqeuclidean"):
        c = torch.zeros(2, 24, 1)
        c[0, :20, 0], c[1, :3, 0] = start(20).float().sort().values, start(3).float().sort().values
        found = []
        for most, states in ((2**24, 2**25), (1, 2**25), (2**24, 1)):
            monkeypatch.setattr(clustering, "PARTIAL", most)
            monkeypatch.setattr(clustering, "STATES", states)
            job = triton.DKM(ws, tau, (20, 3), metric, 1, "output")
            new, moments = job.update(c)
            u = job.recur(c, new, job.upstream(c, ws), moments, ws)
            found.append([new, moments, u, *job.output(c, new), *job.gradient([(c, new, u, moments, True)], ws)])
        windows = found.pop()
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        for one, whole in zip(windows, found[0], strict=True):
            assert (one - whole)[~whole.isnan()].norm() <= 1e-5 * whole.nan_to_num().norm()
        assert all((x[0, 20:] == 0).all() and (x[1, 3:] == 0).all() for x in found[0][:3])
        exact = reference.DKM([w.double() for w in ws], tau.double(), (20, 3), metric, 1, "output").update(c.double())[
            0
        ]
        assert_close(new.double(), exact, rtol=1e-5, atol=1e-5)
