"""What the launchers of all backends share: each op as a method, its results allocated as the table of the contract
says.

A backend brings the skeletons: `_reduce` and `_map` for the losses, `terms_fwd` and `terms_bwd`, `_quantize` and
`_quantize_bwd`.
"""

import torch

from .. import lists
from ..contract import (
    BIN_REG,
    DOREFA,
    EWGS,
    KURE,
    L_INF,
    LSQ,
    MARGIN,
    MSQE,
    PACT,
    PARTIAL_L2,
    RADIX,
    RESCALE,
    SOFT_EXTREMA,
    SOFT_MIN_MAX,
    STATISTICS,
    WEIGHT_STATS,
    accumulator,
    levels,
)


class RangeLosses:
    """`_reduce(op, weights, parameters, d, layout, loss, saved, alpha_grad)` fills loss and saved; `_map(op, grad,
    weights, parameters, saved, d, layout, out, needed, learned)` fills `learned`, the gradient of the first parameter
    or None, and returns those of the weights, which it adds to `out` if that is not None. `needed`: for each weight
    whether its gradient is to be made; None: all are."""

    def l_inf_fwd(self, weights, d, layout):
        return self._loss(L_INF, weights, (), d, layout)

    def l_inf_bwd(self, grad, weights, saved, d, layout, out=None, needed=None):
        return self._map(L_INF, grad, weights, (), saved, d, layout, out, needed, None)

    def margin_fwd(self, weights, M, k, d, layout):
        return self._loss(MARGIN, weights, (M, k), d, layout)

    def margin_bwd(self, grad, weights, M, k, saved, d, layout, out=None, needed=None):
        return self._learned(MARGIN, grad, weights, (M, k), saved, d, layout, out, needed)

    def soft_min_max_fwd(self, weights, alpha, alpha_grad, d, layout):
        return self._loss(SOFT_MIN_MAX, weights, (alpha,), d, layout, alpha_grad)

    def soft_min_max_bwd(self, grad, weights, alpha, saved, d, layout, out=None, needed=None):
        return self._learned(SOFT_MIN_MAX, grad, weights, (alpha,), saved, d, layout, out, needed)

    def soft_extrema_fwd(self, weights, alpha, alpha_grad, d, layout):
        extrema = torch.empty(2, len(weights), d, dtype=alpha.dtype, device=alpha.device)
        _, saved = lists.empty_state(weights, d, SOFT_EXTREMA.saved)
        self._reduce(SOFT_EXTREMA, weights, (alpha,), d, layout, extrema, saved, alpha_grad)
        return extrema, saved

    def soft_extrema_bwd(self, grad, weights, alpha, saved, d, layout, out=None, needed=None):
        return self._learned(SOFT_EXTREMA, grad.contiguous(), weights, (alpha,), saved, d, layout, out, needed)

    def _loss(self, op, weights, parameters, d, layout, alpha_grad=False):
        loss, saved = lists.empty_state(weights, d, op.saved)
        self._reduce(op, weights, parameters, d, layout, loss, saved, alpha_grad)
        return loss, saved

    def _learned(self, op, grad, weights, parameters, saved, d, layout, out, needed):
        learned = torch.empty_like(parameters[0])
        return self._map(op, grad, weights, parameters, saved, d, layout, out, needed, learned), learned


class Regularizers:
    """kure and weight_stats by the skeletons of `RangeLosses`; bin_reg, msqe and partial_l2 as sets of one term.
    `_sampled_std(weights, out)` fills out, `_digits(weights, prefix, place, counts)` adds to counts."""

    def kure_fwd(self, weights, target):
        return self._loss(KURE, weights, (target,), 1, "output")

    def kure_bwd(self, grad, weights, target, saved, out=None, needed=None):
        return self._map(KURE, grad, weights, (target,), saved, 1, "output", out, needed, None)

    def weight_stats_fwd(self, weights):
        w = weights[0]
        table = torch.empty(len(weights), STATISTICS, dtype=accumulator(w.dtype), device=w.device)
        self._reduce(WEIGHT_STATS, weights, (), 1, "output", table, None, False)
        return table

    def sampled_std_fwd(self, weights):
        w = weights[0]
        out = torch.empty(len(weights), dtype=accumulator(w.dtype), device=w.device)
        self._sampled_std(weights, out)
        return out

    def digits_fwd(self, weights, prefix, place):
        counts = torch.zeros(len(weights), RADIX, dtype=torch.int64, device=weights[0].device)
        self._digits(weights, prefix.contiguous(), place, counts)
        return counts

    def bin_reg_fwd(self, weights, step, bits):
        return self._term(BIN_REG, weights, step, bits)

    def bin_reg_bwd(self, grad, weights, step, saved, bits, out=None, needed=None):
        return self._term_bwd(BIN_REG, grad, weights, step, saved, bits, out, needed)[0]

    def msqe_fwd(self, weights, step, bits):
        return self._term(MSQE, weights, step, bits)

    def msqe_bwd(self, grad, weights, step, saved, bits, out=None, needed=None):
        gradients, (g_step,) = self._term_bwd(MSQE, grad, weights, step, saved, bits, out, needed)
        return gradients, g_step

    def partial_l2_fwd(self, weights, rank):
        return self._term(PARTIAL_L2, weights, rank, 0)

    def partial_l2_bwd(self, grad, weights, rank, saved, out=None, needed=None):
        return self._term_bwd(PARTIAL_L2, grad, weights, rank, saved, 0, out, needed)[0]

    def _term(self, op, weights, parameter, bits):
        (loss,), (saved,) = self.terms_fwd(weights, [op.name], [parameter], [bits], [False])
        return loss, saved

    def _term_bwd(self, op, grad, weights, parameter, saved, bits, out, needed):
        return self.terms_bwd([grad], weights, [op.name], [parameter], [bits], [False], [saved], out, needed)


class Quantizers:
    """`_quantize(op, xs, parameters, bits, flag, axis=None, codes=None, sized=False)` gives the quantized tensors;
    `_quantize_bwd(op, gs, xs, parameters, ...)` the gradients of the tensors and a tuple of those of the first
    `op.learned` parameters. codes: (QN, QP) of LSQ, whose codes run from -QN to QP; those of the others from 0 to
    2^bits - 1."""

    def lsq_fwd(self, xs, step, bits, signed, axis, kind, sized=False):
        return self._quantize(LSQ, xs, (step,), bits, signed, axis, levels(bits, signed, kind), sized)

    def lsq_bwd(self, gs, xs, step, bits, signed, axis, kind, sized=False):
        codes = levels(bits, signed, kind)
        made, (g_step,) = self._quantize_bwd(LSQ, gs, xs, (step,), bits, signed, axis, codes, sized)
        return made, g_step

    def ewgs_fwd(self, xs, lower, upper, delta, bits, signed, sized=False):
        return self._quantize(EWGS, xs, (lower, upper, delta), bits, signed, sized=sized)

    def ewgs_bwd(self, gs, xs, lower, upper, delta, bits, signed, sized=False):
        made, (g_lower, g_upper) = self._quantize_bwd(EWGS, gs, xs, (lower, upper, delta), bits, signed, sized=sized)
        return made, g_lower, g_upper

    def pact_fwd(self, xs, alpha, bits, plus, sized=False):
        return self._quantize(PACT, xs, (alpha,), bits, plus, sized=sized)

    def pact_bwd(self, gs, xs, alpha, bits, plus, sized=False):
        made, (g_alpha,) = self._quantize_bwd(PACT, gs, xs, (alpha,), bits, plus, sized=sized)
        return made, g_alpha

    def rescale_fwd(self, xs, scale, sized=False):
        return self._quantize(RESCALE, xs, (scale,), 1, False, sized=sized)

    def rescale_bwd(self, gs, xs, scale, sized=False):
        made, (g_scale,) = self._quantize_bwd(RESCALE, gs, xs, (scale,), 1, False, sized=sized)
        return made, g_scale

    def dorefa_fwd(self, xs, scale, bits, detach_max):
        return self._quantize(DOREFA, xs, (scale,), bits, detach_max)

    def dorefa_bwd(self, gs, xs, scale, bits, detach_max):
        return self._quantize_bwd(DOREFA, gs, xs, (scale,), bits, detach_max)[0]
