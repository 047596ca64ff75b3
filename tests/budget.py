"""How far a backend may be from the truth: not further than twice the reference in the same dtype, plus one ulp.

The truth is the reference in float64 on the same inputs, already rounded to the dtype under test. An error is
divided by the natural scale of its quantity: the size of its terms, not of their difference, since no algorithm can
be accurate relative to what has cancelled.

    l_inf, margin           their value: all terms are >= 0
    soft_min_max            range + exp(-alpha)                         soft_extrema    max|w|
    kure                    (kurtosis + |target|)^2
    dL/dW of one tensor     its RMS, plus one weight's worth: |grad| / N for the range losses (p and q are 1 / N each
                            when alpha is small, and the gradient is their difference), for kure
                            |grad| (kurtosis + |target|)^2 / (N std)
    dL/dM                   |grad| (1 + n_out / k)
    dL/dalpha               |grad| (Var_p + Var_q + exp(-alpha)), plus one weight's worth of either variance:
                            range^2 / N; for soft_extrema |grad_max| Var_p + |grad_min| Var_q and the same
    bin_reg, msqe           of an error w - Q it is |w| + |Q|: the loss with one of its two factors replaced by that;
                            dL/dW, dL/dstep likewise
    partial_l2              the value itself; of dL/dW its RMS
    weight_stats            the value; max|w| for the mean

What quantizers and DKM give is measured in quantizers/calls.py and dkm/problems.py, and held to the same limits.

These are root mean squares, pooled over all draws of a case (of each tensor's RMS, for dL/dW): element by element
the same rule rejects good kernels, for the reference is sometimes exact by luck. An ulp is the epsilon of the
quantity's dtype: of W for dL/dW and W_hat, of the accumulator for losses and parameters.

Float64 has no wider truth here. Its reference is taken to err as the float32 one does on the same draws, scaled by the
ratio of the epsilons; and since the yardstick then errs too, it is allowed that much more.
"""

import contextlib
import math
from typing import NamedTuple

import cases
import torch

import r2kernels
from r2kernels import ops, reference
from r2kernels.functional.loss import add_gradients_
from r2kernels.lists import memory_order
from r2kernels.reference.columns import accumulator
from r2kernels.reference.parameters import rank
from r2kernels.reference.quantizers import code

DRAWS = 50
TARGET = 1.8  # of kure


class Draw(NamedTuple):
    """One call of a loss: its weights, its parameter ((L,), or (L, d)) and the gradient of its value."""

    op: cases.Op
    weights: list
    parameter: torch.Tensor | None
    grad: torch.Tensor
    geometry: tuple = (1, "output")
    single: bool = False
    base: list | None = None  # add the gradients to these
    learned: bool = True  # whether a differentiable parameter needs its gradient
    bits: int = 0

    @property
    def dtype(self):
        return self.weights[0].dtype

    def to(self, dtype):
        """The same numbers in another dtype, rounded where that is narrower."""
        wide = accumulator(dtype)
        return self._replace(
            weights=[w.to(dtype) for w in self.weights],
            parameter=None if self.parameter is None else self.parameter.to(wide),
            grad=self.grad.to(wide),
            base=self.base and [b.to(dtype) for b in self.base],
        )


def draws(op, names, dtype, device="cpu", bits=range(1, 9), **options):
    """At least DRAWS draws over these inputs, as a list and, where there is but one tensor, also alone.

    Those of an op that takes bits go through all of `bits`.
    """
    rounds, bits = -(-DRAWS // len(names)), list(bits)
    return [
        draw(
            op,
            name,
            dtype,
            device,
            seed,
            single=len(cases.INPUTS[name]) == 1 and seed % 2 == 0,
            bits=bits[(3 * seed + 5 * i) % len(bits)],
            **options,
        )
        for i, name in enumerate(names)
        for seed in range(rounds)
    ]


def draw(op, name, dtype, device="cpu", seed=0, geometry=(1, "output"), single=False, accumulate=False, bits=None):
    """A draw of the input `name`; tensors smaller than a row of the geometry are left out."""
    ws = [w for w in cases.make(name, dtype, device, seed) if w.numel() >= geometry[0]]
    g = torch.Generator().manual_seed(seed + 1000)
    return with_weights(op, ws[:1] if single else ws, g, geometry, single, accumulate, bits)


def with_weights(op, ws, g, geometry=(1, "output"), single=False, accumulate=False, bits=None):
    """A draw of these weights, the rest from the generator."""
    (d, layout), dtype, device = geometry, ws[0].dtype, ws[0].device
    wide = accumulator(dtype)
    shape = () if single else (len(ws),)
    columns = (d,) if d > 1 else ()
    bits = (bits or op.options["bits"]) if "bits" in op.options else 0
    parameter = None
    if op.parameters:
        factor = 0.8 + 0.4 * torch.rand((*shape, *columns), generator=g, dtype=torch.float64)
        parameter = (op.natural(cases.SCALE, bits)[op.parameters[0].name] * factor).to(device, wide)
    of_loss = (2, *shape, *columns) if op.function == "soft_extrema" else shape
    grad = torch.randn(of_loss, generator=g, dtype=torch.float64).to(device, wide)
    base = None
    if accumulate:
        base = [torch.empty_strided(w.shape, memory_order(w, d, layout)[0], dtype=dtype, device=device) for w in ws]
        for b in base:
            b.copy_(torch.randn(b.shape, generator=g, dtype=torch.float64) / b.numel())
    return Draw(op, ws, parameter, grad, geometry, single, base, bits=bits)


class Result(NamedTuple):
    loss: torch.Tensor
    weights: list  # dL/dW
    parameter: torch.Tensor | None

    @property
    def quantities(self):
        found = {"loss": self.loss, "dW": self.weights, "dparameter": self.parameter}
        return {name: value for name, value in found.items() if value is not None}

    def equals(self, other):
        """To the bit."""
        return all(torch.equal(a, b) for a, b in zip(self.tensors, other.tensors, strict=True))

    @property
    def tensors(self):
        return [self.loss, *self.weights, *([] if self.parameter is None else [self.parameter])]


def evaluate(draw, layer=r2kernels):
    """Forward and backward through the public function (of `layer`) on the backend that is chosen; with `base` through
    the path that adds in place."""
    if draw.base is not None:
        return _accumulate(draw)
    op, (d, layout) = draw.op, draw.geometry
    ws = [w.detach().requires_grad_() for w in draw.weights]
    options, learned = dict(op.options), []
    if draw.bits:
        options["bits"] = draw.bits
    if draw.parameter is not None:
        parameter = draw.parameter.detach().requires_grad_(draw.learned and op.parameter is not None)
        options[op.parameters[0].name], learned = parameter, [parameter] if parameter.requires_grad else []
    if op.columns:
        options.update(cluster_dim=d, layout=layout)
    loss = getattr(layer, op.function)(ws[0] if draw.single else ws, **options)
    if isinstance(loss, tuple):
        loss = torch.stack(loss)
    grads = torch.autograd.grad(loss, [*ws, *learned], draw.grad)
    return Result(loss.detach(), list(grads[: len(ws)]), grads[-1] if learned else None)


def contract(draw):
    """(grad, parameters) as `<op>_bwd` takes them: parameters are (L, d) tensors."""
    op, count, d, like = draw.op, len(draw.weights), draw.geometry[0], draw.grad
    parameters = [] if draw.parameter is None else [draw.parameter.reshape(count, d)]
    if op.function == "margin":
        parameters.append(like.new_full((count, d), op.options.get("k", 1)))
    if op.function == "kure":
        parameters.append(like.new_full((count, d), TARGET))
    if op.function == "partial_l2":
        parameters = [rank(draw.parameter.reshape(count), draw.weights, False)]
    return like.reshape(2, count, d) if op.function == "soft_extrema" else like.reshape(count), parameters


def for_ops(draw):
    """What `<op>_fwd` takes, and a function from what it saved to what `<op>_bwd` takes."""
    grad, parameters = contract(draw)
    bits = (draw.bits,) if draw.bits else ()
    flag = (True,) if draw.op.function in ("soft_min_max", "soft_extrema") else ()
    geometry = draw.geometry if draw.op.columns else ()
    return (draw.weights, *parameters, *bits, *flag, *geometry), lambda saved: (
        grad,
        draw.weights,
        *parameters,
        saved,
        *bits,
        *geometry,
    )


def by_ops(draw, forward=contextlib.nullcontext, backward=contextlib.nullcontext):
    """As `evaluate`, of the ops themselves, each on the backend that `forward` and `backward` choose."""
    taken, of_saved = for_ops(draw)
    with forward():
        loss, saved = ops.op[draw.op.function + "_fwd"](*taken)
    with backward():
        result = ops.op[draw.op.function + "_bwd"](*of_saved(saved))
    gradients, g = result if isinstance(result, tuple) else (result, None)
    assert all(made.isfinite().all() for made in gradients), "a number of the gradients' memory was not written"
    return Result(loss.reshape(draw.grad.shape), gradients, None if g is None else g.reshape(draw.parameter.shape))


def _accumulate(draw):
    grad, parameters = contract(draw)
    sums = [b.clone() for b in draw.base]
    loss, g = add_gradients_(
        draw.op.function, draw.weights, sums, grad, parameters, alpha_grad=True, geometry=draw.geometry
    )
    own = None if draw.parameter is None else g.reshape(draw.parameter.shape)
    return Result(loss.reshape(draw.grad.shape), sums, own)


def truth(draw):
    """(the reference in float64 on the same numbers, the natural scale of each of its quantities)."""
    wide = draw.to(torch.float64)
    with r2kernels.use_backend("reference"):
        exact = evaluate(wide)
    found = [_SCALES.get(draw.op.function, _of_range_loss)(wide, exact, i) for i in range(len(wide.weights))]
    losses, weights, parameters = zip(*found, strict=True)
    own = None if exact.parameter is None else torch.stack(parameters).reshape(exact.parameter.shape)
    losses = torch.stack(losses, -2 if draw.op.function == "soft_extrema" else 0)
    return exact, Result(losses.reshape(exact.loss.shape), list(weights), own)


def rms(x):
    return x.square().mean().sqrt()


def _of_range_loss(draw, exact, i):
    """The scales of tensor i: of its loss, of dL/dW, of the gradient of its parameter."""
    op, count, d = draw.op.function, len(draw.weights), draw.geometry[0]
    x = reference.columns(draw.weights[i], *draw.geometry)
    n, reach = x.shape[1], x.amax(1) - x.amin(1)
    upstream = draw.grad.abs().reshape(2, count, d)[:, i] if op == "soft_extrema" else draw.grad.abs().reshape(-1)[i]
    weights = rms(exact.weights[i]) + upstream.sum() / n
    if op == "l_inf":
        return exact.loss.reshape(-1)[i], weights, None
    parameter = draw.parameter.reshape(count, d)[i]
    if op == "margin":
        k = draw.op.options.get("k", 1)
        outside = (x.abs() > parameter.abs()[:, None]).sum(1) / (k * n if k < 1 else k)
        return exact.loss.reshape(-1)[i], weights, upstream * (1 + outside)
    saved = reference.range_losses._soft_extremes([draw.weights[i]], parameter[None], *draw.geometry)[0]
    of_p, of_q = (saved[:, i].square() + reach.square() / n for i in (3, 7))
    if op == "soft_extrema":
        low, high = upstream
        return x.abs().amax(1).expand(2, d), weights, high * of_p + low * of_q
    return (reach + (-parameter).exp()).sum(), weights, upstream * (of_p + of_q + (-parameter).exp())


def _of_kure(draw, exact, i):
    x = reference.columns(draw.weights[i], *draw.geometry)
    *_, std, _, kurtosis = reference.regularizers._moments(x)
    size = (kurtosis + TARGET).square()
    worth = draw.grad.abs().reshape(-1)[i] / x.shape[1] * size / std
    return size, rms(exact.weights[i]) + torch.where(std == 0, 0, worth), None


def _of_codes(draw, exact, i):
    """bin_reg and msqe: a weight's share of the mean, of its bin's or of all, times both factors."""
    x, step, upstream = draw.weights[i].reshape(-1), draw.parameter.reshape(-1)[i], draw.grad.abs().reshape(-1)[i]
    c = code(x / step, draw.bits, True)
    error, size = (x - step * c).abs(), x.abs() + (step * c).abs()
    share = torch.full_like(x, 1 / x.numel())
    if draw.op.function == "bin_reg":
        _, bins, counts = c.unique(return_inverse=True, return_counts=True)
        share = 1 / counts[bins]
    of_weights = rms(2 * upstream * share * size)
    return (share * error * size).sum(), of_weights, 2 * upstream * (share * size * c.abs()).sum()


def _of_partial_l2(draw, exact, i):
    return exact.loss.reshape(-1)[i], rms(exact.weights[i]), None


_SCALES = {"kure": _of_kure, "bin_reg": _of_codes, "msqe": _of_codes, "partial_l2": _of_partial_l2}


def relative(error, scale):
    """error / scale; where the scale is 0, any error is infinite."""
    return torch.where((scale == 0) & (error == 0), 0, error / scale)


def errors(found, exact, scale):
    """quantity -> normalised errors: one for each number of a tensor, one, of its RMS, for each tensor of a list."""
    found, exact, scale = (getattr(result, "quantities", result) for result in (found, exact, scale))
    return {name: _distance(found[name], value, scale[name]) for name, value in exact.items()}


def _distance(found, exact, scale):
    if isinstance(exact, torch.Tensor):
        return relative((found.double() - exact).abs(), scale)
    return relative(torch.stack([rms(a.double() - e) for a, e in zip(found, exact, strict=True)]), torch.stack(scale))


class Pool:
    """The pooled RMS of the errors of one backend, for each quantity."""

    def __init__(self):
        self.sums = {}

    def add(self, found):
        for quantity, values in found.items():
            total, count = self.sums.get(quantity, (0.0, 0))
            self.sums[quantity] = total + values.square().sum().item(), count + values.numel()

    def rms(self):
        return {quantity: math.sqrt(total / count) for quantity, (total, count) in self.sums.items()}


def limits(reference_rms, dtype, narrow=False):
    """What each quantity may err. `narrow`: the reference was measured in float32, for a float64 backend held to the
    reference in float64."""
    allowed = {}
    for quantity, error in reference_rms.items():
        ulp = torch.finfo(dtype if quantity in ("dW", "W_hat") else accumulator(dtype)).eps
        error *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps if narrow else 1
        allowed[quantity] = (3 if narrow else 2) * error + ulp
    return allowed


def check(draws, variants, run=evaluate, judge=truth):
    """'' if every variant keeps within the budget over these draws, else a line for each one that does not.

    run(draw) gives the quantities, judge(draw) their true values and natural scales: as Results, or as
    quantity -> tensor or list of tensors. A draw has a dtype, and can be had in another: `to`.
    """
    own, pools = Pool(), {variant: Pool() for variant in variants}
    for one in draws:
        narrow = one.dtype == torch.float64
        exact, scale = judge(one)
        rounded = one.to(torch.float32) if narrow else one
        with r2kernels.use_backend("reference"):
            own.add(errors(run(rounded), *(judge(rounded) if narrow else (exact, scale))))
        for variant, pool in pools.items():
            with variant.chosen():
                pool.add(errors(run(one), exact, scale))
    return exceeded(own, pools, one.dtype, narrow)


def hold(draws, variants, run=evaluate, judge=truth):
    failures = check(draws, variants, run, judge)
    assert not failures, "\n" + failures


def exceeded(own, pools, dtype, narrow=False):
    """A line for each variant and quantity over its limit."""
    measured, rounded = own.rms(), " in float32" if narrow else ""
    limit = limits(measured, dtype, narrow)
    return "\n".join(
        f"{variant}: {quantity} errs by {error:.3g}, allowed is {limit[quantity]:.3g}"
        f" (the reference{rounded} errs by {measured[quantity]:.3g})"
        for variant, pool in pools.items()
        for quantity, error in pool.rms().items()
        if not error <= limit[quantity]
    )
