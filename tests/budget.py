"""How far a backend may be from the truth: not further than twice the reference in the same dtype, plus one unit in the last place.

The truth is the reference in float64 on the same inputs, already rounded to the dtype under test. An error is divided by the natural scale of its
quantity: the size of its terms, not of their difference, since no algorithm can be accurate relative to what has cancelled.

    l_inf, margin           their value: all terms are >= 0
    soft_min_max            range + exp(-alpha)                         soft_extrema    max|w|
    kure                    (kurtosis + |target|)^2
    dL/dW of one tensor     its RMS, plus one weight's worth: |grad| / N for the range losses (p and q are 1 / N each when alpha is small, and
                            the gradient is their difference), |grad| (kurtosis + |target|)^2 / (N std) for kure
    dL/dM                   |grad| (1 + n_out / k)
    dL/dalpha               |grad| (Var_p + Var_q + exp(-alpha)), plus one weight's worth of either variance: range^2 / N;
                            for soft_extrema |grad_max| Var_p + |grad_min| Var_q and the same
    weight_stats            the value; max|w| for the mean

These are root mean squares, pooled over all draws of a case (of each tensor's RMS, for dL/dW): element by element the same rule rejects good kernels,
for the reference is sometimes exact by luck. An ulp is the epsilon of the quantity's dtype: of W for dL/dW, of the accumulator for losses and parameters.

Float64 has no wider truth here. Its reference is taken to err as the float32 one does on the same draws, scaled by the ratio of the epsilons;
and since the yardstick then errs too, it is allowed that much more.
"""

import math
from typing import NamedTuple

import cases
import torch

import r2kernels
from r2kernels import reference
from r2kernels.functional import loss as functional
from r2kernels.lists import memory_order
from r2kernels.reference.columns import accumulator

DRAWS = 50
TARGET = 1.8  # of kure


class Draw(NamedTuple):
    """One call: an op with its weights, its differentiable parameter ((L,), or (L, d)) and the gradient of the loss."""

    op: cases.Op
    weights: list
    parameter: torch.Tensor | None
    grad: torch.Tensor
    geometry: tuple = (1, "output")
    single: bool = False
    base: list | None = None  # add the gradients to these
    learned: bool = True  # whether the parameter needs a gradient

    def to(self, dtype):
        """The same numbers in another dtype, rounded where that is narrower."""
        wide = accumulator(dtype)
        ws = [w.to(dtype) for w in self.weights]
        base = self.base and [b.to(dtype) for b in self.base]
        return self._replace(
            weights=ws,
            parameter=None if self.parameter is None else self.parameter.to(wide),
            grad=self.grad.to(wide),
            base=base,
        )


def draws(op, names, dtype, device="cpu", **options):
    """At least DRAWS draws over these inputs, as a list and, where there is but one tensor, also alone."""
    rounds = -(-DRAWS // len(names))
    return [
        draw(op, name, dtype, device, seed, single=len(cases.INPUTS[name]) == 1 and seed % 2 == 0, **options)
        for name in names
        for seed in range(rounds)
    ]


def draw(op, name, dtype, device="cpu", seed=0, geometry=(1, "output"), single=False, accumulate=False):
    """A draw of the input `name`; tensors smaller than a row of the geometry are left out."""
    ws = [w for w in cases.make(name, dtype, device, seed) if w.numel() >= geometry[0]]
    return with_weights(
        op, ws[:1] if single else ws, torch.Generator().manual_seed(seed + 1000), geometry, single, accumulate
    )


def with_weights(op, ws, g, geometry=(1, "output"), single=False, accumulate=False):
    """A draw of these weights, the rest from the generator."""
    (d, layout), count, dtype, device = geometry, len(ws), ws[0].dtype, ws[0].device
    wide = accumulator(dtype)
    shape = () if single else (count,)
    columns = (d,) if d > 1 else ()
    parameter = None
    if op.parameter:
        factor = 0.8 + 0.4 * torch.rand((*shape, *columns), generator=g, dtype=torch.float64)
        parameter = (op.arguments(cases.SCALE)[op.parameter] * factor).to(device, wide)
    grad = torch.randn(
        (2, *shape, *columns) if op.function == "soft_extrema" else shape, generator=g, dtype=torch.float64
    ).to(device, wide)
    base = None
    if accumulate:
        base = [torch.empty_strided(w.shape, memory_order(w, d, layout)[0], dtype=dtype, device=device) for w in ws]
        for b in base:
            b.copy_(torch.randn(b.shape, generator=g, dtype=torch.float64) / b.numel())
    return Draw(op, ws, parameter, grad, geometry, single, base)


class Result(NamedTuple):
    loss: torch.Tensor
    weights: list  # dL/dW
    parameter: torch.Tensor | None


def evaluate(draw, layer=r2kernels):
    """Forward and backward through the public function (of `layer`) on the backend that is chosen; with `base` through the path that adds in place."""
    if draw.base is not None:
        return _accumulate(draw)
    op, (d, layout) = draw.op, draw.geometry
    ws = [w.detach().requires_grad_() for w in draw.weights]
    parameter = None if draw.parameter is None else draw.parameter.detach().requires_grad_(draw.learned)
    options = {k: v for k, v in op.options.items() if k != op.parameter}
    if parameter is not None:
        options[op.parameter] = parameter
    if op.columns:
        options.update(cluster_dim=d, layout=layout)
    loss = getattr(layer, op.function)(ws[0] if draw.single else ws, **options)
    if isinstance(loss, tuple):
        loss = torch.stack(loss)
    learned = parameter is not None and parameter.requires_grad
    grads = torch.autograd.grad(loss, [*ws, parameter] if learned else ws, draw.grad)
    return Result(loss.detach(), list(grads[: len(ws)]), grads[-1] if learned else None)


def contract(draw):
    """(grad, parameters) as `<op>_bwd` takes them: parameters are (L, d) tensors."""
    count, d, like = len(draw.weights), draw.geometry[0], draw.grad
    parameters = [] if draw.parameter is None else [draw.parameter.reshape(count, d)]
    if draw.op.function == "margin":
        parameters.append(like.new_full((count, d), draw.op.options.get("k", 1)))
    if draw.op.function == "kure":
        parameters.append(like.new_full((count, d), TARGET))
    return like.reshape(2, count, d) if draw.op.function == "soft_extrema" else like.reshape(count), parameters


def _accumulate(draw):
    grad, parameters = contract(draw)
    sums = [b.clone() for b in draw.base]
    loss, g = functional.add_gradients_(
        draw.op.function, draw.weights, sums, grad, parameters, alpha_grad=True, geometry=draw.geometry
    )
    return Result(
        loss.reshape(draw.grad.shape), sums, None if draw.parameter is None else g.reshape(draw.parameter.shape)
    )


def truth(draw):
    """(the reference in float64 on the same numbers, the natural scales of its quantities: lists of one number, or one for each column, per tensor)."""
    wide = draw.to(torch.float64)
    with r2kernels.use_backend("reference"):
        exact = evaluate(wide)
    d, count, op = draw.geometry[0], len(wide.weights), draw.op.function
    parameter = None if wide.parameter is None else wide.parameter.reshape(count, d)
    upstream = wide.grad.abs().reshape(2, count, d) if op == "soft_extrema" else wide.grad.abs().reshape(count, 1)
    losses, weights, parameters = [], [], []
    for i, w in enumerate(wide.weights):
        x = reference.columns(w, *draw.geometry)
        n, top = x.shape[1], x.abs().amax(1)
        worth = upstream[..., i, :].sum() / n
        if op == "soft_extrema":
            losses.append(torch.stack([top, top]))
        elif op == "soft_min_max":
            losses.append((x.amax(1) - x.amin(1) + (-parameter[i]).exp()).sum())
        elif op == "kure":
            *_, std, _, kurtosis = reference.regularizers._moments(x)
            losses.append((kurtosis + TARGET).square())
            worth = torch.where(std == 0, 0, worth * losses[-1] / std)
        else:
            losses.append(exact.loss.reshape(-1)[i])
        weights.append(exact.weights[i].square().mean().sqrt() + worth)
        if op == "margin":
            k = draw.op.options.get("k", 1)
            outside = (x.abs() > parameter[i].abs()[:, None]).sum(1) / (k * n if k < 1 else k)
            parameters.append(upstream[i] * (1 + outside))
        elif parameter is not None:
            saved = reference.range_losses._soft_extremes([w], parameter[i : i + 1], *draw.geometry)[0]
            low, high = upstream[:, i] if op == "soft_extrema" else (upstream[i], upstream[i])
            variance = (x.amax(1) - x.amin(1)).square() / n
            parameters.append(
                high * (saved[:, 3] + variance)
                + low * (saved[:, 7] + variance)
                + (0 if op == "soft_extrema" else high * (-parameter[i]).exp())
            )
    losses = torch.stack(losses, 1) if op == "soft_extrema" else torch.stack(losses)
    return exact, Result(
        losses.reshape(exact.loss.shape),
        weights,
        torch.stack(parameters).reshape(wide.parameter.shape) if parameters else None,
    )


def relative(error, scale):
    """error / scale; where the scale is 0, any error is infinite."""
    return torch.where((scale == 0) & (error == 0), 0, error / scale)


def errors(result, exact, scale):
    """quantity -> normalised errors, one for each loss, each tensor's gradient and each parameter."""
    found = {"loss": relative((result.loss.double() - exact.loss).abs(), scale.loss).reshape(-1)}
    rms = torch.stack(
        [(g.double() - e).square().mean().sqrt() for g, e in zip(result.weights, exact.weights, strict=True)]
    )
    found["dW"] = relative(rms, torch.stack(scale.weights))
    if exact.parameter is not None:
        found["dparameter"] = relative((result.parameter.double() - exact.parameter).abs(), scale.parameter).reshape(-1)
    return found


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
    """What each quantity may err. `narrow`: the reference was measured in float32, for a float64 backend held to the reference in float64."""
    allowed = {}
    for quantity, rms in reference_rms.items():
        ulp = torch.finfo(dtype if quantity == "dW" else accumulator(dtype)).eps
        rms *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps if narrow else 1
        allowed[quantity] = (3 if narrow else 2) * rms + ulp
    return allowed


def check(draws, variants):
    """'' if every variant keeps within the budget over these draws, else a line for each one that does not."""
    own, pools = Pool(), {variant: Pool() for variant in variants}
    for one in draws:
        dtype = one.weights[0].dtype
        narrow = dtype == torch.float64
        exact, scale = truth(one)
        with r2kernels.use_backend("reference"):
            if narrow:
                rounded = one.to(torch.float32)
                own.add(errors(evaluate(rounded), *truth(rounded)))
            else:
                own.add(errors(evaluate(one), exact, scale))
        for variant, pool in pools.items():
            with variant.chosen():
                pool.add(errors(evaluate(one), exact, scale))
    return exceeded(own, pools, dtype, narrow)


def exceeded(own, pools, dtype, narrow=False):
    """A line for each variant and quantity over its limit."""
    limit, rounded = limits(own.rms(), dtype, narrow), " in float32" if narrow else ""
    return "\n".join(
        f"{variant}: {quantity} errs by {rms:.3g}, allowed is {limit[quantity]:.3g} (the reference{rounded} errs by {own.rms()[quantity]:.3g})"
        for variant, pool in pools.items()
        for quantity, rms in pool.rms().items()
        if not rms <= limit[quantity]
    )
