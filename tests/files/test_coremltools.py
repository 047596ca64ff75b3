"""Parity with the peer: Apple's coremltools, whose DKM has the squared metric."""

import peers
import pytest
import torch

import r2kernels

try:
    peers.load()
except ImportError as error:
    pytest.skip(
        f"coremltools cannot be imported ({error}); it is in the test extra where it has a wheel",
        allow_module_level=True,
    )

pytestmark = pytest.mark.filterwarnings("ignore")


def both(w, c, tau, iterations, d, floor, g):
    """(W_hat, centroids, dL/dW) of coremltools and ours."""
    found = []
    peer = peers.palettizer(w, c, tau, iterations, d, floor)
    for run in (
        lambda w: (peer(w), peer.centroids[0].reshape(c.shape)),
        lambda w: r2kernels.dkm(w, c, tau, iterations=iterations, metric="sqeuclidean", cluster_dim=d),
    ):
        leaf = w.clone().requires_grad_()
        w_hat, centroids = run(leaf)
        found.append((w_hat.detach(), centroids.detach(), torch.autograd.grad((w_hat * g).sum(), leaf)[0]))
    return found


@pytest.mark.parametrize("iterations", [1, 3, 5])
@pytest.mark.parametrize(
    ("d", "shape", "clusters"),
    [(1, (16, 8, 3, 3), 4), (1, (40, 33), 16), (2, (16, 8, 3, 3), 4), (2, (64, 30), 16), (4, (32, 9), 8)],
)
def test_same_output_and_gradient(d, shape, clusters, iterations):
    """Where the floor on attention is out of reach the two agree to rounding.

    At its default they differ by what K - 1 clamped attentions weigh.
    """
    g = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=g, dtype=torch.float64) * 0.05
    c = torch.randn(clusters, d, generator=g, dtype=torch.float64) * 0.05
    c = c[:, 0].sort().values if d == 1 else c
    upstream = torch.randn(shape, generator=g, dtype=torch.float64)
    tau = 5e-4
    spread = w.abs().max().item()
    (w_hat, centroids, dw), (w_hat_2, centroids_2, dw_2) = both(w, c, tau, iterations, d, 0.0, upstream)
    assert (w_hat - w_hat_2).abs().max() < 1e-12 * spread and (centroids - centroids_2).abs().max() < 1e-12 * spread
    assert (dw - dw_2).norm() < 1e-12 * dw.norm()
    (w_hat, centroids, dw), ours = both(w, c, tau, iterations, d, peers.FLOOR, upstream)
    # an iteration adds at most K floors to an attention of sum 1, and N floors to the sum of a cluster
    weight = peers.FLOOR * max(clusters, w.numel() / d / centroids_share(w, ours[1], tau, d))
    assert (w_hat - ours[0]).abs().max() <= 4 * iterations * weight * spread
    assert (centroids - ours[1]).abs().max() <= 4 * iterations * weight * spread
    assert (dw - ours[2]).norm() <= 100 * iterations * clusters * peers.FLOOR * dw.norm()


def centroids_share(w, c, tau, d):
    """The smallest sum of attention over the clusters."""
    rows = r2kernels.reference.columns(w, d).t()
    return torch.softmax(-(rows[:, None] - c.reshape(-1, d)).square().sum(-1) / tau, 1).sum(0).min().item()
