"""Pieces of training that a CUDA graph can hold: every public op in every form of its weights, and whole steps of the
three modules."""

import copy
import functools

import cases
import torch
from torch import nn

import r2kernels

SHAPES = ((48, 33, 3, 3), (129, 40), (7, 1000))
ALONE = ((96, 33, 3, 3),)
ACTIVATION = (4, 24, 9, 11)
FORMS = ("leaf", "list", "computed", "strided", "activation")


def flat(found):
    if isinstance(found, torch.Tensor):
        return [found]
    found = found.values() if isinstance(found, dict) else found
    return [t for value in found for t in flat(value)] if isinstance(found, (tuple, list, type({}.values()))) else []


def with_value(function, name, value, **options):
    """function(W, name=value): as a number, or as a tensor that learns where the step has one."""
    return lambda W, learned: function(W, **{name: learned.get(name, value)}, **options), {name: value}


def dkm(W, learned, k, **options):
    several = isinstance(W, list)
    c = torch.linspace(-2, 2, k, device=(W[0] if several else W).device) * cases.SCALE
    return r2kernels.dkm(W, [c] * len(W) if several else c, 0.1 * cases.SCALE, **options)


def assign(W, learned, k):
    several = isinstance(W, list)
    c = torch.linspace(-2, 2, k, device=(W[0] if several else W).device) * cases.SCALE
    return r2kernels.assign(W, [c] * len(W) if several else c)


def terms(W, learned):
    chosen = {"soft_min_max": {"alpha": learned.get("alpha", 9.0)}, "kure": {}, "margin": {"M": 0.1, "k": 0.01}}
    return r2kernels.weight_terms(
        W, {**chosen, "bin_reg": {"step": 0.02, "bits": 4}, "msqe": {"step": 0.02, "bits": 4}}
    )


def plain(function, *given, **options):
    return lambda W, learned: function(W, *given, **options), {}


# name -> (what is called with (W, the parameters that learn), these with their values)
OPS = {
    "l_inf": plain(r2kernels.l_inf),
    "margin": with_value(r2kernels.margin, "M", 0.1, k=0.01),
    "soft_min_max": with_value(r2kernels.soft_min_max, "alpha", 9.0),
    "soft_min_max, rows of 4": plain(r2kernels.soft_min_max, 9.0, cluster_dim=4),
    "soft_extrema": with_value(r2kernels.soft_extrema, "alpha", 9.0),
    "kure": plain(r2kernels.kure),
    "bin_reg": plain(r2kernels.bin_reg, 0.02, 4),
    "msqe": with_value(r2kernels.msqe, "step", 0.02, bits=4),
    "partial_l2": plain(r2kernels.partial_l2, 0.5),
    "weight_stats": plain(r2kernels.weight_stats),
    "weight_terms": (terms, {"alpha": 9.0}),
    "lsq": with_value(r2kernels.lsq, "step", 0.02, bits=4),
    "lsq, axis 0": plain(r2kernels.lsq, 0.02, 4, axis=0),
    "ewgs": with_value(functools.partial(r2kernels.ewgs, lower=-0.1), "upper", 0.1, bits=4, delta=1e-3),
    "pact": with_value(r2kernels.pact, "alpha", 0.1, bits=4),
    "dorefa": plain(r2kernels.dorefa, 4),
    "dkm, K = 16, T = 5": (functools.partial(dkm, k=16), {}),
    "dkm, K = 300, last": (functools.partial(dkm, k=300, iterations=2, gradient="last"), {}),
    "assign, K = 16": (functools.partial(assign, k=16), {}),
}


class Step:
    """Forward and, where something has a gradient, backward of an op. `run()` gives results and gradients."""

    def __init__(self, name, form, device, dtype=torch.float32, learns=True):
        self.function, values = OPS[name]
        self.form = form
        shapes = {"list": SHAPES, "computed": SHAPES, "activation": (ACTIVATION,)}.get(form, ALONE)
        self.weights = [torch.zeros(s, device=device, dtype=dtype, requires_grad=True) for s in shapes]
        made = {n: torch.full((), v, device=device, requires_grad=True) for n, v in values.items()}
        self.learned = made if learns and form != "leaf" else {}
        self.leaves = [*self.weights, *self.learned.values()]
        self.fill(0)

    @torch.no_grad()
    def fill(self, seed):
        """New values, where the old ones lie."""
        g = torch.Generator().manual_seed(seed)
        for w in self.weights:
            w.copy_((torch.randn(w.shape, generator=g) * cases.SCALE).to(w.dtype))
        for p in self.learned.values():
            p.mul_(1.05)

    def W(self):
        if self.form == "computed":
            return [w * 1.5 for w in self.weights]
        if self.form == "strided":
            return self.weights[0].transpose(0, 1)
        if self.form == "activation":
            return self.weights[0].relu().contiguous(memory_format=torch.channels_last)
        return self.weights if self.form == "list" else self.weights[0]

    def clear(self):
        for leaf in self.leaves:
            leaf.grad = None

    def run(self):
        results = flat(self.function(self.W(), self.learned))
        differentiable = [r for r in results if r.requires_grad]
        if differentiable:
            torch.autograd.backward(differentiable, [r.detach().cos() for r in differentiable])
        return [*(r.detach() for r in results), *(leaf.grad for leaf in self.leaves if leaf.grad is not None)]


def net(device):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8 * 64, 10)).to(device)


def images(device, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(16, 3, 8, 8, generator=g).to(device), torch.randint(10, (16,), generator=g).to(device)


def regularized(**options):
    """(what is added to the loss, what is called before the optimizer, after it, what the optimizer trains too)"""

    def attach(model):
        reg = r2kernels.RangeRegularizer(model, **{"weight": 0.1, **options})
        return reg, None, None, reg.param_groups(lr=0.01)

    return attach


def accumulated(model):
    reg = r2kernels.RangeRegularizer(model, weight=0.1)
    return None, reg.accumulate_grad_, None, reg.param_groups(lr=0.01)


def quantized(method, **options):
    def attach(model):
        quantizer = r2kernels.Quantizer(model, method, 4, 4, **options)
        quantizer.initialize(images(next(model.parameters()).device)[0])
        return None, None, None, quantizer.param_groups(lr=0.001)

    return attach


def palettized(**options):
    def attach(model):
        palettizer = r2kernels.Palettizer(model, 2, **options)
        return None, None, palettizer.step, []

    return attach


MODULES = {
    "no module": lambda model: (None, None, None, []),
    "RangeRegularizer": regularized(),
    "RangeRegularizer, margin": regularized(loss="margin", k=0.01),
    "RangeRegularizer, alpha in std": regularized(alpha_unit="std", alpha=8.0, learn=False),
    "RangeRegularizer.accumulate_grad_": accumulated,
    "Quantizer, lsq": quantized("lsq"),
    "Quantizer, lsq, axis 0": quantized("lsq", axis=0),
    "Quantizer, ewgs": quantized("ewgs"),
    "Quantizer, pact": quantized("pact"),
    "Palettizer": palettized(),
    "Palettizer, rows of 4": palettized(cluster_dim=4, metric="sqeuclidean"),
}


class Training:
    """A whole step of training of a small network under a module."""

    def __init__(self, name, device, compiled=lambda function: function):
        self.model = net(device).train()
        self.penalty, self.before, self.after, groups = MODULES[name](self.model)
        self.images, self.labels = images(device)
        self.optimizer = torch.optim.SGD(
            [{"params": list(self.model.parameters())}, *copy.copy(groups)], lr=0.05, momentum=0.9
        )
        self.loss = compiled(self._loss)

    def _loss(self, images, labels):
        loss = nn.functional.cross_entropy(self.model(images), labels)
        return loss if self.penalty is None else loss + self.penalty()

    def fill(self, seed):
        for old, new in zip((self.images, self.labels), images(self.images.device, seed), strict=True):
            old.copy_(new)

    def clear(self):
        self.optimizer.zero_grad(set_to_none=True)

    def run(self):
        loss = self.loss(self.images, self.labels)
        loss.backward()
        if self.before:
            self.before()
        self.optimizer.step()
        if self.after:
            self.after()
        return [loss.detach(), *(p.detach() for group in self.optimizer.param_groups for p in group["params"])]
