"""The cases of the quantizers' and regularizers' benchmark: what each contender does, what none may avoid (the floor),
and whether its numbers are right."""

import contextlib
import functools
import gc
from typing import NamedTuple

import cases
import torch
from measure import Contender
from torch.testing import assert_close

import r2kernels
from r2kernels import reference, use_backend

CHECKED = 40_000  # numbers on which every contender is compared with the reference
ONE, LIST, ACTIVATION = "one tensor 11.7M", "ResNet-18", "activation 32x64x80x80, channels last"
SIGMA = 0.05
QUANTIZERS = {
    "lsq": lambda x, p, function, axis=None: function(x, p, 4, axis=axis),
    "ewgs": lambda x, p, function: function(x, -p, p, 4, delta=1e-3),
    "pact": lambda x, p, function: function(x, p, 4),
    "dorefa": lambda x, p, function: function(x, 4),
}
TERMS = {
    "soft_min_max": {"alpha": 2.0},
    "kure": {},
    "msqe": {"bits": 4},
    "bin_reg": {"step": 0.02, "bits": 4},
    "margin": {"M": 0.1, "k": 0.01},
}
REGULARIZERS = {
    "msqe": lambda x, p, function: function(x, p, 4),
    "bin_reg, 2 bits": lambda x, p, function: function(x, 0.05, 2),
    "bin_reg, 4 bits": lambda x, p, function: function(x, 0.02, 4),
    "partial_l2": lambda x, p, function: function(x, 0.5),
}


class Case(NamedTuple):
    op: str
    shape: str = ONE
    dtype: torch.dtype = torch.float32
    axis: int | None = None
    device: str = "cpu"

    @property
    def function(self):
        return self.op.split(",")[0]

    @property
    def quantizes(self):
        return self.function in QUANTIZERS

    @property
    def label(self):
        dtype = "" if self.dtype == torch.float32 else f", {str(self.dtype).removeprefix('torch.')}"
        return f"{self.op}{'' if self.axis is None else f', axis {self.axis}'}{dtype}"


class Inputs:
    """Normal numbers with sigma 0.05, a parameter with a gradient, gradients of the results of a quantizer."""

    def __init__(self, case, numel=None, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.case, self.device = case, torch.device(case.device)
        if numel:
            shapes = [(numel // 64, 64), (100, 3, 3)]
        elif case.shape == ACTIVATION:
            shapes = [(32, 64, 80, 80)]
        else:
            shapes = cases.MODELS[case.shape]()
        ws = [(torch.randn(shape, generator=g) * SIGMA).to(case.dtype).to(self.device) for shape in shapes]
        if case.shape == ACTIVATION and not numel:
            ws = [w.to(memory_format=torch.channels_last) for w in ws]
        self.xs = [w.requires_grad_() for w in ws]
        self.single = len(self.xs) == 1 and not numel
        self.x = self.xs[0] if self.single else self.xs
        self.gs = [torch.randn(w.shape, generator=g).to(case.dtype).to(self.device).contiguous() for w in ws]
        self.gs = [torch.empty_like(x).copy_(g) for g, x in zip(self.gs, ws, strict=True)]
        self.bytes, self.numel = sum(x.nbytes for x in self.xs), sum(x.numel() for x in self.xs)
        start = {"lsq": SIGMA / 2, "msqe": SIGMA / 2}.get(case.function, 3 * SIGMA)
        if case.axis is None:
            self.p = torch.full((), start, device=self.device, requires_grad=True)
            self.parameters = [self.p]
        else:
            self.parameters = [
                torch.full((x.shape[case.axis],), start, device=self.device, requires_grad=True) for x in self.xs
            ]
            self.p = self.parameters[0] if self.single else self.parameters

    def no_gradients(self):
        for t in [*self.xs, *self.parameters]:
            t.grad = None


def _terms(inputs, only=None):
    terms = {name: dict(options) for name, options in TERMS.items() if only in (None, name)}
    if "msqe" in terms:
        terms["msqe"]["step"] = inputs.p
    return terms


def call(case, package, inputs, only=None):
    """Forward and backward; the results."""
    if case.function == "weight_terms":
        found = list(package.weight_terms(inputs.x, _terms(inputs, only)).values())
        sum(loss.sum() for loss in found).backward()
        return found
    function = getattr(package, case.function)
    if not case.quantizes:
        loss = REGULARIZERS[case.op](inputs.x, inputs.p, function)
        loss.sum().backward()
        return [loss]
    more = {} if case.axis is None else {"axis": case.axis}
    ys = QUANTIZERS[case.function](inputs.x, inputs.p, function, **more)
    ys = [ys] if inputs.single else ys
    torch.autograd.backward(ys, inputs.gs)
    return ys


def learnable_fake_quantize(inputs):
    """PyTorch's own LSQ; its gradients mask after rounding, so that they differ on the half step at each end."""
    zero = torch.zeros(1, device=inputs.device)
    factor = 1 / (inputs.numel * 7) ** 0.5
    y = torch._fake_quantize_learnable_per_tensor_affine(inputs.x, inputs.p.reshape(1), zero, -8, 7, factor)
    y.backward(inputs.gs[0])
    return [y]


def floor(case):
    """The fewest bytes, moved by PyTorch: two reads of x, one of g, two fresh writes; of a regularizer two reads and
    one fresh write."""

    def quantizer(inputs):
        with torch.no_grad():
            return [
                (x.clone(memory_format=torch.preserve_format), x + g) for x, g in zip(inputs.xs, inputs.gs, strict=True)
            ]

    def regularizer(inputs):
        with torch.no_grad():
            return [(x.sum(), x * 2) for x in inputs.xs]

    return quantizer if case.quantizes else regularizer


@functools.lru_cache(maxsize=1)
def _compiled(case):
    torch._dynamo.reset()
    gc.collect()
    name = case.function
    return type(
        "Compiled", (), {name: staticmethod(torch.compile(getattr(reference, name), fullgraph=True, dynamic=False))}
    )


def contenders(case):
    """(name -> Contender, name -> why it is absent); ours come first, the default at the top."""
    found, absent = {}, {}
    for name, reason in r2kernels.backends().items():
        if name == "reference" or (name == "cpu") != (case.device == "cpu"):
            continue
        if reason is None:
            active = functools.partial(use_backend, name) if found else contextlib.nullcontext
            found[name] = Contender(functools.partial(call, case, r2kernels), Inputs.no_gradients, active)
        else:
            absent[name] = reason
    found["eager"] = Contender(functools.partial(call, case, reference), Inputs.no_gradients)
    if case.shape == LIST:
        absent["torch.compile"] = "compiled for single tensors only: a list takes a minute or more"
    elif case.function == "weight_terms":
        absent["torch.compile"] = "compiled term by term in the tables above"
    else:
        found["torch.compile"] = Contender(lambda inputs: call(case, _compiled(case), inputs), Inputs.no_gradients)
    if case.op == "lsq" and case.shape == ONE and case.axis is None and case.dtype == torch.float32:
        found["PyTorch's fake quantize"] = Contender(learnable_fake_quantize, Inputs.no_gradients)
    if case.function == "weight_terms":
        for name in TERMS:
            found[f"{name} alone"] = Contender(
                lambda inputs, name=name: call(case, r2kernels, inputs, name), Inputs.no_gradients
            )
    found["floor"] = Contender(floor(case), Inputs.no_gradients)
    return found, absent


def wrong(case, contender):
    """What is wrong with the numbers of one of ours, or None: results and gradients of CHECKED numbers beside the
    reference in float64."""
    if case.axis is not None and case.axis > 0:
        return None
    small = Inputs(case, CHECKED)
    plain = Inputs(case._replace(device="cpu"), CHECKED)
    with contender.active():
        ys = call(case, r2kernels, small)
    expected = call(case, reference, plain)
    # a code may lie on the other side of a half step where tanh is rounded otherwise
    most = 1e-3 if case.function == "dorefa" else 0
    tolerance = {"rtol": 2e-2, "atol": 2e-2 * SIGMA} if case.dtype.itemsize == 2 else {"rtol": 1e-4, "atol": 1e-6}
    try:
        for a, b in zip([*ys, *(t.grad for t in small.xs)], [*expected, *(t.grad for t in plain.xs)], strict=True):
            a, b = a.detach().cpu().double(), b.detach().double()
            off = (a - b).abs() > tolerance["atol"] + tolerance["rtol"] * b.abs()
            if off.double().mean() > most:
                worst = (a - b).abs().max()
                return f"{off.double().mean():.2%} of the numbers differ from the reference, by up to {worst:.2g}"
        for a, b in zip(small.parameters, plain.parameters, strict=True):
            if b.grad is not None:
                assert_close(a.grad.cpu(), b.grad, rtol=2e-2 if case.dtype.itemsize == 2 else 1e-3, atol=1e-3)
    except AssertionError as error:
        return " ".join(str(error).split())[:200]
    return None
