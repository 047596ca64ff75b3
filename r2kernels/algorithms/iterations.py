"""DKM's iterations over the passes of a backend: forward through all, backward through all, the last, or the fixed
point (math: `functional.dkm`).

`passes` is a backend's DKM with the methods of `reference.dkm.DKM`. W_hat = attention to C_(T-1), applied to C_T.
Backward runs the recurrences of the K-sized numbers first, then one pass that writes dW. With `pinned` a centroid that
is 0 stays 0, and for scalars none crosses 0: they stay in order. What is put to 0 so has no gradient.
"""

import torch

from . import fixed_point


def forward(passes, centroids, iterations, pinned=False):
    """(outputs, history (T + 1, L, K, d), moments (T, L, K, m))"""
    shape = centroids.shape
    history = centroids.new_empty(iterations + 1, *shape)
    moments = centroids.new_empty(iterations, *shape[:2], 3 if passes.signed else 1)
    history[0].copy_(centroids)
    for t in range(iterations):
        passes.update(history[t], history[t + 1], moments[t])
        if pinned:
            _pin(history[t + 1], history[t])
    return passes.output(history[-2], history[-1]), history, moments


def _pin(new, old):
    """In place, the new centroids of one iteration; NaN stays NaN."""
    stopped = new.sign() != old.sign() if new.shape[-1] == 1 else (old == 0).all(-1, keepdim=True)
    new.masked_fill_(stopped & (new == new), 0)


def backward(passes, grad_centroids, grads, history, moments, gradient, centroid_grad, pinned=False):
    """(dL/dW, dL/dC_0); the second is 0 where it is not asked for, or not defined."""

    def free(u, c):
        return u * (c != 0).any(-1, keepdim=True) if pinned else u

    old, new, m = history[-2], history[-1], moments[-1]
    u = passes.upstream(old, grads)
    u = free(u if grad_centroids is None else u + grad_centroids, new)
    steps = [(old, new, u, m, True)]
    if gradient == "implicit":
        u = fixed_point.adjoint(passes, old, new, m, passes.recur(old, new, u, m, grads))
        steps.append((old, new, u, m, False))
    elif gradient == "unrolled":
        for t in range(len(moments) - 1, 0, -1):
            u = passes.recur(history[t], history[t + 1], u, moments[t], grads if len(steps) == 1 else None)
            u = free(u, history[t])
            steps.append((history[t - 1], history[t], u, moments[t - 1], False))
    if gradient == "unrolled" and centroid_grad:
        first = passes.recur(history[0], history[1], u, moments[0], grads if len(steps) == 1 else None)
    else:
        first = torch.zeros_like(u)
    return passes.gradient(steps, grads), first
