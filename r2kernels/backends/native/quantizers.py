"""Launchers of the quantizers onto the extension."""

import torch

from ... import lists

SUMS = 2  # numbers in a chunk's partial state


class Quantizers:
    """LSQ, EWGS, PACT and DoReFa of `reference.quantizers`, for Native."""

    def _quantizer(self, op, xs, parameters, bits, flag, axis=None, gs=None, learned=0):
        """(memory of the results as `lists.empty_gradients` has it, gradients of the first `learned` parameters)"""
        device = xs[0].device
        tensors, _ = lists.dense(xs)
        plan = lists.channel_plan(tensors, axis, device)
        parameters = [p.contiguous() for p in parameters]
        made, gradients, partial = lists.empty_gradients(xs), [torch.empty_like(p) for p in parameters[:learned]], None
        if gs is not None:
            gs = lists.like_weights(gs, tensors)
            if self.on_gpu:
                partial = torch.empty(plan.chunks, SUMS, dtype=torch.float64, device=device)
        tables = [
            None if ts is None else lists.device_table(ts, device) if self.on_gpu else lists.host_table(ts)
            for ts in (tensors, gs, None if self.on_gpu else made)
        ]
        of_tensors, of_grads, target = map(_address, tables)
        described = (
            of_tensors,
            plan.tensors.data_ptr(),
            plan.owner.data_ptr(),
            plan.count,
            plan.chunks,
            plan.chunk,
            plan.d,
            self.code_of(xs[0].dtype),
        )
        passed = (
            *_addresses(parameters, 3),
            bits,
            flag,
            of_grads,
            _address(partial),
            made[0].data_ptr() if self.on_gpu else target,
            *_addresses(gradients, 2),
        )
        getattr(self.library, op)(described, passed, *self._queue(device))
        return made, gradients

    def lsq_fwd(self, xs, step, bits, signed, axis):
        return self._quantizer("lsq_fwd", xs, [step], bits, signed, axis)[0]

    def lsq_bwd(self, gs, xs, step, bits, signed, axis):
        made, (g_step,) = self._quantizer("lsq_bwd", xs, [step], bits, signed, axis, gs, 1)
        return made, g_step

    def ewgs_fwd(self, xs, lower, upper, delta, bits, signed):
        return self._quantizer("ewgs_fwd", xs, [lower, upper, delta], bits, signed)[0]

    def ewgs_bwd(self, gs, xs, lower, upper, delta, bits, signed):
        made, (g_lower, g_upper) = self._quantizer("ewgs_bwd", xs, [lower, upper, delta], bits, signed, None, gs, 2)
        return made, g_lower, g_upper

    def pact_fwd(self, xs, alpha, bits, plus):
        return self._quantizer("pact_fwd", xs, [alpha], bits, plus)[0]

    def pact_bwd(self, gs, xs, alpha, bits, plus):
        made, (g_alpha,) = self._quantizer("pact_bwd", xs, [alpha], bits, plus, None, gs, 1)
        return made, g_alpha

    def dorefa_fwd(self, xs, scale, bits, detach_max):
        return self._quantizer("dorefa_fwd", xs, [scale], bits, detach_max)[0]

    def dorefa_bwd(self, gs, xs, scale, bits, detach_max):
        if bits == 1:  # the gradients themselves, lying as the tensors
            return self._quantizer("dorefa_bwd", lists.like_weights(gs, lists.dense(xs)[0]), [scale], bits, detach_max)[
                0
            ]
        return self._quantizer("dorefa_bwd", xs, [scale], bits, detach_max, None, gs, 1)[0]


def _addresses(tensors, count):
    return [t.data_ptr() for t in tensors] + [0] * (count - len(tensors))


def _address(table):
    return 0 if table is None else table.data_ptr() if isinstance(table, torch.Tensor) else table.buffer_info()[0]
