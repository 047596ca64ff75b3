"""What dkm takes and how it behaves as a part of torch: errors, warnings, what it saves, opcheck, torch.compile."""

import pytest
import torch
from dkm.problems import UNITS, numbers, start

import r2kernels as r2
from r2kernels import ops, reference

METRICS = pytest.mark.parametrize("metric", UNITS)
GRADIENTS = pytest.mark.parametrize("gradient", ["unrolled", "last", "implicit"])
LAYERS = pytest.mark.parametrize("layer", [r2, reference], ids=["r2kernels", "reference"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


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
            [torch.ones(3, device=device), numbers(50, 9, device=device).float()],
            [torch.ones(1, device=device), start(5, device=device).float()],
            0.3,
            iterations="converge",
            max_passes=2,
        )


@METRICS
@pytest.mark.parametrize("d", [1, 2])
def test_opcheck(d, metric, device):
    ws = [numbers(9, 4, device=device).float(), numbers(13, seed=2, device=device).float()]
    c = torch.stack([start(4, d, seed=s, device=device).reshape(4, d) for s in range(2)]).float().sort(1).values
    c[1, 3] = 0
    problem = torch.tensor([0.5, 0.4], device=device), (4, 3), metric, d, "output"
    torch.library.opcheck(ops.op["dkm_fwd"], (ws, c, 3, True, *problem))
    buffers, history, moments = ops.op["dkm_fwd"](ws, c, 3, False, *problem)
    for gradient in ("unrolled", "last", "implicit"):
        torch.library.opcheck(
            ops.op["dkm_bwd"],
            (c, ws, [torch.ones_like(w) for w in ws], history, moments, gradient, True, False, *problem),
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
    ws = [numbers(9, 4, seed=s, device=device).requires_grad_() for s in range(2)]
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


def test_nothing_is_mutated_and_bits_are_the_same_every_run(device, variant):
    w, c = numbers(300, 211, device=device).float(), start(16, device=device).float()
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
@METRICS
def test_saved_for_backward_is_w_and_little_else(metric, gradient, device, variant):
    w, k, iterations = numbers(100, 100, device=device).float().requires_grad_(), 16, 7
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        r2.dkm(w, start(k, device=device).float(), 0.05, iterations=iterations, metric=metric, gradient=gradient)
    sizes = sorted(t.numel() for t in saved)
    assert sizes[-1] == w.numel() and sum(sizes[:-1]) <= (4 * iterations + 2) * k + 1


@pytest.mark.parametrize("gradient", ["last", "implicit"])
def test_compiled_until_it_converges(gradient, device):
    w, c = numbers(5, 3, device=device).requires_grad_(), start(2, device=device)

    def step(w):
        return r2.dkm(w, c, 0.5, iterations="converge", gradient=gradient)[0].square().sum()

    results = [f(w) for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager"))]
    (expected, found), gradients = results, [torch.autograd.grad(y, w)[0] for y in results]
    assert torch.equal(found, expected) and torch.equal(*gradients)


def test_compiled_until_it_converges_unrolled(device):
    """A graph cannot hold as many iterations as values ask for; without fullgraph it runs beside the graph."""
    w, c = numbers(5, 3, device=device).requires_grad_(), start(2, device=device)

    def step(w):
        return r2.dkm(w, c, 0.5, iterations="converge")[0].square().sum()

    with pytest.raises(RuntimeError, match="which no compiled graph can hold; give gradient"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(w)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(step, backend="aot_eager")(w), step(w))
