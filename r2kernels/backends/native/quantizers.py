"""The quantizers: maps of a list of which every channel is a column; backward they sum as they go."""

import torch

from ... import lists
from ...contract import DOREFA, EWGS, LSQ, PACT
from .. import launchers
from .extension import NO_TABLE, Half, described, pointer


def functions(library):
    """op -> (forward, backward)"""
    return {
        LSQ: (library.lsq_fwd, library.lsq_bwd),
        EWGS: (library.ewgs_fwd, library.ewgs_bwd),
        PACT: (library.pact_fwd, library.pact_bwd),
        DOREFA: (library.dorefa_fwd, library.dorefa_bwd),
    }


class NativeQuantizers(launchers.Quantizers, Half):
    def _quantize(self, op, xs, parameters, bits, flag, axis=None, codes=None):
        return self._run(self.quantizers[op][0], xs, parameters, bits, flag, axis, codes, None, ())

    def _quantize_bwd(self, op, gs, xs, parameters, bits, flag, axis=None, codes=None):
        function = self.quantizers[op][1]
        if op is DOREFA and bits == 1:  # the gradients themselves, lying as the tensors
            lying = lists.like_weights(gs, lists.dense(xs)[0])
            return self._run(function, lying, parameters, bits, flag, axis, codes, None, ()), ()
        # where the others put their gradient of the first parameter, dorefa keeps a sum
        gradients = [torch.empty_like(p) for p in parameters[: max(op.learned, 1)]]
        return self._run(function, xs, parameters, bits, flag, axis, codes, gs, gradients), gradients[: op.learned]

    def _run(self, function, xs, parameters, bits, flag, axis, codes, gs, gradients):
        device = xs[0].device
        tensors, _ = lists.dense(xs)
        plan = lists.channel_plan(tensors, axis, device)
        made, partial = lists.empty_gradients(xs), None
        if gs is not None:
            gs = lists.like_weights(gs, tensors)
            if self.on_gpu:
                sums = self.contract["quantizer_sums"]
                partial = torch.empty(plan.chunks, sums, dtype=torch.float64, device=device)
        table, targets, grads = (*self.tables(tensors, made, *(() if gs is None else (gs,))), NO_TABLE)[:3]
        parameters = [p.contiguous() for p in parameters]
        first, second, third = (*parameters, None, None)[:3]
        low, high = codes or (0, 2**bits - 1)
        first_gradient, second_gradient = (*gradients, None, None)[:2]
        device, queue = self.queue(device)
        function(
            described(self.structs, plan, xs[0].dtype),
            table.address,
            device,
            queue,
            first=pointer(first),
            second=pointer(second),
            third=pointer(third),
            bits=bits,
            low=low,
            high=high,
            flag=flag,
            grads=grads.address,
            partial=pointer(partial),
            target=targets.address,
            first_gradient=pointer(first_gradient),
            second_gradient=pointer(second_gradient),
        )
        return made
