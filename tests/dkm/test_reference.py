"""DKM: the mathematics of the reference, and the public functions on whatever backend serves the device."""

import math
import warnings

import cases
import pytest
import torch
from torch.testing import assert_close

import r2kernels as r2
from r2kernels import ops, reference
from r2kernels.algorithms import fixed_point
from r2kernels.reference.dkm import iterate

METRICS = pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
GRADIENTS = pytest.mark.parametrize("gradient", ["unrolled", "last", "implicit"])
LAYERS = pytest.mark.parametrize("layer", [r2, reference], ids=["r2kernels", "reference"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def start(k, d=1, seed=0, device="cpu"):
    """Centroids in no order."""
    c = torch.randn(k, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)
    return c[:, 0] if d == 1 else c


def draw(*shape, seed=1, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


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
    w, c, tau = draw(30, 7), start(5, d).reshape(5, d), 0.7
    c = c.sort(0).values if d == 1 else c
    job = passes(w, 5, tau, metric, d)
    new, moments = job.update(c[None])

    def F(c):
        return iterate(reference.columns(w, d).t(), c, torch.tensor(tau, dtype=w.dtype), metric)[2]

    J = torch.autograd.functional.jacobian(F, c)
    u = draw(1, 5, d, seed=3)
    assert_close(job.recur(c[None], new, u, moments)[0], torch.einsum("kd,kdle->le", u[0], J), rtol=1e-11, atol=1e-12)
    if d == 1:
        assert_close(job.jacobian(c[None], new, moments)[0], J[:, 0, :, 0], rtol=1e-11, atol=1e-12)
    exact = torch.linalg.solve((torch.eye(5 * d, dtype=w.dtype) - J.reshape(5 * d, 5 * d)).t(), u.flatten())
    assert_close(fixed_point.adjoint(job, c[None], new, moments, u).flatten(), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("k", "most"), [(2, 20), (4, 20), (8, 20), (16, 20)])
@pytest.mark.parametrize("sharpness", [1.0, 10.0])
def test_newton_needs_few_passes(k, most, sharpness, device, variant):
    """From `kmeans` to 1e-7 of the range in at most 20 passes, where plain iterations need hundreds."""
    w = draw(200, 100, device=device)
    c = r2.kmeans(w, k)[None, :, None]
    tau, tol = torch.tensor([1 / k / sharpness], dtype=w.dtype, device=device), 1e-7 * (w.max() - w.min())[None]
    problem = tau, (k,), "euclidean", 1, "output"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, count = ops.op["dkm_solve"]([w], c, tol, most, True, *problem)
    new = ops.op["dkm_fwd"]([w], found, 1, *problem)[1][-1]
    assert count <= most and (new - found).abs().max() <= tol


@METRICS
@pytest.mark.parametrize("d", [1, 2])
def test_implicit_equals_many_unrolled_iterations(metric, d, device, variant):
    w, g, tau = draw(40, 9, device=device), draw(40, 9, seed=2, device=device), 0.5
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
    """Outputs, centroids, dL/dW and dL/dC_0 of the whole function, for a list with different numbers of clusters, in float64."""
    ws = [draw(9, 7, seed=s, device=device).requires_grad_() for s in range(2)] + [
        draw(11, seed=5, device=device).requires_grad_()
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
    ws = [draw(4, 3, seed=s, device=device).requires_grad_() for s in range(2)]
    cs = [start(k, d, seed=k, device=device).requires_grad_() for k in (3, 2)]

    def f(*inputs):
        w_hat, c = r2.dkm(inputs[:2], inputs[2:], 0.6, iterations=2, metric=metric, cluster_dim=d, layout=layout)
        return *w_hat, *c

    assert torch.autograd.gradcheck(f, [*ws, *cs])


@METRICS
def test_gradcheck_implicit(metric, device, variant):
    """The fixed point moves with W as the implicit gradient says."""
    w = draw(6, 5, device=device).requires_grad_()

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
    w, c = draw(50, 9, device=device), start(7, device=device)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(4)).to(device)
    w_hat, centroids = r2.dkm(w, c, 0.3, metric=metric)
    w_hat_2, centroids_2 = r2.dkm(w, c[order], 0.3, metric=metric)
    assert torch.equal(w_hat, w_hat_2) and torch.equal(centroids[order], centroids_2)
    if metric == "euclidean":  # an iteration keeps the order: the kernel is totally positive
        assert (centroids[c.argsort()].diff() >= 0).all()


def test_nothing_is_mutated_and_bits_are_the_same_every_run(device, variant):
    w, c = draw(300, 211, device=device).float(), start(16, device=device).float()
    kept = w.clone(), c.clone()
    leaf = w.requires_grad_()
    found = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            w_hat, centroids = r2.dkm(leaf, c, 0.05)
            found.append((w_hat, centroids, torch.autograd.grad(w_hat.square().sum(), leaf)[0]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(w, kept[0]) and torch.equal(c, kept[1])
    for other in found[1:] if variant.backend != "reference" else ():
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@GRADIENTS
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
def test_saved_for_backward_is_w_and_little_else(metric, gradient, device, variant):
    w, k, iterations = draw(100, 100, device=device).float().requires_grad_(), 16, 7
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        r2.dkm(w, start(k, device=device).float(), 0.05, iterations=iterations, metric=metric, gradient=gradient)
    sizes = sorted(t.numel() for t in saved)
    assert sizes[-1] == w.numel() and sum(sizes[:-1]) <= (4 * iterations + 2) * k + 1


def test_leftovers_and_strides(device, variant):
    """Ŵ lies as W does; the numel mod d numbers that are left over pass through, and so does their gradient."""
    for w, d, layout in (
        (draw(7, 3, device=device), 2, "contiguous"),
        (draw(7, 3, device=device), 2, "output"),
        (draw(7, 4, device=device).t(), 1, "output"),
        (draw(8, 6, 3, 3, device=device).contiguous(memory_format=torch.channels_last), 4, "output"),
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
        w = draw(40, 9, device=device).to(dtype)
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
    w, c = draw(40, 9, device=device), start(4, device=device)
    tau = torch.tensor([0.1, 0.0, -1.0, float("nan")], dtype=torch.float64, device=device)
    w_hat, centroids = r2.dkm([w] * 4, [c] * 4, tau, metric=metric)
    assert [x.isnan().all().item() for x in centroids] == [False, True, True, True]
    assert [x.isnan().all().item() for x in w_hat] == [False, True, True, True]


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 5, 256, 300])
def test_assign(d, k, device, variant):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        ws = [draw(60, 11, device=device).to(dtype), draw(301, seed=2, device=device).to(dtype)]
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


CENTROIDS = torch.tensor([0.1, 0.2])
BAD = [
    (lambda f: f(0.1, CENTROIDS, 1.0), TypeError, "W must be a floating-point tensor or a sequence of them, got float"),
    (lambda f: f(torch.ones(4), [0.1, 0.2], 1.0), TypeError, "centroids must be a tensor, got list"),
    (
        lambda f: f([torch.ones(4)], CENTROIDS, 1.0),
        TypeError,
        "centroids must be a sequence of 1 tensors, one for each tensor of W, got Tensor",
    ),
    (lambda f: f([torch.ones(4)], [CENTROIDS] * 2, 1.0), ValueError, "centroids has 2 tensors; W has 1"),
    (lambda f: f([torch.ones(4)], [0.3], 1.0), TypeError, r"centroids\[0\] must be a tensor, got float"),
    (
        lambda f: f(torch.ones(4), CENTROIDS[:0], 1.0),
        ValueError,
        r"centroids has shape \(0,\); allowed is \(K,\) with K >= 1 for cluster_dim=1",
    ),
    (lambda f: f(torch.ones(4), CENTROIDS[None], 1.0), ValueError, r"centroids has shape \(1, 2\); allowed is \(K,\)"),
    (
        lambda f: f(torch.ones(4), CENTROIDS, 1.0, cluster_dim=2),
        ValueError,
        r"centroids has shape \(2,\); allowed is \(K, 2\) with K >= 1 for cluster_dim=2",
    ),
    (
        lambda f: f(torch.ones(4), CENTROIDS.double(), 1.0),
        TypeError,
        "centroids has dtype torch.float64; allowed is torch.float32 for W of torch.float32",
    ),
    (
        lambda f: f(torch.ones(4).double(), CENTROIDS, 1.0),
        TypeError,
        "centroids has dtype torch.float32; allowed is torch.float64",
    ),
    (lambda f: f(torch.ones(4), CENTROIDS.to("meta"), 1.0), ValueError, "centroids is on meta but W is on cpu"),
    (lambda f: f(torch.ones(4), CENTROIDS, 0.0), ValueError, "tau must be a finite number > 0, got 0"),
    (lambda f: f(torch.ones(4), CENTROIDS, -1), ValueError, "tau must be a finite number > 0, got -1"),
    (lambda f: f(torch.ones(4), CENTROIDS, float("nan")), ValueError, "tau must be a finite number > 0, got nan"),
    (lambda f: f(torch.ones(4), CENTROIDS, "1"), TypeError, "tau must be a number or a tensor, got str"),
    (lambda f: f(torch.ones(4), CENTROIDS, torch.tensor(1.0, requires_grad=True)), ValueError, "tau requires grad"),
    (
        lambda f: f(torch.ones(4), CENTROIDS, 1.0, iterations=0),
        ValueError,
        'iterations must be an int >= 1 or "converge", got 0',
    ),
    (
        lambda f: f(torch.ones(4), CENTROIDS, 1.0, iterations=2.0),
        TypeError,
        'iterations must be an int >= 1 or "converge", got 2.0',
    ),
    (
        lambda f: f(torch.ones(4), CENTROIDS, 1.0, iterations="forever"),
        TypeError,
        "iterations must be an int >= 1 or \"converge\", got 'forever'",
    ),
    (lambda f: f(torch.ones(4), CENTROIDS, 1.0, max_passes=0), ValueError, "max_passes must be an int >= 1, got 0"),
    (
        lambda f: f(torch.ones(4), CENTROIDS, 1.0, metric="cosine"),
        ValueError,
        r"metric must be one of \('euclidean', 'sqeuclidean'\), got 'cosine'",
    ),
    (
        lambda f: f(torch.ones(4), CENTROIDS, 1.0, gradient="none"),
        ValueError,
        r"gradient must be one of \('unrolled', 'last', 'implicit'\), got 'none'",
    ),
    (
        lambda f: f(torch.ones(4), CENTROIDS, 1.0, tol=1e-3),
        ValueError,
        'tol=0.001 is only used with iterations="converge", got iterations=5',
    ),
    (
        lambda f: f(torch.ones(4), CENTROIDS, 1.0, tol=-1.0, iterations="converge"),
        ValueError,
        "tol must be a finite number > 0, got -1",
    ),
    (lambda f: f(torch.ones(4), CENTROIDS, 1.0, cluster_dim=0), ValueError, "cluster_dim must be an int >= 1, got 0"),
]


@LAYERS
@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(call, error, message, layer):
    with pytest.raises(error, match=message):
        call(layer.dkm)


@LAYERS
def test_more_clusters_than_rows_warns(layer, device):
    with pytest.warns(UserWarning, match="centroids has 3 clusters for 2 rows of W"):
        layer.dkm(torch.tensor([0.1, 0.2], device=device), torch.tensor([0.1, 0.2, 0.3], device=device), 0.1)


def test_not_converged_warns(device):
    with pytest.warns(
        UserWarning,
        match=r"1 of 2 tensors did not converge in max_passes=2 \(index: largest \|F\(C\) - C\|: 1: .* > .*\)",
    ):
        r2.dkm(
            [torch.ones(3, device=device), draw(50, 9, device=device).float()],
            [torch.ones(1, device=device), start(5, device=device).float()],
            0.3,
            iterations="converge",
            max_passes=2,
        )


def test_second_derivatives_raise(device, variant):
    w = draw(5, 3, device=device).requires_grad_()
    (g,) = torch.autograd.grad(r2.dkm(w, start(2, device=device), 0.5)[0].sum(), w, create_graph=False)
    assert g.isfinite().all()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(r2.dkm(w, start(2, device=device), 0.5)[0].sum(), w, create_graph=True)


@METRICS
@pytest.mark.parametrize("d", [1, 2])
def test_opcheck(d, metric, device):
    ws = [draw(9, 4, device=device).float(), draw(13, seed=2, device=device).float()]
    c = torch.stack([start(4, d, seed=s, device=device).reshape(4, d) for s in range(2)]).float().sort(1).values
    c[1, 3] = 0
    problem = torch.tensor([0.5, 0.4], device=device), (4, 3), metric, d, "output"
    torch.library.opcheck(ops.op["dkm_fwd"], (ws, c, 3, *problem))
    buffers, history, moments = ops.op["dkm_fwd"](ws, c, 3, *problem)
    for gradient in ("unrolled", "last", "implicit"):
        torch.library.opcheck(
            ops.op["dkm_bwd"], (c, ws, [torch.ones_like(w) for w in ws], history, moments, gradient, True, *problem)
        )
    torch.library.opcheck(
        ops.op["dkm_solve"], (ws, c, torch.tensor([1e-3, 1e-3], dtype=torch.float64, device=device), 50, True, *problem)
    )
    torch.library.opcheck(ops.op["assign_fwd"], (ws, c, (4, 3), d, "output"))
    assert len(buffers) in (1, 2)


@pytest.mark.parametrize(
    "options",
    [{}, {"metric": "sqeuclidean", "gradient": "last"}, {"gradient": "implicit", "iterations": "converge"}],
    ids=str,
)
@pytest.mark.parametrize("d", [1, 2])
def test_compiled_equals_eager(d, options, device):
    ws = [draw(9, 4, seed=s, device=device).requires_grad_() for s in range(2)]
    cs = [start(3, d, device=device).requires_grad_() for _ in range(2)]

    def step(ws, cs):
        w_hat, c = r2.dkm(ws, cs, 0.5, cluster_dim=d, **options)
        return sum(x.square().sum() for x in [*w_hat, *c]) + sum(x.sum() for x in r2.assign(ws, cs, cluster_dim=d))

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = f(ws, cs)
        results.append([loss, *torch.autograd.grad(loss, [*ws, *cs], allow_unused=True)])
    for eager, compiled in zip(*results, strict=True):
        assert (eager is None or eager.count_nonzero() == 0) if compiled is None else torch.equal(eager, compiled)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_float32_model_trains_under_compile(backend, device):
    """A step as a user writes it: fresh W_hat from the weights, a loss on it, centroids carried on."""
    layer, tau = torch.nn.Linear(16, 16, device=device), 0.05
    c = r2.kmeans(layer.weight, 4)

    @torch.compile(fullgraph=True, backend=backend)
    def loss(weight, c, x):
        w_hat, c = r2.dkm(weight, c, tau)
        return torch.nn.functional.linear(x, w_hat).square().mean(), c

    value, c = loss(layer.weight, c, torch.randn(4, 16, device=device))
    value.backward()
    assert layer.weight.grad.count_nonzero() > 0 and c.shape == (4,)


def test_scale_of_the_cases():
    """The draws above have spread 1, those of the table `cases.SCALE`; a temperature is meant relative to it."""
    w, c = draw(50, 9), start(5)
    for scale in (cases.SCALE, 40.0):
        a, b = r2.dkm(w, c, 0.3)[0], r2.dkm(w * scale, c * scale, 0.3 * scale)[0]
        assert_close(a * scale, b, rtol=1e-10, atol=1e-12)
