"""Problems of DKM, their passes, and how exact their results can be.

Natural scales: max|w| for W_hat and centroids, since those are averages of weights; for dL/dW its RMS and a
hundredth of that of the incoming gradient; for dL/dC_0 its RMS and that of dL/dC_T.
"""

from typing import NamedTuple

import cases
import torch
from budget import rms

from r2kernels import ops, reference, use_backend
from r2kernels.algorithms import iterations
from r2kernels.backends import select
from r2kernels.lists import like_weights
from r2kernels.reference.columns import accumulator

UNITS = {op.options["metric"]: cases.UNITS[op.parameters[0].unit] for op in cases.of("dkm") if op.parameters}  # of tau


def start(k, d=1, seed=0, device="cpu"):
    """Centroids in no order."""
    c = torch.randn(k, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)
    return c[:, 0] if d == 1 else c


def numbers(*shape, seed=1, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


class Problem(NamedTuple):
    ws: list
    c: torch.Tensor  # (L, K, d)
    tau: torch.Tensor
    gs: list  # gradients of W_hat
    gc: torch.Tensor  # of the centroids
    metric: str
    d: int = 1
    layout: str = "output"
    clusters: tuple | None = None  # K for every tensor

    @property
    def dtype(self):
        return self.ws[0].dtype

    def to(self, dtype):
        wide = accumulator(dtype)
        return self._replace(
            ws=[w.to(dtype) for w in self.ws],
            c=self.c.to(wide),
            tau=self.tau.to(wide),
            gs=[g.to(dtype) for g in self.gs],
            gc=self.gc.to(wide),
        )

    @property
    def arguments(self):
        """What the passes of every backend take."""
        clusters = self.clusters or (self.c.shape[1],) * len(self.ws)
        return self.ws, self.tau, clusters, self.metric, self.d, self.layout

    def job(self):
        backend = select(self.ws[0].device, True)
        make = ops.PackedReference if backend is None else backend.DKM
        return make(*self.arguments)


def draw(ws, K, sharpness, metric, d=1, layout="output", seed=0, spread=0.3):
    """tau is in units of the weights' deviation, or its square."""
    g = torch.Generator().manual_seed(seed + 7)
    dtype, device = ws[0].dtype, ws[0].device
    cs, tau = [], []
    for w in ws:
        x = reference.columns(w.cpu().double(), d, layout).t()
        std = x.std(correction=0).item() or cases.SCALE
        rows = x[torch.randint(len(x), (K,), generator=g)]
        cs.append(rows + spread * std * torch.randn(K, d, generator=g, dtype=torch.float64))
        tau.append(sharpness * UNITS[metric](std, 0, True))
    c = torch.stack(cs).to(device, accumulator(dtype))
    gs = [torch.empty_like(w).copy_(torch.randn(w.shape, generator=g, dtype=torch.float64)) for w in ws]
    gc = torch.randn(c.shape, generator=g, dtype=torch.float64).to(c)
    tau = torch.tensor(tau, dtype=c.dtype, device=device)
    return Problem(ws, c.sort(1).values if d == 1 else c, tau, gs, gc, metric, d, layout)


def made(name, dtype, device, d=1, seed=0):
    return [w for w in cases.make(name, dtype, device, seed) if w.numel() >= d]


def solve(problem, T=3, gradient="unrolled", writer=None):
    """quantity -> tensors; `writer`: the backend that runs forward."""
    ws, c, d = problem.ws, problem.c, problem.d
    if writer is None:
        out, history, moments = iterations.forward(problem.job(), c, T)
    else:
        with writer.chosen():
            out, history, moments = iterations.forward(problem.job(), c, T)
    gs = like_weights(problem.gs, ws) if d == 1 else problem.gs
    dw, first = iterations.backward(problem.job(), problem.gc, gs, history, moments, gradient, True)
    found = {"W_hat": list(out), "centroids": list(history[-1]), "dW": list(dw)}
    return found if gradient != "unrolled" else {**found, "dC_0": list(first)}


def truth(problem, gradient="unrolled"):
    """(the reference in float64 on the same numbers, natural scales)"""
    wide = problem.to(torch.float64)
    with use_backend("reference"):
        exact = solve(wide, gradient=gradient)
    largest = [w.abs().max() for w in wide.ws]
    scales = {
        "W_hat": largest,
        "centroids": largest,
        "dW": [rms(e) + 0.01 * rms(g) for e, g in zip(exact["dW"], wide.gs, strict=True)],
    }
    if "dC_0" in exact:
        scales["dC_0"] = [rms(e) + rms(g) for e, g in zip(exact["dC_0"], wide.gc, strict=True)]
    return exact, scales
