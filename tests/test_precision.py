"""Autocast and torch's switches for float32 products change nothing, forward and backward, to the bit."""

import contextlib
import threading

import cases
import pytest
import torch

import r2kernels as r2
from r2kernels import reference
from r2kernels.reference import precision

MATMUL = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


@contextlib.contextmanager
def matmul_precision(name):
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def switched(*values):
    """The switches that replace `set_float32_matmul_precision`."""
    before = [switch.fp32_precision for switch in MATMUL]
    for switch, value in zip(MATMUL, values, strict=True):
        switch.fp32_precision = value
    try:
        yield
    finally:
        for switch, value in zip(MATMUL, before, strict=True):
            switch.fp32_precision = value


CHANGES = {
    "autocast": lambda device: torch.autocast(device, torch.bfloat16),
    "high": lambda device: matmul_precision("high"),
    "medium": lambda device: matmul_precision("medium"),
    "switches": lambda device: switched("tf32", "bf16"),
}
every_change = pytest.mark.parametrize("change", CHANGES)
DKM = [
    {"gradient": gradient, "cluster_dim": d, "metric": metric}
    for gradient in ("unrolled", "last", "implicit")
    for d in (1, 4)
    for metric in ("euclidean", "sqeuclidean")
]
CALLS = [(op, {}) for op in cases.OPS if op.family != "dkm"]
CALLS += [(op, options) for op in cases.of("dkm") for options in (DKM if op.function == "dkm" else [{}])]


def weights(device):
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(s, generator=g) * cases.SCALE).to(device).requires_grad_() for s in ((64, 40), (32, 96))]


def results(layer, op, options, device):
    ws, arguments = weights(device), {**op.arguments(cases.SCALE), **options}
    learned = [p.name for p in op.parameters if p.learned]
    for name in learned:
        arguments[name] = torch.full((2,), arguments[name], device=device, requires_grad=True)
    if op.family == "dkm":
        g, d = torch.Generator().manual_seed(5), options.get("cluster_dim", 1)
        shape = (6,) if d == 1 else (6, d)
        arguments["centroids"] = [(torch.randn(shape, generator=g) * cases.SCALE).to(device) for _ in ws]
    found = getattr(layer, op.function)(ws, **arguments)
    if op.function == "assign":
        return found
    flat = (
        [*found[0], *found[1]] if op.family == "dkm" else list(found) if isinstance(found, (list, tuple)) else [found]
    )
    grads = [torch.linspace(-1, 2, t.numel(), device=device).reshape(t.shape).to(t.dtype) for t in flat]
    return [*flat, *torch.autograd.grad(flat, [*ws, *[arguments[name] for name in learned]], grads)]


@pytest.mark.parametrize(("op", "options"), CALLS, ids=[" ".join([op.label, *map(str, o.values())]) for op, o in CALLS])
@pytest.mark.parametrize("layer", [r2, reference], ids=["ops", "functions"])
def test_of_the_reference(layer, op, options, device):
    """Its ops, which the public functions call, and its own functions, whose backward is autograd's."""
    with r2.use_backend("reference"):
        expected = results(layer, op, options, device)
        for change in CHANGES.values():
            with change(device):
                found = results(layer, op, options, device)
            for a, b in zip(found, expected, strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b)


def test_of_fixed_points_and_kmeans(device):
    w = weights(device)[0].detach()[:3]
    centroids = reference.kmeans(w, 4)

    def calls():
        with r2.use_backend("reference"):
            return [
                reference.kmeans(w, 4),
                r2.kmeans(w, 4, cluster_dim=2),
                r2.dkm(w, centroids, 0.002, iterations="converge")[1],
                reference.dkm(w, centroids, 0.002, iterations="converge")[1],
                reference.weight_stats(w).kurtosis,
            ]

    expected = calls()
    for change in CHANGES.values():
        with change(device):
            assert all(torch.equal(a, b) for a, b in zip(calls(), expected, strict=True))


@every_change
def test_of_every_backend(change, variant, device):
    op = cases.BY_LABEL["dkm"]
    expected = results(r2, op, {"gradient": "implicit"}, device)
    with CHANGES[change](device):
        found = results(r2, op, {"gradient": "implicit"}, device)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("change", ["high", "medium", "switches"])
def test_switches_are_put_back_when_the_last_thread_leaves(change, device):
    a = torch.randn(256, 256, device=device)
    with CHANGES[change](device):
        before, rounded = [switch.fp32_precision for switch in MATMUL], a @ a
        inside, leave = threading.Event(), threading.Event()

        def other():
            with precision.full(a.device):
                inside.set()
                leave.wait()

        thread = threading.Thread(target=other)
        with precision.full(a.device):
            exact = a @ a
            thread.start()
            inside.wait()
        assert torch.equal(a @ a, exact)
        leave.set()
        thread.join()
        assert [switch.fp32_precision for switch in MATMUL] == before
        assert torch.equal(a @ a, rounded)


def test_functions_compile(device):
    torch._dynamo.reset()
    w, c = weights(device)[0], torch.linspace(-0.1, 0.1, 8, device=device)

    def run(w):
        return reference.dkm(w, c, 0.01, iterations=1)[0].square().sum()

    (expected,) = torch.autograd.grad(run(w), w)
    (found,) = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(w), w)
    torch.testing.assert_close(found, expected)
