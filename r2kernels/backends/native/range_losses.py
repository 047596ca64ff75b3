"""The range losses: one number for each column from partial states, and a map for the gradient."""

import torch

from ... import lists
from ...contract import L_INF, MARGIN, SOFT_EXTREMA, SOFT_MIN_MAX
from .. import launchers
from .extension import Half, pointer


def functions(library):
    """name of the op -> (forward, backward)"""
    return {
        L_INF.name: (library.l_inf_fwd, library.l_inf_bwd),
        MARGIN.name: (library.margin_fwd, library.margin_bwd),
        SOFT_MIN_MAX.name: (library.soft_min_max_fwd, library.soft_min_max_bwd),
        SOFT_EXTREMA.name: (library.soft_extrema_fwd, library.soft_extrema_bwd),
    }


class NativeRangeLosses(launchers.RangeLosses, Half):
    def _reduce(self, op, weights, parameters, d, layout, loss, saved, alpha_grad):
        listed, plan, tensors = self.listed(weights, d, layout)
        (table,) = self.tables(tensors)
        first, second = (*parameters, None, None)[:2]
        partial = torch.empty(plan.chunks, self.state, dtype=loss.dtype, device=loss.device)
        device, queue = self.queue(loss.device)
        forward, _ = self.losses[op.name]
        forward(
            listed,
            table.address,
            device,
            queue,
            first=pointer(first),
            second=pointer(second),
            flag=alpha_grad,
            partial=partial.data_ptr(),
            out=loss.data_ptr(),
            saved=pointer(saved),
            bits=0,
        )

    def _map(self, op, grad, weights, parameters, saved, d, layout, out, needed, learned):
        listed, _, tensors = self.listed(weights, d, layout)
        first, second = (*parameters, None, None)[:2]
        gradients = lists.empty_gradients(weights, d, layout, needed) if out is None else out
        table, targets = self.tables(tensors, gradients)
        device, queue = self.queue(grad.device)
        _, backward = self.losses[op.name]
        backward(
            listed,
            table.address,
            device,
            queue,
            grad=grad.data_ptr(),
            grad_stride=grad.stride(0) if grad.dim() == 1 else 1,
            first=pointer(first),
            second=pointer(second),
            saved=saved.data_ptr(),
            target=targets.address,
            add=out is not None,
            parameter_gradient=pointer(learned),
            bits=0,
        )
        return gradients
