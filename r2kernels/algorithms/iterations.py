"""DKM's iterations over the passes of a backend: forward through all, backward through all, the last, or the fixed
point (math: `functional.dkm`).

`passes` is a backend's DKM with the methods of `reference.dkm.DKM`. W_hat = attention to C_(T-1), applied to C_T.
Backward runs the recurrences of the K-sized numbers first, then one pass that writes dW.
"""

import torch

from . import fixed_point


def forward(passes, centroids, iterations):
    """(outputs, history (T + 1, L, K, d), moments (T, L, K, m))"""
    history, moments = [centroids], []
    for _ in range(iterations):
        new, m = passes.update(history[-1])
        history.append(new)
        moments.append(m)
    return passes.output(history[-2], history[-1]), torch.stack(history), torch.stack(moments)


def backward(passes, grad_centroids, grads, history, moments, gradient, centroid_grad):
    """(dL/dW, dL/dC_0); the second is 0 where it is not asked for, or not defined."""
    old, new, m = history[-2], history[-1], moments[-1]
    u = passes.upstream(old, grads) + grad_centroids
    steps = [(old, new, u, m, True)]
    if gradient == "implicit":
        u = fixed_point.adjoint(passes, old, new, m, passes.recur(old, new, u, m, grads))
        steps.append((old, new, u, m, False))
    elif gradient == "unrolled":
        for t in range(len(moments) - 1, 0, -1):
            u = passes.recur(history[t], history[t + 1], u, moments[t], grads if len(steps) == 1 else None)
            steps.append((history[t - 1], history[t], u, moments[t - 1], False))
    first = torch.zeros_like(u)
    if gradient == "unrolled" and centroid_grad:
        first = passes.recur(history[0], history[1], u, moments[0], grads if len(steps) == 1 else None)
    return passes.gradient(steps, grads), first
