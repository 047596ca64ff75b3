"""The range losses, kure and weight_stats onto the skeletons: one launch forward and one backward for any list."""

import functools

import torch

from ... import lists
from .. import launchers
from . import range_losses_kernels, regularizers_moments_kernels, skeletons
from .launch import Launch, Launcher, about, current, fields, tile

FORMULAS = {**range_losses_kernels.FORMULAS, **regularizers_moments_kernels.FORMULAS}  # op -> skeletons.Formula


class TritonRangeLosses(Launcher, launchers.RangeLosses):
    def _reduce(self, op, weights, parameters, d, layout, loss, saved, alpha_grad):
        first, second = _two(parameters)
        tensors, plan = self._list(weights, d, layout)
        (table,) = self._tables(tensors)
        dtype, aligned = weights[0].dtype, lists.is_aligned(tensors)
        states = torch.empty(plan.chunks, skeletons.STATE.value, dtype=loss.dtype, device=loss.device)
        kept = loss if saved is None else saved  # weight_stats has no loss: its table is what the merge saves
        results = states, loss, kept, self._counters(plan.count, loss.device)
        with current(loss.device):
            reduce = _reduction(op.name, bool(alpha_grad), dtype, d, aligned, plan.count == 1, self.interpreted)
            reduce((plan.chunks,), table, fields(plan), plan.owner, first, second, *results, plan.chunk, plan.count)

    def _map(self, op, grad, weights, parameters, saved, d, layout, out, needed, learned):
        tensors, plan = self._list(weights, d, layout)
        gradients, add = self._gradients(weights, d, layout, out, needed)
        table, *targets = self._tables(tensors, *(() if gradients is None else (gradients,)))
        target, aligned = (*targets, None)[0], lists.is_aligned([*tensors, *(gradients or ())])
        with current(grad.device):
            map_ = _map(op.name, weights[0].dtype, d, aligned, add, target is None, plan.count == 1, self.interpreted)
            map_(
                (plan.chunks,),
                table,
                target,
                fields(plan),
                plan.owner,
                grad,
                grad.stride(0),
                *_two(parameters),
                saved,
                learned,
                plan.chunk,
            )
        return [None] * plan.count if gradients is None else gradients


# `alone`, `nothing`: these make the kinds of arguments other ones


@functools.cache
def _reduction(op, alpha_grad, dtype, d, aligned, alone, interpreted):
    formula = FORMULAS[op]
    frozen = formula.reduce_frozen is not None and not alpha_grad
    reduce = formula.reduce_frozen if frozen else formula.reduce
    constants = {**about(dtype, aligned), **tile(dtype, interpreted, d), "LANES": skeletons.LAST_LANES}
    return Launch(
        skeletons.reduce_list, True, REDUCE=reduce, MERGE=formula.merge, LOSSES=formula.losses, D=d, **constants
    )


@functools.cache
def _map(op, dtype, d, aligned, add, nothing, alone, interpreted):
    formula = FORMULAS[op]
    constants = {**about(dtype, aligned), **tile(dtype, interpreted, d)}
    return Launch(skeletons.map_chunks, True, SETUP=formula.setup, GRADIENT=formula.gradient, ADD=add, D=d, **constants)


def _two(parameters):
    return (*parameters, None, None)[:2]
