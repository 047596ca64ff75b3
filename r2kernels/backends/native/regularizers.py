"""The regularizers: kure and weight_stats by the skeletons of the range losses, the others as terms, of which several
are made from one read of the weights."""

import torch

from ... import lists
from ...contract import (
    BIN_REG,
    BY_NAME,
    KURE,
    PARTIAL_L2,
    TERMS,
    WEIGHT_STATS,
    accumulator,
    numbers_saved,
    tensors_of_term,
)
from .. import launchers
from .extension import Half, pointer

_CODE = {name: i for i, name in enumerate(TERMS)}


def functions(library):
    """name of the op -> (forward, backward)"""
    return {KURE.name: (library.kure_fwd, library.kure_bwd), WEIGHT_STATS.name: (library.weight_stats_fwd, None)}


class NativeRegularizers(launchers.Regularizers, Half):
    def terms_fwd(self, weights, names, parameters, bits, flags):
        plan_of = lists.plan if len(names) == 1 else lists.short_plan
        listed, plan, tensors = self.listed(weights, 1, "output", plan_of)
        (table,) = self.tables(tensors)
        device, wide = weights[0].device, accumulator(weights[0].dtype)
        arguments, losses, states, partials = [], [], [], []
        for name, (first, second), width, flag in zip(names, _given(names, parameters), bits, flags, strict=True):
            loss, saved = lists.empty_state(weights, 1, numbers_saved(name, width))
            if name == PARTIAL_L2.name:
                self._rank(listed, table, plan, first, saved)
                first = saved
            # of bin_reg a count and a sum for each bin, and the unit of the sums
            size = 2 * 2**width + 1 if name == BIN_REG.name else self.state
            partials.append(torch.empty(plan.chunks, size, dtype=wide, device=device))
            arguments.append(
                self.structs.Forward(
                    first=pointer(first),
                    second=pointer(second),
                    flag=flag,
                    partial=partials[-1].data_ptr(),
                    out=loss.data_ptr(),
                    saved=saved.data_ptr(),
                    bits=width,
                )
            )
            losses.append(loss)
            states.append(saved)
        codes = [_CODE[name] for name in names]
        self.library.terms_fwd(listed, table.address, *self.queue(device), term=codes, of=arguments)
        return losses, states

    def _sampled_std(self, weights, out):
        listed, _, tensors = self.listed(weights, 1, "output")
        (table,) = self.tables(tensors)
        nothing = dict(first=0, second=0, flag=False, partial=0, saved=0, bits=0)
        self.library.sampled_std_fwd(listed, table.address, *self.queue(out.device), out=out.data_ptr(), **nothing)

    def _digits(self, weights, prefix, place, counts):
        listed, _, tensors = self.listed(weights, 1, "output")
        (table,) = self.tables(tensors)
        queue = self.queue(counts.device)
        self.library.digits_fwd(
            listed, table.address, *queue, prefix=prefix.data_ptr(), place=place, counts=counts.data_ptr()
        )

    def _rank(self, listed, table, plan, rank, theta):
        """The rank[t]-th smallest |w| of each tensor into `theta`."""
        scratch = None
        if self.on_gpu:
            scratch = torch.empty(self.library.rank_scratch(plan.count), dtype=torch.uint8, device=theta.device)
        rank = rank.contiguous()
        self.library.rank(
            listed,
            table.address,
            *self.queue(theta.device),
            rank=rank.data_ptr(),
            theta=theta.data_ptr(),
            scratch=pointer(scratch),
        )

    def terms_bwd(self, grads, weights, names, parameters, bits, flags, saved, out=None, needed=None):
        listed, _, tensors = self.listed(weights, 1, "output")
        gradients = lists.empty_gradients(weights, needed=needed) if out is None else out
        table, targets = self.tables(tensors, gradients)
        arguments, of_parameters = [], []
        for grad, name, (first, second), width, kept in zip(
            grads, names, _given(names, parameters), bits, saved, strict=True
        ):
            learned = None
            if BY_NAME[name].learned:
                learned = torch.empty_like(first)
                of_parameters.append(learned)
            arguments.append(
                self.structs.Backward(
                    grad=grad.data_ptr(),
                    grad_stride=grad.stride(0),
                    first=pointer(kept if name == PARTIAL_L2.name else first),
                    second=pointer(second),
                    saved=kept.data_ptr(),
                    target=targets.address,
                    add=out is not None,
                    parameter_gradient=pointer(learned),
                    bits=width,
                )
            )
        codes = [_CODE[name] for name in names]
        self.library.terms_bwd(listed, table.address, *self.queue(weights[0].device), term=codes, of=arguments)
        return gradients, of_parameters


def _given(names, parameters):
    """(first, second) parameter of each term, None where it has none."""
    at = 0
    for name in names:
        count = tensors_of_term(name)
        yield (*parameters[at : at + count], None, None)[:2]
        at += count
