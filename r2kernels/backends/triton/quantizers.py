"""The quantizers onto the skeletons by channel: one launch forward, two backward, for a list of any length."""

import torch

from ... import lists
from ...contract import DOREFA, EWGS, LSQ, accumulator
from .. import launchers
from . import channel_skeletons
from .launch import OPTIONS, Launcher, current, types
from .quantizers_kernels import QUANTIZERS, correct_maxima
from .skeletons import MERGE_LANES

COLUMNS, LANES = 32, 16  # channels that a program merges, and chunks of each at a time; of one channel MERGE_LANES


class TritonQuantizers(Launcher, launchers.Quantizers):
    """Codes run from -LOW to HIGH. FLAG: those of LSQ are -1 and 1 alone, or those of EWGS signed; the gradient of
    PACT is that of PACT+."""

    def _quantize(self, op, xs, parameters, bits, flag, axis=None, codes=None):
        low, high = codes or (0, 2**bits - 1)
        flagged = (op is EWGS or (op is LSQ and bits == 1)) and flag
        return self._run(op, None, xs, parameters, bits, flag, axis, LOW=low, HIGH=high, FLAG=flagged)[0]

    def _quantize_bwd(self, op, gs, xs, parameters, bits, flag, axis=None, codes=None):
        low, high = (0, 1) if op is DOREFA else codes or (0, 2**bits - 1)  # one kernel of DoReFa for all bits
        flagged = op is not DOREFA and (op is not LSQ or bits == 1) and flag
        return self._run(op, gs, xs, parameters, bits, flag, axis, LOW=low, HIGH=high, FLAG=flagged)

    def _run(self, op, gs, xs, parameters, bits, flag, axis, LOW, HIGH, FLAG):
        """(the results, the gradients of the learned parameters); `gs` None: forward."""
        quantizer, device, dtype = _quantizer(op, bits, flag), xs[0].device, xs[0].dtype
        tensors, _ = lists.dense(xs)
        plan = lists.channel_plan(tensors, axis, device)
        grads = () if gs is None else lists.like_weights(gs, tensors)
        made, targets, target = self._targets(xs)
        parameters = tuple([p.contiguous() for p in parameters])
        sums = 0 if gs is None else quantizer.sums
        partial = torch.empty(plan.chunks * sums, dtype=accumulator(dtype), device=device) if sums else None
        tile = self._tile(dtype, reads=1 if gs is None else 2)
        problem = (
            _table(tensors, device),
            _table(grads, device) if grads else None,
            targets,
            plan.tensors,
            plan.owner,
            parameters,
            partial,
            plan.chunk,
        )
        constants = {
            **types(dtype),
            "TARGET": target,
            "ALONE": len(xs) == 1,
            "ALIGNED": _is_aligned([*tensors, *grads, *made], tensors, axis),
            **OPTIONS,
            "enable_fp_fusion": False,
        }
        gradients = ()
        with current(device):
            channel_skeletons.quantize_chunks[(plan.chunks,)](
                *problem,
                SETUP=quantizer.setup,
                FORMULA=quantizer.fwd if gs is None else quantizer.bwd,
                SUMS=sums,
                LOW=float(LOW),
                HIGH=float(HIGH),
                FLAG=bool(FLAG),
                PLACE=_place(tensors, axis),
                **constants,
                **tile,
            )
            if sums and quantizer.finish:
                gradients = tuple([torch.empty_like(p) for p in parameters[: op.learned]])
                columns, lanes = (1, MERGE_LANES) if axis is None else (COLUMNS, LANES)
                most = 1 if axis is None else max([t.shape[axis] for t in tensors])
                channel_skeletons.merge_columns[(plan.count, -(-most // columns))](
                    partial,
                    plan.tensors,
                    parameters,
                    gradients,
                    plan.chunk,
                    FINISH=quantizer.finish,
                    SUMS=sums,
                    HIGH=float(HIGH),
                    COLUMNS=columns,
                    LANES=lanes,
                    **OPTIONS,
                )
            elif sums:
                correct_maxima[(plan.chunks,)](*problem, LANES=MERGE_LANES, BLOCK=tile["BLOCK"], **constants)
        return made, gradients


def _quantizer(op, bits, flag):
    if op is DOREFA and bits == 1:
        return QUANTIZERS["dorefa_sign"]
    return QUANTIZERS["dorefa_detached" if op is DOREFA and flag else op.name]


def _table(tensors, device):
    """A list of one is its own address: no table is copied to the device for activations, which lie elsewhere at every
    call."""
    return tensors[0] if len(tensors) == 1 else lists.device_table(tensors, device)


def _place(tensors, axis):
    """How the rows of a channel lie."""
    if axis is None:
        return channel_skeletons.WHOLE
    if all([t.shape[axis] == 1 or t.stride(axis) * t.shape[axis] == t.numel() for t in tensors]):
        return channel_skeletons.RUNS
    return channel_skeletons.SPREAD if max([t.numel() for t in tensors]) < 2**31 else channel_skeletons.HUGE


def _is_aligned(everything, tensors, axis):
    """Whether every chunk of dense rows begins on a 128-bit boundary."""
    whole = axis is None or all([t.shape[axis] == 1 or t.stride(axis) * t.element_size() % 16 == 0 for t in tensors])
    return whole and lists.is_aligned(everything)
