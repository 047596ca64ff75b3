"""Launchers onto the Triton kernels: at most two launches forward and one backward for a list of any length."""

import contextlib

import torch

from ... import lists
from ...contract import accumulator
from .quantizers import Quantizers
from .regularizers import Regularizers

SAVED = {"l_inf": 2, "margin": 1, "soft_min_max": 8, "soft_extrema": 8, "kure": 4, "weight_stats": 6}
LOSSES = {"soft_extrema": 2, "weight_stats": 0}  # per column; else one per tensor


def load():
    try:
        import triton
    except ImportError as error:
        raise ImportError("triton is not installed") from error
    interpreted = triton.knobs.runtime.interpret
    if not interpreted and not torch.cuda.is_available():
        raise RuntimeError(
            "no CUDA device was found (and TRITON_INTERPRET=1, for CPU tensors, was not set before triton was imported)"
        )
    from . import moments_kernels as moments
    from . import quantizers_kernels as quantizers
    from . import range_losses_kernels as range
    from . import regularizers_kernels as regularizers
    from . import skeletons as common

    return Triton(common, {**vars(range), **vars(moments)}, quantizers, regularizers, interpreted)


class Triton(Quantizers, Regularizers):
    """The ops, on CUDA tensors; under Triton's interpreter on CPU tensors, since it reads the addresses in a table as the host's."""

    def __init__(self, skeletons, formulas, quantizers, regularizers, interpreted):
        tl = skeletons.tl
        self.skeletons, self.formulas, self.interpreted = skeletons, formulas, interpreted
        self.quantizers, self.regularizers = quantizers, regularizers
        self.devices = ("cpu",) if interpreted else ("cuda",)
        self.dtypes = {
            torch.float64: tl.float64,
            torch.float32: tl.float32,
            torch.bfloat16: tl.bfloat16,
            torch.float16: tl.float16,
        }
        self.options = {"num_warps": skeletons.WARPS, "enable_fp_fusion": True}

    def _list(self, weights, d, layout):
        """(tensors as they lie in memory, table of their addresses, plan)"""
        device = weights[0].device
        tensors, runs = lists.dense(weights, d, layout)
        return tensors, lists.device_table(tensors, device), lists.plan(tensors, runs, d, device)

    def _formula(self, op, part):
        return self.formulas[f"{op}_{part}"]

    def _constants(self, dtype, d, tensors):
        block, unroll = self.skeletons.tile(dtype.itemsize, d, self.interpreted)
        return {
            "DT": self.dtypes[dtype],
            "ACC": self.dtypes[accumulator(dtype)],
            "D": d,
            "ALIGNED": lists.is_aligned(tensors),
            "BLOCK": block,
            "UNROLL": unroll,
            **self.options,
        }

    def _forward(self, op, weights, d, layout, out, saved, first=None, second=None, reduce=None):
        tensors, table, plan = self._list(weights, d, layout)
        states = torch.empty(plan.chunks, self.skeletons.STATE.value, dtype=out.dtype, device=out.device)
        constants = self._constants(weights[0].dtype, d, tensors)
        with _current(out.device):
            self.skeletons.reduce_chunks[(plan.chunks,)](
                table,
                plan.tensors,
                plan.owner,
                first,
                states,
                plan.chunk,
                self._formula(reduce or op, "reduce"),
                **constants,
            )
            self.skeletons.merge_chunks[(plan.count,)](
                states,
                plan.tensors,
                first,
                second,
                out,
                saved,
                plan.chunk,
                self._formula(op, "merge"),
                LOSSES.get(op, 1),
                constants["ACC"],
                d,
                self.skeletons.MERGE_LANES,
                **self.options,
            )
        return out, saved

    def _backward(self, op, grad, weights, d, layout, saved, out, first=None, second=None, parameter_gradient=None):
        tensors, table, plan = self._list(weights, d, layout)
        gradients = lists.empty_gradients(weights, d, layout) if out is None else out
        flat = out is None and grad.is_cuda
        targets = gradients[0] if flat else lists.device_table(gradients, grad.device)
        target = self.skeletons.FLAT if flat else self.skeletons.TABLE if out is None else self.skeletons.ADD
        with _current(grad.device):
            self.skeletons.map_chunks[(plan.chunks,)](
                table,
                targets,
                plan.tensors,
                plan.owner,
                grad,
                grad.stride(0),
                first,
                second,
                saved,
                parameter_gradient,
                plan.chunk,
                self._formula(op, "setup"),
                self._formula(op, "gradient"),
                target,
                **self._constants(weights[0].dtype, d, [*tensors, *gradients]),
            )
        return gradients

    def l_inf_fwd(self, weights, d, layout):
        return self._forward("l_inf", weights, d, layout, *lists.empty_state(weights, d, SAVED["l_inf"]))

    def l_inf_bwd(self, grad, weights, saved, d, layout, out=None):
        return self._backward("l_inf", grad, weights, d, layout, saved, out)

    def margin_fwd(self, weights, M, k, d, layout):
        return self._forward("margin", weights, d, layout, *lists.empty_state(weights, d, SAVED["margin"]), M, k)

    def margin_bwd(self, grad, weights, M, k, saved, d, layout, out=None):
        g_M = torch.empty_like(M)
        return self._backward("margin", grad, weights, d, layout, saved, out, M, k, g_M), g_M

    def soft_min_max_fwd(self, weights, alpha, alpha_grad, d, layout):
        return self._forward(
            "soft_min_max",
            weights,
            d,
            layout,
            *lists.empty_state(weights, d, SAVED["soft_min_max"]),
            alpha,
            reduce=_soft(alpha_grad),
        )

    def soft_min_max_bwd(self, grad, weights, alpha, saved, d, layout, out=None):
        g_alpha = torch.empty_like(alpha)
        return self._backward("soft_min_max", grad, weights, d, layout, saved, out, alpha, None, g_alpha), g_alpha

    def soft_extrema_fwd(self, weights, alpha, alpha_grad, d, layout):
        extrema = torch.empty(2, len(weights), d, dtype=alpha.dtype, device=alpha.device)
        _, saved = lists.empty_state(weights, d, SAVED["soft_extrema"])
        return self._forward("soft_extrema", weights, d, layout, extrema, saved, alpha, reduce=_soft(alpha_grad))

    def soft_extrema_bwd(self, grad, weights, alpha, saved, d, layout, out=None):
        g_alpha = torch.empty_like(alpha)
        return self._backward(
            "soft_extrema", grad.contiguous(), weights, d, layout, saved, out, alpha, None, g_alpha
        ), g_alpha

    def kure_fwd(self, weights, target):
        return self._forward("kure", weights, 1, "output", *lists.empty_state(weights, 1, SAVED["kure"]), target)

    def kure_bwd(self, grad, weights, target, saved, out=None):
        return self._backward("kure", grad, weights, 1, "output", saved, out, target)

    def weight_stats_fwd(self, weights):
        return self._forward(
            "weight_stats", weights, 1, "output", *lists.empty_state(weights, 1, SAVED["weight_stats"])
        )[1].squeeze(1)

    def DKM(self, *problem):
        from .dkm import DKM

        return DKM(self, *problem)

    def assign_fwd(self, *problem):
        from .dkm import assign_fwd

        return assign_fwd(self, *problem)

    def current(self, device):
        return _current(device)


def _soft(alpha_grad):
    return "soft_min_max" if alpha_grad else "frozen_soft_min_max"


def _current(device):
    """Triton launches on the current device."""
    return (
        torch.cuda.device(device)
        if device.type == "cuda" and device.index != torch.cuda.current_device()
        else contextlib.nullcontext()
    )
