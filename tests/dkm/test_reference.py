"""DKM: the mathematics of the reference, and the public functions on whatever backend serves the device.

What they take is in test_calls.py.
"""

import math
import warnings

import cases
import pytest
import torch
from dkm.problems import UNITS, numbers, start
from torch.testing import assert_close

import r2kernels as r2
from r2kernels import ops, reference
from r2kernels.algorithms import fixed_point
from r2kernels.reference.dkm import iterate

METRICS = pytest.mark.parametrize("metric", UNITS)
GRADIENTS = pytest.mark.parametrize("gradient", ["unrolled", "last", "implicit"])
LAYERS = pytest.mark.parametrize("layer", [r2, reference], ids=["r2kernels", "reference"])


def passes(w, k, tau, metric, d=1):
    return reference.DKM([w], torch.tensor([tau], dtype=w.dtype), (k,), metric, d, "output")


# W = (0, 1), c = (0, 1): the farther attention is r to the nearer's 1, so a = (1, r) / (1 + r) and c'_0 = r / (1 + r)
@LAYERS
@pytest.mark.parametrize(("metric", "tau"), [("euclidean", 1 / math.log(3)), ("sqeuclidean", 1 / math.log(3))])
def test_literal(layer, metric, tau, device):
    w, c = torch.tensor([0.0, 1.0], device=device), torch.tensor([0.0, 1.0], device=device)
    w_hat, centroids = layer.dkm(w, c, tau, iterations=1, metric=metric)
    assert_close(centroids, torch.tensor([0.25, 0.75], device=device))
    assert_close(w_hat, torch.tensor([0.375, 0.625], device=device))
    w_hat, centroids = layer.dkm(w, c, 1e-9, iterations=4, metric=metric)
    assert w_hat.tolist() == centroids.tolist() == [0, 1]


@LAYERS
def test_literal_rows(layer, device):
    """Two rows of two numbers: (0, 0) and (3, 4) lie 5 apart. The fifth number is left over."""
    w = torch.tensor([0.0, 0, 3, 4, 9], device=device)
    c = torch.tensor([[0.0, 0], [3, 4]], device=device)
    for metric, tau in (("euclidean", 5 / math.log(3)), ("sqeuclidean", 25 / math.log(3))):
        w_hat, centroids = layer.dkm(w, c, tau, iterations=1, metric=metric, cluster_dim=2, layout="contiguous")
        assert_close(centroids, torch.tensor([[0.75, 1], [2.25, 3]], device=device))
        assert_close(w_hat, torch.tensor([1.125, 1.5, 1.875, 2.5, 9], device=device))


@METRICS
@pytest.mark.parametrize("d", [1, 3])
def test_jacobian_and_recurrence(metric, d):
    """The backward of one iteration, and for scalars its Jacobian, are autograd's."""
    w, c, tau = numbers(30, 7), start(5, d).reshape(5, d), 0.7
    c = c.sort(0).values if d == 1 else c
    job = passes(w, 5, tau, metric, d)
    new, moments = job.update(c[None])

    def F(c):
        return iterate(reference.columns(w, d).t(), c, torch.tensor(tau, dtype=w.dtype), metric)[2]

    J = torch.autograd.functional.jacobian(F, c)
    u = numbers(1, 5, d, seed=3)
    assert_close(job.recur(c[None], new, u, moments)[0], torch.einsum("kd,kdle->le", u[0], J), rtol=1e-11, atol=1e-12)
    if d == 1:
        assert_close(job.jacobian(c[None], new, moments)[0], J[:, 0, :, 0], rtol=1e-11, atol=1e-12)
    exact = torch.linalg.solve((torch.eye(5 * d, dtype=w.dtype) - J.reshape(5 * d, 5 * d)).t(), u.flatten())
    assert_close(fixed_point.adjoint(job, c[None], new, moments, u).flatten(), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("k", "most"), [(2, 20), (4, 20), (8, 20), (16, 20)])
@pytest.mark.parametrize("sharpness", [1.0, 10.0])
def test_newton_needs_few_passes(k, most, sharpness, device, variant):
    """From `kmeans` to 1e-7 of the range in at most 20 passes, where plain iterations need hundreds."""
    w = numbers(200, 100, device=device)
    c = r2.kmeans(w, k)[None, :, None]
    tau, tol = torch.tensor([1 / k / sharpness], dtype=w.dtype, device=device), 1e-7 * (w.max() - w.min())[None]
    problem = tau, (k,), "euclidean", 1, "output"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, count = ops.op["dkm_solve"]([w], c, tol, most, True, *problem)
    new = ops.op["dkm_fwd"]([w], found, 1, False, *problem)[1][-1]
    assert count <= most and (new - found).abs().max() <= tol


@METRICS
@pytest.mark.parametrize("d", [1, 2])
def test_implicit_equals_many_unrolled_iterations(metric, d, device, variant):
    w, g, tau = numbers(40, 9, device=device), numbers(40, 9, seed=2, device=device), 0.5
    c = start(3, d, device=device)
    leaf = w.clone().requires_grad_()
    _, settled = r2.dkm(w, c, tau, iterations=400, metric=metric, cluster_dim=d)
    gradients = []
    for options in (
        {"iterations": 500},
        {"iterations": "converge", "gradient": "implicit", "tol": 1e-12},
        {"iterations": 3, "gradient": "implicit"},
    ):
        w_hat, _ = r2.dkm(leaf, settled, tau, metric=metric, cluster_dim=d, **options)
        gradients.append(torch.autograd.grad((w_hat * g).sum(), leaf)[0])
    for other in gradients[1:]:
        assert_close(other, gradients[0], rtol=1e-7, atol=1e-7)


@GRADIENTS
@METRICS
@pytest.mark.parametrize("d", [1, 2])
def test_equals_the_reference_under_autograd(d, metric, gradient, device, variant):
    """Outputs, centroids, dL/dW and dL/dC_0 of the whole function, in float64; K differs from tensor to tensor."""
    ws = [numbers(9, 7, seed=s, device=device).requires_grad_() for s in range(2)] + [
        numbers(11, seed=5, device=device).requires_grad_()
    ]
    cs = [start(k, d, seed=k, device=device).requires_grad_() for k in (4, 3, 6)]
    results = []
    for layer in (r2, reference):
        w_hat, c = layer.dkm(ws, cs, [0.5, 0.3, 0.8], iterations=3, metric=metric, gradient=gradient, cluster_dim=d)
        total = sum((x * x.detach().cos()).sum() for x in [*w_hat, *c])
        results.append([*w_hat, *c, *torch.autograd.grad(total, [*ws, *cs], allow_unused=True)])
    for ours, exact in zip(*results, strict=True):
        assert (ours is None) == (exact is None)
        if exact is not None:
            assert_close(ours, exact, rtol=1e-10, atol=1e-12)


@METRICS
@pytest.mark.parametrize(("d", "layout"), [(1, "output"), (2, "output"), (3, "contiguous")])
def test_gradcheck(d, layout, metric, device, variant):
    ws = [numbers(4, 3, seed=s, device=device).requires_grad_() for s in range(2)]
    cs = [start(k, d, seed=k, device=device).requires_grad_() for k in (3, 2)]

    def f(*inputs):
        w_hat, c = r2.dkm(inputs[:2], inputs[2:], 0.6, iterations=2, metric=metric, cluster_dim=d, layout=layout)
        return *w_hat, *c

    assert torch.autograd.gradcheck(f, [*ws, *cs])


@METRICS
def test_gradcheck_implicit(metric, device, variant):
    """The fixed point moves with W as the implicit gradient says."""
    w = numbers(6, 5, device=device).requires_grad_()

    def f(w):
        return r2.dkm(
            w,
            start(3, device=device),
            0.6,
            iterations="converge",
            tol=1e-13,
            max_passes=400,
            metric=metric,
            gradient="implicit",
        )

    assert torch.autograd.gradcheck(f, w, atol=1e-6)


@METRICS
def test_centroids_keep_the_order_of_the_caller(metric, device, variant):
    w, c = numbers(50, 9, device=device), start(7, device=device)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(4)).to(device)
    w_hat, centroids = r2.dkm(w, c, 0.3, metric=metric)
    w_hat_2, centroids_2 = r2.dkm(w, c[order], 0.3, metric=metric)
    assert torch.equal(w_hat, w_hat_2) and torch.equal(centroids[order], centroids_2)
    if metric == "euclidean":  # an iteration keeps the order: the kernel is totally positive
        assert (centroids[c.argsort()].diff() >= 0).all()


def test_leftovers_and_strides(device, variant):
    """Ŵ lies as W does; the numel mod d numbers that are left over pass through, and so does their gradient."""
    for w, d, layout in (
        (numbers(7, 3, device=device), 2, "contiguous"),
        (numbers(7, 3, device=device), 2, "output"),
        (numbers(7, 4, device=device).t(), 1, "output"),
        (numbers(8, 6, 3, 3, device=device).contiguous(memory_format=torch.channels_last), 4, "output"),
    ):
        leaf = w.clone(memory_format=torch.preserve_format).requires_grad_()
        w_hat, _ = r2.dkm(leaf, start(3, d, device=device), 0.4, cluster_dim=d, layout=layout)
        exact, _ = reference.dkm(w, start(3, d, device=device), 0.4, cluster_dim=d, layout=layout)
        assert_close(w_hat, exact, rtol=1e-11, atol=1e-12)
        (g,) = torch.autograd.grad(w_hat.sum(), leaf)
        if w.numel() % d:
            left = w == (w.transpose(0, -1).reshape(-1) if layout == "output" else w.reshape(-1))[-1]
            assert torch.equal(w_hat[left], w[left]) and (g[left] == 1).all()
        else:
            assert w_hat.stride() == w.stride()


EDGES = {
    "one element": ([0.3], [0.1, 0.2]),
    "one cluster": ([0.3, -0.1, 0.5], [0.0]),
    "zero": ([0.0] * 9, [0.0, 0.1]),
    "constant": ([0.2] * 9, [0.1, 0.3]),
    "constant at a centroid": ([0.2] * 9, [0.2, 0.3]),
    "all centroids equal": ([0.1, 0.2, 0.4], [0.3] * 3),
    "duplicates": ([0.1, 0.2, 0.4, 0.2], [0.2, 0.1, 0.2, 0.2]),
    "weights at centroids": ([0.1, 0.2, 0.3, 0.25], [0.3, 0.2, 0.1]),
    "an empty cluster": ([0.1, 0.2], [0.15, 1e6]),
    "empty clusters between": ([-500.0, 500.0], [-501.0, -1, 1, 501]),
    "more clusters than rows": ([0.1, 0.2], [0.1, 0.3, 0.2, 0.15]),
}


@METRICS
@pytest.mark.parametrize("name", EDGES)
@pytest.mark.filterwarnings("ignore:centroids has")
def test_edges(name, metric, device, variant):
    """What the reference gives, to rounding, and finite: empty clusters stay, without gradient."""
    w, c = (torch.tensor(x, dtype=torch.float64, device=device) for x in EDGES[name])
    for tau in (1e-3, 0.1, 100.0):
        results = []
        for layer in (r2, reference):
            leaf, first = w.clone().requires_grad_(), c.clone().requires_grad_()
            w_hat, centroids = layer.dkm(leaf, first, tau, iterations=3, metric=metric)
            g = torch.autograd.grad(
                (w_hat * torch.arange(1.0, len(w) + 1, device=device)).sum() + centroids.square().sum(), [leaf, first]
            )
            results.append([w_hat, centroids, *g])
        for ours, exact in zip(*results, strict=True):
            assert ours.isfinite().all()
            assert_close(ours, exact, rtol=1e-8, atol=1e-8)


@METRICS
@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf(special, d, metric, device, variant):
    for dtype in (torch.float32, torch.bfloat16):
        w = numbers(40, 9, device=device).to(dtype)
        w[3, 2] = special
        leaf = w.requires_grad_()
        w_hat, c = r2.dkm(leaf, start(4, d, device=device).float(), 0.2, metric=metric, cluster_dim=d)
        w_hat.sum().backward()
        assert c.isnan().any() and leaf.grad.isnan().any() and w_hat.isnan().any()
        _, c = r2.dkm(
            leaf, start(4, d, device=device).float(), 0.2, metric=metric, cluster_dim=d, iterations="converge"
        )
        assert c.isnan().any()  # at once: there is nothing to converge to


@METRICS
def test_invalid_tau_in_a_tensor_gives_nan(metric, device, variant):
    w, c = numbers(40, 9, device=device), start(4, device=device)
    tau = torch.tensor([0.1, 0.0, -1.0, float("nan")], dtype=torch.float64, device=device)
    w_hat, centroids = r2.dkm([w] * 4, [c] * 4, tau, metric=metric)
    assert [x.isnan().all().item() for x in centroids] == [False, True, True, True]
    assert [x.isnan().all().item() for x in w_hat] == [False, True, True, True]


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 5, 256, 300])
def test_assign(d, k, device, variant):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        ws = [numbers(60, 11, device=device).to(dtype), numbers(301, seed=2, device=device).to(dtype)]
        c = start(k, d, device=device).to(torch.promote_types(dtype, torch.float32))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="centroids")
            codes = r2.assign(ws, [c, c], cluster_dim=d)
        for w, found in zip(ws, codes, strict=True):
            rows = reference.columns(w, d).t().double()
            D = torch.cdist(rows, c.double().reshape(-1, d), compute_mode="donot_use_mm_for_euclid_dist")
            assert found.dtype == (torch.uint8 if k <= 256 else torch.int32) and found.shape == (w.numel() // d,)
            chosen = D.gather(1, found.long()[:, None])[:, 0]
            assert_close(chosen, D.amin(1), rtol=1e-6 if dtype != torch.float64 else 1e-12, atol=0)


@LAYERS
def test_assign_literals(layer, device):
    """Ties and duplicates take the lower index, in the order of the caller; NaN takes 0."""
    w = torch.tensor([-9.0, 0.5, 1.5, 2.0, float("nan"), 7.0], device=device)
    assert layer.assign(w, torch.tensor([2.0, 1.0, 2.0, 0.0], device=device)).tolist() == [3, 1, 0, 0, 0, 0]
    assert layer.assign(
        w[:4], torch.tensor([[0.0, 0], [1, 2]], device=device), cluster_dim=2, layout="contiguous"
    ).tolist() == [0, 1]


def test_scale_of_the_cases():
    """The draws above have spread 1, those of the table `cases.SCALE`; a temperature is meant relative to it."""
    w, c = numbers(50, 9), start(5)
    for scale in (cases.SCALE, 40.0):
        a, b = r2.dkm(w, c, 0.3)[0], r2.dkm(w * scale, c * scale, 0.3 * scale)[0]
        assert_close(a * scale, b, rtol=1e-10, atol=1e-12)
