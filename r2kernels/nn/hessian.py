"""EWGS's delta from the trace of the Hessian (Lee et al. 2021, eq. 9).

By Hutchinson's probes and finite differences of gradients.
"""

import torch

from .attach import in_backward


class Probe:
    """Moves the quantized tensors y of some keys by sign * epsilon * mean|y| along directions of -1 and 1.

    It remembers what it moved. `sizes`: key -> mean|y|, those of the probe with sign 0, which moves nothing.
    """

    def __init__(self, keys, epsilon, seed=0, sign=0, sizes=None):
        self.places = {key: i for i, key in enumerate(keys)}
        self.epsilon, self.seed, self.sign, self.sizes = epsilon, seed, sign, sizes or {}
        self.seen = {}

    def direction(self, key, y):
        generator = torch.Generator(device=y.device).manual_seed(self.seed * len(self.places) + self.places[key])
        return torch.randint(2, y.shape, generator=generator, device=y.device).to(y.dtype) * 2 - 1

    def moved(self, key, y):
        if key not in self.places:
            return y
        if not y.requires_grad:
            y = y.detach().requires_grad_()
        if self.sign:
            y = y + self.sign * self.epsilon * self.sizes[key] * self.direction(key, y)
        else:
            self.sizes.setdefault(key, y.detach().abs().mean())
        if not in_backward():  # what checkpointing computes again was seen
            self.seen.setdefault(key, []).append(y)
        return y

    def gradients(self, loss):
        """key -> gradients of what was seen."""
        flat = [y for ys in self.seen.values() for y in ys]
        found = iter(torch.autograd.grad(loss, flat, allow_unused=True))
        return {
            key: [torch.zeros_like(y) if (g := next(found)) is None else g for y in ys] for key, ys in self.seen.items()
        }


def ratios(evaluate, keys, probes, epsilon):
    """key -> (trace / N) / (3 std(g)), of Hessian and gradient g with regard to the quantized tensor (N numbers).

    evaluate(probe): `probe.gradients` of the loss, with the probe in place. It is called 1 + 2 * probes times.
    """
    base = Probe(keys, epsilon)
    gradients = evaluate(base)
    traces = {key: 0.0 for key in gradients}
    for seed in range(probes):
        ends = []
        for sign in (1, -1):
            probe = Probe(keys, epsilon, seed, sign, base.sizes)
            ends.append((probe, evaluate(probe)))
        for key in traces:
            for above, below in zip(ends[0][1][key], ends[1][1][key], strict=True):
                v = probe.direction(key, above)
                curvature = (v * (above - below)).double().sum() / (2 * epsilon * base.sizes[key].double())
                traces[key] = traces[key] + curvature / probes
    found = {}
    for key, gs in gradients.items():
        g = torch.cat([g.reshape(-1).double() for g in gs])
        std = g.std(correction=0)
        ratio = traces[key] / g.numel() / (3 * std)
        found[key] = torch.where((std > 0) & (base.sizes[key] > 0), ratio, 0).nan_to_num(0)
    return found
