"""The regularizers of weights, their statistics, and several terms from one read: `<op>_fwd` and `<op>_bwd` as every
backend has them, and the public functions.

Sources: Shkolnik et al. 2020, "Robust Quantization: One Model to Rule Them All" (KURE); Han et al. 2021, "Improving
Low-Precision Network Quantization via Bin Regularization"; Choi, El-Khamy, Lee 2020, "Learning Sparse Low-Precision
Neural Networks With Learnable Regularization" (MSQE, partial L2). The ops are laid out as those of range_losses.py,
with d = 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, parameters, range_losses
from .columns import accumulator, columns
from .quantizers import code


def _each(weights):
    return enumerate(columns(w)[0] for w in weights)


def _gradients(weights, formula):
    return [formula(i, columns(w)[0]).reshape(w.shape).to(w.dtype) for i, w in enumerate(weights)]


BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # integers as wide as a number, by its bytes


class WeightStats(NamedTuple):
    """0-dim tensors for a tensor, (L,) tensors for a sequence; `numel` an int, or a tuple of ints."""

    min: Tensor
    max: Tensor
    mean: Tensor
    std: Tensor
    kurtosis: Tensor
    abs_max: Tensor
    numel: int | tuple

    @classmethod
    def of(cls, table, ws, single):
        numel = tuple([w.numel() for w in ws])
        return cls(*(table[0] if single else table)[..., :6].unbind(-1), numel[0] if single else numel)


def _unit(x):
    """The power of two at max|x| or below, 1 where that is 0 or no number: x / unit is exact, and sums of its powers
    have room in any dtype."""
    if x.numel() == 0:
        return x.new_ones(())
    top = x.detach().abs().amax()
    unit = top / (2 * torch.frexp(top).mantissa)
    return torch.where((top > 0) & top.isfinite(), unit, 1)


def _mean_square(x):
    """Only the result may be too large or too small for the dtype."""
    unit = _unit(x)
    return (x / unit).square().sum() / max(x.numel(), 1) * unit * unit


def _moments(x):
    """min, max, mean, unbiased std, and mean z^3, mean z^4 with that std; spread, skew and kurtosis are 0 for a
    constant x, for an empty one all but its minimum inf and its maximum -inf, and NaN beside the mean of the sum where
    a weight is not finite."""
    if x.numel() == 0:
        nothing = x.sum()
        return nothing + torch.inf, nothing - torch.inf, nothing, nothing, nothing, nothing
    low, high, unit = x.detach().amin(), x.detach().amax(), _unit(x)
    finite = (low - low == 0) & (high - high == 0)
    constant, y = finite & (low == high), x / unit
    mean = y.mean()
    centred = torch.where(constant, 0, y - mean)
    std = (centred.square().sum() / max(x.numel() - 1, 1)).sqrt()
    z = centred / torch.where(constant, 1, std)
    return low, high, torch.where(finite, mean * unit, low + high), std * unit, z.pow(3).mean(), z.pow(4).mean()


# saved: mean, 1 / std (0 for a constant tensor), mean z^3, kurtosis
def kure_fwd(weights, target):
    saved = []
    for _, x in _each(weights):
        _, _, mean, std, skew, kurtosis = _moments(x)
        saved.append(torch.stack([mean, torch.where(std == 0, 0, 1 / std), skew, kurtosis])[None])
    saved = torch.stack(saved)
    return kure_loss(saved, target), saved


def kure_loss(saved, target):
    return torch.where(saved[:, 0, 1] == 0, 0, (saved[:, 0, 3] - target[:, 0]).square())


def kure_bwd(grad, weights, target, saved):
    def formula(i, x):
        mean, rstd, skew, kurtosis = saved[i, 0].unbind()
        n, z = x.numel(), (x - mean) * rstd
        return (
            grad[i] * 2 * (kurtosis - target[i]) * 4 / n * rstd * (z.pow(3) - skew - n / max(n - 1, 1) * kurtosis * z)
        )

    return _gradients(weights, formula)


def weight_stats_fwd(weights):
    """(L, 7): min, max, mean, unbiased std, kurtosis, max|x|, mean z^3."""
    rows = []
    for _, x in _each(weights):
        low, high, mean, std, skew, kurtosis = _moments(x)
        top = x.abs().amax() if x.numel() else x.new_zeros(())
        rows.append(torch.stack([low, high, mean, std, kurtosis, top, skew]))
    return torch.stack(rows)


def _quantized(x, step, bits):
    """(step or NaN, code) with signed codes"""
    s = torch.where(step > 0, step, torch.nan)
    return s, code(x / s, bits, True)


def _bins(c, bits):
    """The place of each code among 2^bits; of NaN the first."""
    low, _ = parameters.levels(bits, True)
    return ((c.nan_to_num(-low) + low) // (2 if bits == 1 else 1)).long()


def _counts(bins, bits, x):
    """How many weights are in each bin; counted as integers, for float32 would stop at 2^24."""
    return bins.new_zeros(2**bits).scatter_add(0, bins, torch.ones_like(bins)).to(x.dtype)


def _mean_squares(error, bins, counts):
    """Of what is in each bin the mean square, as `_mean_square` has it, and the sum of these."""
    unit = _unit(error)
    sums = torch.zeros_like(counts).scatter_add(0, bins, (error / unit).square())
    means = sums / counts.clamp(min=1)
    return means * unit * unit, means.sum() * unit * unit


# saved: (L, 1, 2 2^bits), how many weights are in each bin, and the mean of (w - Q)^2 in each, 0 in an empty one
def bin_reg_fwd(weights, step, bits):
    loss, saved = [], []
    for i, x in _each(weights):
        s, c = _quantized(x, step[i, 0], bits)
        bins = _bins(c, bits)
        counts = _counts(bins, bits, x)
        means, total = _mean_squares(x - s * c, bins, counts)
        saved.append(torch.cat([counts, means])[None])
        loss.append(total)
    return torch.stack(loss), torch.stack(saved)


def bin_reg_bwd(grad, weights, step, saved, bits):
    def formula(i, x):
        s, c = _quantized(x, step[i, 0], bits)
        return 2 * grad[i] / saved[i, 0][_bins(c, bits)] * (x - s * c)

    return _gradients(weights, formula)


# saved: (L, 1, 1), mean of (w - Q) code
def msqe_fwd(weights, step, bits):
    loss, saved = [], []
    for i, x in _each(weights):
        s, c = _quantized(x, step[i, 0], bits)
        error = x - s * c
        unit = _unit(error)
        loss.append(_mean_square(error))
        saved.append(((error / unit * c).sum() / max(x.numel(), 1) * unit).reshape(1, 1))
    return torch.stack(loss), torch.stack(saved)


def msqe_bwd(grad, weights, step, saved, bits):
    def formula(i, x):
        s, c = _quantized(x, step[i, 0], bits)
        return 2 / max(x.numel(), 1) * grad[i] * (x - s * c)

    return _gradients(weights, formula), msqe_learned(grad, saved)


def msqe_learned(grad, saved):
    """The gradient of the step."""
    return (-2 * grad)[:, None] * saved[..., 0]


def _partial_l2(x, theta):
    return torch.where(theta.isnan(), theta, _mean_square(torch.where(x.abs() > theta, 0, x)))


def _numel(x, theta):
    """NaN where theta is."""
    return torch.where(theta.isnan(), theta, max(x.numel(), 1))


# rank: (L,) int64, which of the sorted |w| is theta, from 1; below it: NaN. saved: (L, 1, 1), theta
def partial_l2_fwd(weights, rank):
    loss, saved = [], []
    for i, x in _each(weights):
        sizes = x.abs().sort().values if x.numel() else x.new_zeros(1)
        theta = sizes.gather(0, (rank[i : i + 1] - 1).clamp(min=0))
        theta = torch.where(rank[i] < 1, torch.nan, theta[0])
        saved.append(theta.reshape(1, 1))
        loss.append(_partial_l2(x, theta))
    return torch.stack(loss), torch.stack(saved)


def partial_l2_bwd(grad, weights, rank, saved):
    def formula(i, x):
        theta = saved[i, 0, 0]
        return torch.where(x.abs() > theta, 0, 2 / _numel(x, theta) * grad[i] * x)

    return _gradients(weights, formula)


def digits_fwd(weights, prefix, place):
    """(L, 256) int64: how many |w| whose bytes, as those of an integer, begin with `prefix` have each value of the next
    byte, which is `place`, the highest 0."""
    rows = []
    for i, w in enumerate(weights):
        shift = 8 * (w.dtype.itemsize - 1 - place)
        key = w.resolve_neg().reshape(-1).view(BITS[w.dtype.itemsize]).long() & (2 ** (8 * w.dtype.itemsize - 1) - 1)
        counted = torch.ones_like(key) if place == 0 else (key >> (shift + 8) == prefix[i]).long()
        rows.append(key.new_zeros(256).scatter_add(0, (key >> shift) & 255, counted))
    return torch.stack(rows)


def split_terms(names, parameters, bits, flags):
    """For each term (name, its parameters, what else its forward takes, what else its backward takes); geometry last,
    where it has one."""
    at = 0
    for name, width, flag in zip(names, bits, flags, strict=True):
        count = checks.tensors_of_term(name)
        geometry = (1, "output") if name in ("l_inf", "margin", "soft_min_max") else (width,) if width else ()
        yield name, parameters[at : at + count], ((flag,) if name == "soft_min_max" else ()) + geometry, geometry
        at += count


# name of a term -> its forward and backward, in the order of checks.TERMS
TERMS = {
    "l_inf": (range_losses.l_inf_fwd, range_losses.l_inf_bwd),
    "margin": (range_losses.margin_fwd, range_losses.margin_bwd),
    "soft_min_max": (range_losses.soft_min_max_fwd, range_losses.soft_min_max_bwd),
    "kure": (kure_fwd, kure_bwd),
    "bin_reg": (bin_reg_fwd, bin_reg_bwd),
    "msqe": (msqe_fwd, msqe_bwd),
    "partial_l2": (partial_l2_fwd, partial_l2_bwd),
}


def terms_fwd(weights, names, parameters, bits, flags):
    """Lists of the losses and of what is saved, one for each of `names`; `parameters` are those of the terms, one
    after the other."""
    results = [
        TERMS[name][0](weights, *given, *forward)
        for name, given, forward, _ in split_terms(names, parameters, bits, flags)
    ]
    return [loss for loss, _ in results], [saved for _, saved in results]


def terms_bwd(grads, weights, names, parameters, bits, flags, saved):
    """(the gradients of the weights, summed over the terms before they are rounded; the gradient of each
    differentiable parameter)"""
    wide = [w.to(accumulator(w.dtype)) for w in weights]
    total, of_parameters = [torch.zeros_like(w) for w in wide], []
    for grad, kept, (name, given, _, backward) in zip(
        grads, saved, split_terms(names, parameters, bits, flags), strict=True
    ):
        result = TERMS[name][1](grad, wide, *given, kept, *backward)
        if isinstance(result, tuple):
            result, g = result
            of_parameters.append(g)
        for t, g in zip(total, result, strict=True):
            t += g
    return [t.to(w.dtype) for t, w in zip(total, weights, strict=True)], of_parameters


def kure(W, *, target=1.8):
    ws, single = checks.weights(W)
    target = parameters.parameter("target", target, len(ws), single, 1, ws[0], differentiable=False)
    losses = []
    for i, x in _each(ws):
        *_, std, _, kurtosis = _moments(x)
        losses.append(torch.where(std == 0, 0, (kurtosis - target[i, 0]).square()))
    return losses[0] if single else torch.stack(losses)


def weight_stats(W):
    ws, single = checks.weights(W)
    with torch.no_grad():
        return WeightStats.of(weight_stats_fwd(ws), ws, single)


def bin_reg(W, step, bits):
    ws, single = checks.weights(W)
    checks.bit_width(bits)
    step = parameters.step("step", step, ws, single, differentiable=False)
    losses = []
    for i, x in _each(ws):
        s, c = _quantized(x, step[i, 0], bits)
        bins = _bins(c, bits).detach()
        counts = _counts(bins, bits, x)
        losses.append(_mean_squares(x - (s * c).detach(), bins, counts)[1])
    return losses[0] if single else torch.stack(losses)


def msqe(W, step, bits):
    ws, single = checks.weights(W)
    checks.bit_width(bits)
    step = parameters.step("step", step, ws, single)
    losses = []
    for i, x in _each(ws):
        s, c = _quantized(x, step[i, 0], bits)
        losses.append(_mean_square(x - s * c.detach()))
    return losses[0] if single else torch.stack(losses)


def partial_l2(W, fraction):
    ws, single = checks.weights(W)
    rank = parameters.rank(fraction, ws, single)
    losses = []
    for i, x in _each(ws):
        with torch.no_grad():
            _, theta = partial_l2_fwd([x], rank[i : i + 1])
        losses.append(_partial_l2(x, theta[0, 0, 0]))
    return losses[0] if single else torch.stack(losses)


def weight_terms(W, terms):
    functions = {
        **{name: getattr(range_losses, name) for name in ("l_inf", "margin", "soft_min_max")},
        "kure": kure,
        "bin_reg": bin_reg,
        "msqe": msqe,
        "partial_l2": partial_l2,
    }
    ws, single = checks.weights(W)
    return {name: functions[name](ws[0] if single else ws, **options) for name, options in checks.terms(terms).items()}
