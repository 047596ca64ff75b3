"""Launchers of the quantizers onto the Triton kernels: one launch forward, two backward, for a list of any length."""

import torch

from ... import lists
from ...contract import accumulator, levels

COLUMNS, LANES = (
    32,
    16,
)  # channels that a program merges, and chunks of each at a time; without channels all lanes are chunks


class Quantizers:
    """The quantizers' ops; what they take is told in reference/quantizers.py."""

    def lsq_fwd(self, xs, step, bits, signed, axis):
        return self._quantize("lsq", "lsq_fwd", None, xs, (step,), *levels(bits, signed), False, axis)[0]

    def lsq_bwd(self, gs, xs, step, bits, signed, axis):
        made, *gradients = self._quantize("lsq", "lsq_bwd", gs, xs, (step,), *levels(bits, signed), False, axis, 1, 1)
        return made, *gradients

    def ewgs_fwd(self, xs, lower, upper, delta, bits, signed):
        return self._quantize("ewgs", "ewgs_fwd", None, xs, (lower, upper, delta), 0, 2**bits - 1, bool(signed))[0]

    def ewgs_bwd(self, gs, xs, lower, upper, delta, bits, signed):
        return self._quantize(
            "ewgs", "ewgs_bwd", gs, xs, (lower, upper, delta), 0, 2**bits - 1, bool(signed), None, 2, 2
        )

    def pact_fwd(self, xs, alpha, bits, plus):
        return self._quantize("pact", "pact_fwd", None, xs, (alpha,), 0, 2**bits - 1, False)[0]

    def pact_bwd(self, gs, xs, alpha, bits, plus):
        return self._quantize("pact", "pact_bwd", gs, xs, (alpha,), 0, 2**bits - 1, bool(plus), None, 1, 1)

    def dorefa_fwd(self, xs, scale, bits, detach_max):
        setup, formula = ("mean", "sign_fwd") if bits == 1 else ("dorefa", "dorefa_fwd")
        return self._quantize(setup, formula, None, xs, (scale,), 0, 2**bits - 1, False)[0]

    def dorefa_bwd(self, gs, xs, scale, bits, detach_max):
        if bits == 1 or detach_max:
            setup, formula = ("mean", "sign_bwd") if bits == 1 else ("dorefa", "dorefa_detached")
            return self._quantize(setup, formula, gs, xs, (scale,), 0, 1, False)[0]
        return self._quantize("dorefa", "dorefa_bwd", gs, xs, (scale,), 0, 1, False, None, 2, 0)[0]

    def _quantize(self, op, formula, gs, xs, parameters, low, high, flag, axis=None, sums=0, learned=0):
        """(the results, the gradients of the first `learned` parameters)"""
        kernels, device, dtype = self.quantizers, xs[0].device, xs[0].dtype
        tensors, _ = lists.dense(xs)
        plan = lists.channel_plan(tensors, axis, device)
        grads = () if gs is None else lists.like_weights(gs, tensors)
        made, kind = lists.empty_gradients(xs), self.skeletons.FLAT if xs[0].is_cuda else self.skeletons.TABLE
        parameters = tuple([p.contiguous() for p in parameters])
        partial = torch.empty(plan.chunks * sums, dtype=accumulator(dtype), device=device) if sums else None
        where = _where(tensors, axis, kernels)
        block, unroll = kernels.tile(dtype.itemsize, 1 if gs is None else 2, self.interpreted)
        problem = (
            _table(tensors, device),
            _table(grads, device) if grads else None,
            made[0] if xs[0].is_cuda else lists.device_table(made, device),
            plan.tensors,
            plan.owner,
            parameters,
            partial,
            plan.chunk,
        )
        constants = {
            "TARGET": kind,
            "ALONE": len(xs) == 1,
            "DT": self.dtypes[dtype],
            "ACC": self.dtypes[accumulator(dtype)],
            "ALIGNED": _is_aligned([*tensors, *grads, *made], tensors, axis),
            "BLOCK": block,
            **self.options,
            "enable_fp_fusion": False,
        }
        with self.current(device):
            kernels.quantize_chunks[(plan.chunks,)](
                *problem,
                SETUP=getattr(kernels, op + "_setup"),
                FORMULA=getattr(kernels, formula),
                SUMS=sums,
                LOW=float(low),
                HIGH=float(high),
                FLAG=flag,
                PLACE=where,
                UNROLL=unroll,
                **constants,
            )
            gradients = (
                self._merge(op, plan, tensors, axis, parameters, partial, sums, learned, float(high)) if learned else ()
            )
            if op == "dorefa" and sums:
                kernels.correct_maxima[(plan.chunks,)](*problem, LANES=self.skeletons.MERGE_LANES, **constants)
        return made, *gradients

    def _merge(self, op, plan, tensors, axis, parameters, partial, sums, learned, high):
        gradients = tuple([torch.empty_like(p) for p in parameters[:learned]])
        columns, lanes = (1, self.skeletons.MERGE_LANES) if axis is None else (COLUMNS, LANES)
        most = 1 if axis is None else max([t.shape[axis] for t in tensors])
        self.quantizers.merge_columns[(plan.count, -(-most // columns))](
            partial,
            plan.tensors,
            parameters,
            gradients,
            plan.chunk,
            FINISH=getattr(self.quantizers, op + "_finish"),
            SUMS=sums,
            HIGH=high,
            COLUMNS=columns,
            LANES=lanes,
            **self.options,
        )
        return gradients


def _table(tensors, device):
    """A list of one is its own address: no table is copied to the device for activations, which lie elsewhere at every call."""
    return tensors[0] if len(tensors) == 1 else lists.device_table(tensors, device)


def _where(tensors, axis, kernels):
    """How the rows of a channel lie."""
    if axis is None:
        return kernels.WHOLE
    if all([t.shape[axis] == 1 or t.stride(axis) * t.shape[axis] == t.numel() for t in tensors]):
        return kernels.RUNS
    return kernels.SPREAD if max([t.numel() for t in tensors]) < 2**31 else kernels.HUGE


def _is_aligned(everything, tensors, axis):
    """Whether every chunk of dense rows begins on a 128-bit boundary."""
    whole = axis is None or all([t.shape[axis] == 1 or t.stride(axis) * t.element_size() % 16 == 0 for t in tensors])
    return whole and lists.is_aligned(everything)
