"""The range losses, kure and weight_stats onto the skeletons: two launches forward and one backward for any list."""

import functools

import torch

from ... import lists
from .. import launchers
from . import range_losses_kernels, regularizers_moments_kernels, skeletons
from .launch import OPTIONS, Launch, Launcher, about, current, fields, tile, types

FORMULAS = {**range_losses_kernels.FORMULAS, **regularizers_moments_kernels.FORMULAS}  # op -> skeletons.Formula


class TritonRangeLosses(Launcher, launchers.RangeLosses):
    def _reduce(self, op, weights, parameters, d, layout, loss, saved, alpha_grad):
        first, second = _two(parameters)
        tensors, plan = self._list(weights, d, layout)
        (table,), of_tensors = self._tables(tensors), fields(plan)
        dtype, aligned = weights[0].dtype, lists.is_aligned(tensors)
        states = torch.empty(plan.chunks, skeletons.STATE.value, dtype=loss.dtype, device=loss.device)
        kept = loss if saved is None else saved  # weight_stats has no loss: its table is what the merge saves
        with current(loss.device):
            reduce = _reduction(op.name, bool(alpha_grad), dtype, d, aligned, self.interpreted)
            reduce((plan.chunks,), table, of_tensors, plan.owner, first, states, plan.chunk)
            merge = _merge(op.name, dtype, d)
            merge((plan.count,), states, of_tensors, first, second, loss, kept, plan.chunk)

    def _map(self, op, grad, weights, parameters, saved, d, layout, out, needed, learned):
        tensors, plan = self._list(weights, d, layout)
        gradients, add = self._gradients(weights, d, layout, out, needed)
        table, *targets = self._tables(tensors, *(() if gradients is None else (gradients,)))
        target, aligned = (*targets, None)[0], lists.is_aligned([*tensors, *(gradients or ())])
        with current(grad.device):
            _map(op.name, weights[0].dtype, d, aligned, add, self.interpreted)(
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


@functools.cache
def _reduction(op, alpha_grad, dtype, d, aligned, interpreted):
    formula = FORMULAS[op]
    frozen = formula.reduce_frozen is not None and not alpha_grad
    reduce = formula.reduce_frozen if frozen else formula.reduce
    constants = {**about(dtype, aligned), **tile(dtype, interpreted, d)}
    return Launch(skeletons.reduce_chunks, REDUCE=reduce, D=d, **constants)


@functools.cache
def _merge(op, dtype, d):
    formula, ACC = FORMULAS[op], types(dtype)["ACC"]
    constants = {"MERGE": formula.merge, "LOSSES": formula.losses, "LANES": skeletons.MERGE_LANES}
    return Launch(skeletons.merge_chunks, ACC=ACC, D=d, **constants, **OPTIONS)


@functools.cache
def _map(op, dtype, d, aligned, add, interpreted):
    formula = FORMULAS[op]
    constants = {**about(dtype, aligned), **tile(dtype, interpreted, d)}
    return Launch(skeletons.map_chunks, SETUP=formula.setup, GRADIENT=formula.gradient, ADD=add, D=d, **constants)


def _two(parameters):
    return (*parameters, None, None)[:2]
