"""dkm with preserve_zeros: zeros of the weights stay, and so do centroids that are 0."""

import pytest
import torch
from torch.testing import assert_close

import r2kernels as r2

CASES = [(1, "euclidean"), (1, "sqeuclidean"), (2, "euclidean"), (2, "sqeuclidean")]


def problem(d, dtype=torch.float64, device="cpu"):
    """(weights with rows of zeros, centroids of which one is 0)"""
    g = torch.Generator().manual_seed(d)
    w = torch.randn(6, 11, generator=g, dtype=torch.float64)
    w[:, 3:7], w[0, 0] = 0, 0
    c = torch.randn(4, d, generator=g, dtype=torch.float64)
    c[2] = 0
    return w.to(device, dtype), (c[:, 0] if d == 1 else c).contiguous().to(device, dtype)


@pytest.mark.parametrize("gradient", ["unrolled", "last"])
@pytest.mark.parametrize(("d", "metric"), CASES)
def test_as_the_reference(d, metric, gradient, device, variant):
    """Outputs, and gradients against those of autograd through the same iterations."""
    w, c = problem(d, device=device)
    results = []
    for module in (r2, r2.reference):
        ws, cs = w.clone().requires_grad_(), c.clone().requires_grad_()
        hat, moved = module.dkm(
            ws, cs, 0.3, iterations=3, metric=metric, gradient=gradient, cluster_dim=d, preserve_zeros=True
        )
        (hat.sin().sum() + moved.cos().sum()).backward()
        results.append((hat, moved, ws.grad, cs.grad if gradient == "unrolled" else hat))
    for ours, exact in zip(*results, strict=True):
        assert_close(ours, exact, rtol=1e-9, atol=1e-11)
    hat, moved, dw, _ = results[0]
    assert (hat[:, 3:7] == 0).all() and (dw[:, 3:7] == 0).all() and (moved[2] == 0).all()
    assert (hat[:, :3] != 0).any() and (hat[0, 0] == 0) == (d == 1)


def test_the_gradient_is_that_of_the_function(device, variant):
    w, c = problem(1, device=device)
    at = w.nonzero().unbind(1)

    def of(values, c):
        return r2.dkm(w.clone().index_put(at, values), c, 0.3, iterations=2, preserve_zeros=True)

    free = torch.tensor([0, 1, 3], device=device)
    values, start = w[at].requires_grad_(), c[free].requires_grad_()
    assert torch.autograd.gradcheck(lambda v, s: of(v, c.index_put((free,), s)), (values, start))


def test_no_centroid_crosses_zero(device, variant):
    """All weights are positive: those that begin below 0 stop there, and the order stays."""
    w = torch.tensor([0.0, 1.0, 2.0, 3.0], device=device).repeat(5)
    c = torch.tensor([3.0, 0.0, -0.5], device=device)
    hat, moved = r2.dkm(w, c, 0.2, iterations=4, preserve_zeros=True)
    assert moved[1:].tolist() == [0, 0] and moved[0] > 1
    assert (hat[w == 0] == 0).all() and hat.isfinite().all()


def test_one_free_centroid(device, variant):
    """K = 2: the one at 0 stays although all that is negative belongs to it."""
    w = torch.tensor([-1.0, 0.0, 1.0], device=device).repeat(4)
    hat, moved = r2.dkm(w, torch.tensor([0.0, 1.0], device=device), 0.01, preserve_zeros=True)
    assert_close(hat, torch.tensor([0.0, 0.0, 1.0], device=device).repeat(4))
    assert moved[0] == 0


@pytest.mark.parametrize("options", [{"iterations": "converge"}, {"gradient": "implicit"}], ids=str)
def test_not_at_the_fixed_point(options):
    for module in (r2, r2.reference):
        with pytest.raises(ValueError, match="preserve_zeros=True needs a number of iterations"):
            module.dkm(torch.ones(3), torch.zeros(2), 0.1, preserve_zeros=True, **options)
        with pytest.raises(TypeError, match="preserve_zeros must be True or False, got 1"):
            module.dkm(torch.ones(3), torch.zeros(2), 0.1, preserve_zeros=1)


def test_nan_stays_nan(device, variant):
    w = torch.tensor([0.0, torch.nan, 1.0], device=device)
    hat, moved = r2.dkm(w, torch.tensor([0.0, 1.0], device=device), 0.1, preserve_zeros=True)
    assert moved.isnan().all() and hat[1].isnan() and hat[0] == 0
