"""The range losses and weight regularizers: what a user calls.

`W` is a floating-point tensor (float64, float32, bfloat16, float16; any shape and strides), giving a 0-dim loss, or a sequence of L of
them with one dtype and device, giving an (L,) loss from one fused pass over all. Losses are float32 (float64 for float64 W); gradients
have the dtype of what they belong to. Nothing is read back to the host. A second derivative raises RuntimeError.

Parameters are a number, a 0-dim tensor, for a sequence also an (L,) tensor or a sequence of numbers. `cluster_dim=d` reads W as rows of d
(`layout="output"`: `W.transpose(0, -1).reshape(-1, d)`, d consecutive output channels; `"contiguous"`: `W.reshape(-1, d)`), takes the loss of each
of the d columns and sums; a parameter may then be (d,), or (L, d) for a sequence. The numel mod d leftovers are ignored.

Every function raises TypeError or ValueError, naming the argument, for a wrong type, dtype, device mix, shape or value. The values of
tensors are never read: an invalid one gives NaN.
"""

import torch
from torch import Tensor

from .. import ops
from ..backends import chosen
from ..lists import carve_gradients
from ..reference import checks, parameters
from ..reference.regularizers import WeightStats


class _RangeLoss(torch.autograd.Function):
    """One op over a list. `value` is the differentiable parameter as the user gave it (or None), `first` and `second` are (L, d) tensors."""

    @staticmethod
    def forward(
        ctx, *inputs
    ):  # not spelled out: without gradients, torch.compile drops ctx where it counts as many inputs as names here
        op, single, options, value, first, second, *weights = inputs
        parameters = _parameters(single, options, value, first, second, weights)
        extra = (value is not None and value.requires_grad,) if op in _SOFT else ()
        loss, saved = ops.run(op + "_fwd", weights, *parameters, *extra, *options)
        ctx.save_for_backward(saved, value, *parameters, *weights)
        ctx.call = op, single, options, len(parameters)
        ctx.backend = None if torch.compiler.is_compiling() else chosen()
        return _shaped(loss, single)

    @staticmethod
    def backward(ctx, grad):
        op, single, options, n = ctx.call
        saved, value, *rest = ctx.saved_tensors
        given, weights = rest[:n], rest[n:]
        grad = grad.reshape(2, len(weights), -1) if op == "soft_extrema" else grad.reshape(-1)
        result = ops.run_backward(ctx.backend, op + "_bwd", grad, weights, *given, saved, *options)
        buffers, g_value = result if isinstance(result, tuple) else (result, None)
        needed = ctx.needs_input_grad
        if needed[3]:
            g_value = parameters.parameter_gradient(g_value, value, single)
        gradients = carve_gradients(buffers, weights, *_geometry(options))
        if not all(needed[6:]):
            gradients = [g if need else None for g, need in zip(gradients, needed[6:], strict=True)]
        return None, None, None, g_value if needed[3] else None, None, None, *gradients


_SOFT = ("soft_min_max", "soft_extrema")
_DIFFERENTIABLE = ("M", "alpha", "step")


def _geometry(options):
    """(d, layout) of the ops that have one among what else they take."""
    return options if len(options) == 2 else (1, "output")


def _parameters(single, options, value, first, second, weights):
    """The (L, d) tensors that the op takes, in its order."""
    if value is not None:
        first = parameters.parameter("parameter", value, len(weights), single, _geometry(options)[0], weights[0])
    return [p for p in (first, second) if p is not None]


def _shaped(loss, single):
    """(L,) -> (), (2, L, d) -> (2, d) for a single tensor; a lone column is dropped."""
    if loss.dim() == 3 and loss.shape[-1] == 1:
        loss = loss.squeeze(-1)
    return loss.squeeze(-1 if loss.dim() == 1 else 1) if single else loss


def _apply(op, ws, single, options, name=None, value=None, second=None, first=None):
    """The loss of the checked list `ws`; `name` and `value` are the differentiable parameter, `first` is one that the op takes as it is."""
    if name is not None:
        d = _geometry(options)[0]
        if isinstance(value, Tensor) and name in _DIFFERENTIABLE:
            checks.check_parameter(name, value, len(ws), single, d, ws[0])
        else:
            first, value = parameters.parameter(name, value, len(ws), single, d, ws[0], differentiable=False), None
    return _RangeLoss.apply(op, single, options, value, first, second, *ws)


def l_inf(W, *, cluster_dim=1, layout="output") -> Tensor:
    """max|W| (R2 eq. 1).

    dL/dW = sign(W) / ties where |W| is the maximum (split evenly, as `torch.amax` does), 0 elsewhere.
    """
    ws, single = checks.weights(W, cluster_dim, layout)
    return _apply("l_inf", ws, single, (cluster_dim, layout))


def margin(W, M, *, k=1, cluster_dim=1, layout="output") -> Tensor:
    """|M| + (1/k) sum relu(|W| - |M|) (R2 eq. 2; k = 1 is the paper's sum). Differentiable in W and M.

    k: an int >= 1, or a fraction in (0, 1), then k times the number of weights in a column, unrounded. Minimised over M it is the mean of the
    k largest |W|, so k decides what the loss does: 1 is L-infinity, all weights is L1 (M then collapses to 0), 0.01 the mean of the top 1 %.
    dL/dW = sign(W) [|W| > |M|] / k; dL/dM = sign(M) (1 - #{|W| > |M|} / k). Keep M out of weight decay.
    """
    ws, single = checks.weights(W, cluster_dim, layout)
    k = parameters.margin_k(k, ws, single, cluster_dim)
    return _apply("margin", ws, single, (cluster_dim, layout), "M", M, k)


def soft_min_max(W, alpha, *, cluster_dim=1, layout="output") -> Tensor:
    """s_max - s_min + exp(-alpha) (R2 eq. 3), with s_max = sum p W, s_min = sum q W, p = softmax(alpha W), q = softmax(-alpha W).

    Differentiable in W and alpha; any sign of alpha. alpha -> infinity gives the range max(W) - min(W), alpha -> 0 gives 1 + 2 alpha Var(W).
    dL/dW = p (1 + alpha (W - s_max)) - q (1 - alpha (W - s_min)); dL/dalpha = Var_p(W) + Var_q(W) - exp(-alpha).
    A learned alpha settles where Var_p + Var_q = exp(-alpha). Keep alpha out of weight decay. Leaving alpha without gradient is cheaper.
    """
    ws, single = checks.weights(W, cluster_dim, layout)
    return _apply("soft_min_max", ws, single, (cluster_dim, layout), "alpha", alpha)


def soft_extrema(W, alpha, *, cluster_dim=1, layout="output") -> tuple[Tensor, Tensor]:
    """(s_min, s_max) of `soft_min_max`, differentiable in W and alpha; with cluster_dim > 1 per column: (d,), or (L, d) for a sequence."""
    ws, single = checks.weights(W, cluster_dim, layout)
    return _apply("soft_extrema", ws, single, (cluster_dim, layout), "alpha", alpha).unbind(0)


def kure(W, *, target=1.8) -> Tensor:
    """(kurtosis(W) - target)^2 with kurtosis = mean z^4, z = (W - mean) / std, std unbiased (Shkolnik et al. 2020, "Robust Quantization").

    1.8 is the kurtosis of the uniform distribution. A constant tensor has loss and gradient 0.
    dkurtosis/dW = 4 / (N std) (z^3 - mean z^3 - N / (N - 1) kurtosis z).
    """
    ws, single = checks.weights(W)
    return _apply("kure", ws, single, (), "target", target)


def bin_reg(W, step, bits) -> Tensor:
    """sum over non-empty bins b of mean over W in b of (W - q_b)^2, q_b = b step (Han et al. 2021, "Bin Regularization").

    A bin is a code of LSQ, round(clip(W / step, -2^(bits-1), 2^(bits-1) - 1)) (one bit: the sign). Equals the sum over bins of (mean_b - q_b)^2 + var_b.
    dL/dW = 2 / V_b (W - q_b), with V_b weights in the bin. `bits` 1..8; step > 0 has no gradient.
    """
    ws, single = checks.weights(W)
    checks.bit_width(bits)
    return _apply("bin_reg", ws, single, (bits,), first=parameters.step("step", step, ws, single, differentiable=False))


def msqe(W, step, bits) -> Tensor:
    """mean (W - Q)^2 with Q = step code, LSQ's signed code (Choi, El-Khamy, Lee 2020). Differentiable in W and step.

    dL/dW = 2/N (W - Q); dL/dstep = -2/N sum (W - Q) code. `bits` 1..8. (US patent 11,270,187 B2 claims the use with a growing coefficient.)
    """
    ws, single = checks.weights(W)
    checks.bit_width(bits)
    if not isinstance(step, Tensor):
        step = parameters.step("step", step, ws, single)
        return _apply("msqe", ws, single, (bits,), first=step)
    return _apply("msqe", ws, single, (bits,), "step", step)


def partial_l2(W, fraction) -> Tensor:
    """1/N sum W^2 [|W| <= theta], theta the ceil(fraction N)-th smallest |W|, exact (Choi, El-Khamy, Lee 2020): pulls what is to be pruned to 0.

    fraction: a number in (0, 1]; no gradient. dL/dW = 2/N W [|W| <= theta].
    """
    ws, single = checks.weights(W)
    return _apply("partial_l2", ws, single, (), first=parameters.rank(fraction, ws, single))


def weight_stats(W) -> WeightStats:
    """Named tuple `min, max, mean, std, kurtosis, abs_max, numel` from one pass, without gradient.

    std is unbiased (0 for one element), kurtosis = mean z^4 with that std (0 for a constant tensor). `numel` is an int, or a tuple of ints.
    """
    ws, single = checks.weights(W)
    with torch.no_grad():
        return WeightStats.of(ops.run("weight_stats_fwd", ws), ws, single)


def add_gradients_(op, weights, gradients, grad, parameters, *, alpha_grad=False, geometry=(1, "output")):
    """The forward and backward of an op without a graph: adds to `gradients`, which lie in memory as the weights do, and returns
    (loss, gradient of the first parameter or None). `grad` is the gradient of the loss: (L,), or (2, L, d) for soft_extrema."""
    extra = (alpha_grad,) if op in _SOFT else ()
    geometry = () if op == "kure" else geometry
    loss, saved = ops.call[op + "_fwd"](weights, *parameters, *extra, *geometry)
    result = ops.call[op + "_bwd"](grad, weights, *parameters, saved, *geometry, out=gradients)
    return loss, result[1] if isinstance(result, tuple) else None
