"""Weights of every scale: to the bit where only powers of two are between them. float32 has no tau of squares for the
smallest and the largest: those come as far as it has."""

import pytest
import torch

import r2kernels as r2

pytestmark = [pytest.mark.usefixtures("nan_filled", "one_thread"), pytest.mark.filterwarnings("ignore")]

POWERS = {"euclidean": [-96, -61, -45, 30, 61, 100], "sqeuclidean": [-58, -41, 30, 60]}
METRICS = pytest.mark.parametrize("metric", POWERS)


def problem(d, dtype, device, c=1.0):
    g = torch.Generator().manual_seed(d)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    wide = torch.promote_types(dtype, torch.float32)
    w, other = draw(6 * d, 50), draw(4 * d)
    centroids = torch.cat([other.reshape(4, d), w[:1, :d]])  # weights equal centroids
    ws = [(x.to(dtype) * c).to(device).requires_grad_() for x in (w, other)]
    cs = [(x.squeeze(-1) if d == 1 else x).to(dtype).to(device, wide) * c for x in (centroids, centroids[:2])]
    upstream = [draw(*x.shape).to(x) for x in (*ws, *cs)]
    return ws, [x.requires_grad_() for x in cs], upstream


def results(metric, d, dtype, device, iterations, gradient, c=1.0, sharpness=0.4):
    """W_hat and centroids over c, and all gradients."""
    ws, cs, upstream = problem(d, dtype, device, c)
    tau = torch.tensor([sharpness, 0.7 * sharpness], device=device, dtype=cs[0].dtype)
    tau = tau * c * (c if metric == "sqeuclidean" else 1)
    options = dict(iterations=iterations, gradient=gradient, metric=metric, cluster_dim=d, layout="contiguous")
    hats, fresh = r2.dkm(ws, cs, tau, **options)
    grads = torch.autograd.grad([*hats, *fresh], [*ws, *cs], upstream, allow_unused=True)
    return [x.detach() / c for x in (*hats, *fresh)] + [g for g in grads if g is not None]


@pytest.mark.parametrize(
    ("iterations", "gradient"), [(1, "unrolled"), (5, "unrolled"), ("converge", "implicit")], ids=str
)
@pytest.mark.parametrize("d", [1, 2])
@METRICS
def test_powers_of_two(metric, d, iterations, gradient, device, variant):
    """To the bit, but for the number of Krylov vectors and a last bit that a linear solver may turn."""
    for dtype in (torch.float32, torch.bfloat16) if iterations == 5 else (torch.float32,):
        ones = results(metric, d, dtype, device, iterations, gradient)
        assert all(x.isfinite().all() for x in ones)
        for power in POWERS[metric]:
            found = results(metric, d, dtype, device, iterations, gradient, 2.0**power)
            for a, b in zip(found, ones, strict=True):
                if iterations == "converge":
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
                else:
                    assert torch.equal(a, b), power


@pytest.mark.parametrize("sharpness", [1e-6, 1e-2, 30.0])
@METRICS
def test_any_sharpness(metric, sharpness, device, variant):
    """tau need not have the scale of the weights."""
    for d in (1, 2):
        ones = results(metric, d, torch.float32, device, 2, "unrolled", 1.0, sharpness)
        for power in (-45, 45):
            found = results(metric, d, torch.float32, device, 2, "unrolled", 2.0**power, sharpness)
            for a, b in zip(found, ones, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item())


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_assign_and_kmeans(d, scale, device, variant):
    w = torch.randn(300 * d, generator=torch.Generator().manual_seed(d), dtype=torch.float64).float().to(device)
    c = w[: 7 * d].reshape(-1, d).squeeze(-1).clone()
    options = dict(cluster_dim=d, layout="contiguous")
    power = 2.0 ** round(torch.tensor(scale).log2().item())
    assert torch.equal(r2.assign(w * power, c * power, **options), r2.assign(w, c, **options))
    assert torch.equal(r2.kmeans(w * power, 5, **options), r2.kmeans(w, 5, **options) * power)


@pytest.mark.parametrize("special", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("d", [1, 2])
@METRICS
def test_a_centroid_that_is_no_number(metric, d, special, device, variant):
    """All results of its tensor are NaN, none of another's; it is never nearest."""
    ws, cs, upstream = problem(d, torch.float32, device)
    with torch.no_grad():
        cs[0].view(-1)[-1] = special
    hats, fresh = r2.dkm(ws, cs, 0.3, iterations=2, metric=metric, cluster_dim=d, layout="contiguous")
    grads = torch.autograd.grad([*hats, *fresh], [*ws, *cs], upstream)
    for first, second in (hats, fresh, grads[:2], grads[2:]):
        assert first.isnan().all() and second.isfinite().all()
    if metric == "euclidean":
        codes = r2.assign(ws[0].detach(), cs[0].detach(), cluster_dim=d, layout="contiguous")
        fewer = r2.assign(ws[0].detach(), cs[0].detach()[:-1], cluster_dim=d, layout="contiguous")
        assert torch.equal(codes, fewer)
        far = torch.full((2 * d,), special, device=device)
        assert r2.assign(far, cs[0].detach(), cluster_dim=d, layout="contiguous").tolist() == [0, 0]
