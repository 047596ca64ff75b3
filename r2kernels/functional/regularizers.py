"""The regularizers of weights and their statistics: what a user calls.

`W` is a floating-point tensor or a sequence of them, DTensors too, and parameters are given, as in range_losses.py,
with cluster_dim 1 (partial_l2 of DTensors takes a message more for each byte of a number). TypeError or ValueError
names the argument, for a wrong type, dtype, device mix, shape or value. The values of tensors are never read: an
invalid one gives NaN. A second derivative through a loss raises RuntimeError. An empty tensor of a sequence has the
loss 0, and no share in the gradient of a step.
"""

import torch
from torch import Tensor

from .. import ops
from ..contract import BY_NAME, tensors_of_term
from ..reference import checks, parameters
from ..reference.regularizers import WeightStats
from .differentiable import once, weights
from .loss import Call, Loss, learnable


def kure(W, *, target=1.8) -> Tensor:
    """(kurtosis(W) - target)^2 with kurtosis = mean z^4, z = (W - mean) / std, std unbiased (Shkolnik et al. 2020,
    "Robust Quantization").

    1.8 is the kurtosis of the uniform distribution. A constant tensor has loss and gradient 0.
    dkurtosis/dW = 4 / (N std) (z^3 - mean z^3 - N / (N - 1) kurtosis z).
    """
    ws, single = weights("kure", W)
    target = parameters.parameter("target", target, len(ws), single, 1, ws[0], differentiable=False)
    return Loss.apply(ops.kure, Call(single), 1, None, target, *ws)


def bin_reg(W, step, bits) -> Tensor:
    """sum over non-empty bins b of mean over W in b of (W - q_b)^2, q_b = b step (Han et al. 2021, "Bin
    Regularization").

    A bin is a code of LSQ, round(clip(W / step, -2^(bits-1), 2^(bits-1) - 1)) (one bit: the sign). Equals the sum over
    bins of (mean_b - q_b)^2 + var_b.
    dL/dW = 2 / V_b (W - q_b), with V_b weights in the bin. `bits` 1..8; step > 0 has no gradient.
    """
    ws, single = weights("bin_reg", W)
    checks.bit_width(bits)
    step = parameters.step("step", step, ws, single, differentiable=False)
    call = Call(single, (bits,), (bits,))
    return Loss.apply(ops.bin_reg, call, 1, None, step, *ws)


def msqe(W, step, bits) -> Tensor:
    """mean (W - Q)^2 with Q = step code, LSQ's signed code (Choi, El-Khamy, Lee 2020). Differentiable in W and step.

    dL/dW = 2/N (W - Q); dL/dstep = -2/N sum (W - Q) code. `bits` 1..8. (US patent 11,270,187 B2 claims the use with a
    growing coefficient.)
    """
    ws, single = weights("msqe", W)
    checks.bit_width(bits)
    if isinstance(step, Tensor):
        learned, fixed = learnable("step", step, ws, single)
    else:
        learned, fixed = None, (parameters.step("step", step, ws, single),)
    call = Call(single, (bits,), (bits,))
    return Loss.apply(ops.msqe, call, len(fixed), learned, *fixed, *ws)


def partial_l2(W, fraction) -> Tensor:
    """1/N sum W^2 [|W| <= theta], theta the ceil(fraction N)-th smallest |W|, exact (Choi, El-Khamy, Lee 2020): pulls
    what is to be pruned to 0.

    fraction: a number in (0, 1]; no gradient. dL/dW = 2/N W [|W| <= theta].
    """
    ws, single = weights("partial_l2", W)
    rank = parameters.rank(fraction, ws, single)
    return Loss.apply(ops.partial_l2, Call(single), 1, None, rank, *ws)


def weight_stats(W) -> WeightStats:
    """Named tuple `min, max, mean, std, kurtosis, abs_max, numel` from one pass, without gradient.

    std is unbiased (0 for one element), kurtosis = mean z^4 with that std (0 for a constant tensor), at any scale of
    the dtype. With an infinity or a NaN in W the mean is that of the sum, std and kurtosis are NaN. Of an empty tensor
    of a sequence min is inf, max -inf and all else 0: a merge of shards by their `numel` leaves it out. `numel` is an
    int, or a tuple of ints.
    """
    ws, single = weights("weight_stats", W)
    with torch.no_grad():
        return WeightStats.of(ops.weight_stats.fwd(ws), ws, single)


def sampled_std(ws):
    """(L,) standard deviations of weights without gradient, of those from 32,768 numbers on of a sample of 16,384.

    Against that of all numbers such a deviation errs by about sqrt((kurtosis - 1) / (4 * 16384)), 0.6 % for normal
    weights, and costs no second read of them. Which they are is told in reference/sample.py.
    """
    with torch.no_grad():
        return ops.sampled_std.fwd(ws)


class _WeightTerms(torch.autograd.Function):
    """Inputs: (names, bits, flags), how many parameters follow; the (L, 1) tensors of all terms, one term's after the
    other's; the weights."""

    @staticmethod
    def forward(ctx, *inputs):
        (names, bits, flags), count, *tensors = inputs
        given, ws = tensors[:count], tensors[count:]
        losses, saved = ops.terms.fwd(ws, names, given, bits, flags)
        ctx.save_for_backward(*tensors, *saved)
        ctx.of_forward = names, bits, flags, count, len(saved), ops.backend_of_forward()
        ctx.function = "weight_terms"
        return tuple(losses)

    @staticmethod
    @once
    def backward(ctx, tensors, *grads):
        names, bits, flags, count, terms, backend = ctx.of_forward
        given, ws, saved = tensors[:count], tensors[count:-terms], tensors[-terms:]
        grads = [g.resolve_neg() for g in grads]
        needed = {"needed": ctx.needs_input_grad[-len(ws) :]}
        args = grads, ws, names, given, bits, flags, saved
        of_weights, of_parameters = ops.backward(backend, ops.terms.bwd, *args, **needed)
        learned, gradients = iter(of_parameters), []
        for name in names:
            n = BY_NAME[name].learned
            gradients += [next(learned) for _ in range(n)] + [None] * (tensors_of_term(name) - n)
        gradients += of_weights
        return None, None, *[g if need else None for g, need in zip(gradients, ctx.needs_input_grad[2:], strict=True)]


def _parameters(name, options, ws, single):
    """The (L, 1) tensors that the op of a term takes; connected to what the user gave under autograd."""

    def of(key, **rules):
        return parameters.parameter(f"terms[{name!r}][{key!r}]", options[key], len(ws), single, 1, ws[0], **rules)

    if name == "margin":
        return [of("M"), parameters.margin_k(options.get("k", 1), ws, single, 1)]
    if name == "soft_min_max":
        return [of("alpha")]
    if name == "kure":
        options = {"target": 1.8, **options}
        return [of("target", differentiable=False)]
    if name in ("bin_reg", "msqe"):
        checks.bit_width(options["bits"], f"terms[{name!r}]['bits']")
        return [parameters.step(f"terms[{name!r}]['step']", options["step"], ws, single, name == "msqe")]
    return [parameters.rank(options["fraction"], ws, single)] if name == "partial_l2" else []


def weight_terms(W, terms) -> dict:
    """name -> loss of each term, as the function of that name gives it, all from one forward and one backward pass
    over the weights.

    terms: a dict of name -> keyword arguments, of l_inf, margin, soft_min_max, kure, bin_reg, msqe and partial_l2;
    for example {"soft_min_max": {"alpha": 0.1}, "kure": {}, "msqe": {"step": step, "bits": 4}}. cluster_dim is 1. The
    gradients of all terms are summed before they are rounded to the dtype of W. (partial_l2 looks for its threshold
    in passes of its own.) The penalty is what you make of them, say
    `coefficient(terms["msqe"]) + 0.01 * terms["kure"]` with a `LearnableCoefficient`.
    """
    ws, single = weights("weight_terms", W)
    terms = checks.terms(terms)
    given = [_parameters(name, options, ws, single) for name, options in terms.items()]
    bits = [options.get("bits", 0) for options in terms.values()]
    flags = [name == "soft_min_max" and tensors[0].requires_grad for name, tensors in zip(terms, given, strict=True)]
    flat = [p for tensors in given for p in tensors]
    losses = _WeightTerms.apply((list(terms), bits, flags), len(flat), *flat, *ws)
    return {name: loss[0] if single else loss for name, loss in zip(terms, losses, strict=True)}
