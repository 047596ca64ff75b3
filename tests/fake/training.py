"""Steps of training under the fake driver, of other values and other shapes each; prints as JSON what each compiled and
launched."""

import json

import torch
import triton
import triton.language as tl
from fake import driver

driver.steer()

import r2kernels  # noqa: E402

# of an activation: multiples of 16 and others, a single number, one chunk and several
LENGTHS = (4096, 1000, 1001, 1, 77, 50_000, 16, 3)


def weights(seed, *sizes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=g).requires_grad_() for n in sizes]


def differentiated(results):
    results = [results] if isinstance(results, torch.Tensor) else results
    torch.autograd.backward(results, [torch.ones_like(r) for r in results])


def soft_min_max(seed, one):
    differentiated(r2kernels.soft_min_max(weights(seed, one)[0], 1.0 + seed))


def list_of_soft_min_max(seed, one):
    alphas = torch.full((3,), 1.0 + seed, requires_grad=True)
    differentiated(r2kernels.soft_min_max(weights(seed, 5000, one, 129), alphas))


def lsq(seed, one):
    differentiated(r2kernels.lsq(weights(seed, one)[0], torch.full((), 0.1 + seed, requires_grad=True), 4))


def list_of_lsq(seed, one):
    differentiated(r2kernels.lsq(weights(seed, 5000, one, 129), 0.1 + seed, 4))


def pact(seed, one):
    """Of activations, whose lengths change from batch to batch."""
    x = weights(seed, 4 * one)[0].reshape(one, 4).relu()
    differentiated(r2kernels.pact(x, torch.full((), 0.1 + seed, requires_grad=True), 4))


def dkm(seed, one):
    centroids = torch.linspace(-2, 2, 16) + seed
    differentiated(r2kernels.dkm(weights(seed, 50 + one)[0], centroids, 0.1 + seed)[0])


@triton.jit
def fill(p, n):
    tl.store(p + tl.arange(0, 16), 0.0, mask=tl.arange(0, 16) < n)


def specialized(seed, one):
    """What must be seen here: for a length of 1 and for multiples of 16 Triton compiles a kernel of its own."""
    fill[(1,)](torch.empty(16), one)


STEPS = (soft_min_max, list_of_soft_min_max, lsq, list_of_lsq, pact, dkm, specialized)


def run(step):
    """For each step what it compiled and what it launched."""
    found = []
    for seed, length in enumerate(LENGTHS):
        driver.compiled.clear()
        driver.launched.clear()
        step(seed, length)
        found.append({"compiled": list(driver.compiled), "launched": [name for name, _ in driver.launched]})
    return found


if __name__ == "__main__":
    with r2kernels.use_backend("triton"):
        print(json.dumps({f.__name__: run(f) for f in STEPS}))
