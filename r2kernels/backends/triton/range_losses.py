"""The range losses, kure and weight_stats onto the skeletons: two launches forward and one backward for any list."""

import torch

from .. import launchers
from . import range_losses_kernels, regularizers_moments_kernels, skeletons
from .launch import OPTIONS, Launcher, current

FORMULAS = {**range_losses_kernels.FORMULAS, **regularizers_moments_kernels.FORMULAS}  # op -> skeletons.Formula


class TritonRangeLosses(Launcher, launchers.RangeLosses):
    def _reduce(self, op, weights, parameters, d, layout, loss, saved, alpha_grad):
        formula, (first, second) = FORMULAS[op.name], _two(parameters)
        frozen = formula.reduce_frozen is not None and not alpha_grad
        tensors, table, plan = self._list(weights, d, layout)
        states = torch.empty(plan.chunks, skeletons.STATE.value, dtype=loss.dtype, device=loss.device)
        dtype = weights[0].dtype
        constants = self._constants(dtype, tensors)
        with current(loss.device):
            skeletons.reduce_chunks[(plan.chunks,)](
                table,
                plan.tensors,
                plan.owner,
                first,
                states,
                plan.chunk,
                REDUCE=formula.reduce_frozen if frozen else formula.reduce,
                D=d,
                **constants,
                **self._tile(dtype, d),
            )
            skeletons.merge_chunks[(plan.count,)](
                states,
                plan.tensors,
                first,
                second,
                loss,
                loss if saved is None else saved,  # weight_stats has no loss: its table is what the merge saves
                plan.chunk,
                MERGE=formula.merge,
                LOSSES=formula.losses,
                ACC=constants["ACC"],
                D=d,
                LANES=skeletons.MERGE_LANES,
                **OPTIONS,
            )

    def _map(self, op, grad, weights, parameters, saved, d, layout, out, learned):
        formula, dtype = FORMULAS[op.name], weights[0].dtype
        tensors, table, plan = self._list(weights, d, layout)
        gradients, targets, target = self._targets(weights, d, layout, out)
        with current(grad.device):
            skeletons.map_chunks[(plan.chunks,)](
                table,
                targets,
                plan.tensors,
                plan.owner,
                grad,
                grad.stride(0),
                *_two(parameters),
                saved,
                learned,
                plan.chunk,
                SETUP=formula.setup,
                GRADIENT=formula.gradient,
                TARGET=target,
                D=d,
                **self._constants(dtype, [*tensors, *gradients]),
                **self._tile(dtype, d),
            )
        return gradients


def _two(parameters):
    return (*parameters, None, None)[:2]
