"""Sets of terms, of one or more: a launch that reads the weights and one that merges, and one launch backward.

bin_reg counts beforehand (one launch more), partial_l2 looks for its threshold (a launch for each byte of a weight, and
one). kure alone, and weight_stats, are launched by range_losses.py.
"""

import torch

from ... import lists
from ...contract import BIN_REG, BY_NAME, PARTIAL_L2, SOFT_MIN_MAX, tensors_of_term
from .. import launchers
from . import regularizers_counts_kernels as counts_kernels
from . import regularizers_sample_kernels as sample_kernels
from . import regularizers_terms_kernels as terms_kernels
from . import skeletons
from .launch import OPTIONS, Launcher, about, current, fields, launch, tile, types

COUNTED = 1024  # weights of a histogram at once


class TritonRegularizers(Launcher, launchers.Regularizers):
    def terms_fwd(self, weights, names, parameters, bits, flags):
        tensors, plan = self._list(weights, 1, "output")
        (table,) = self._tables(tensors)
        device, dtype = weights[0].device, weights[0].dtype
        codes, first, second = _terms(names, parameters, bits, flags)
        fixed = [BY_NAME[name].saved for name in names]
        numbers = [2**b if n is None else n for n, b in zip(fixed, bits, strict=True)]
        losses, saved = zip(*[lists.empty_state(weights, 1, n) for n in numbers], strict=True)
        states = torch.empty(len(names) * plan.chunks, skeletons.STATE.value, dtype=losses[0].dtype, device=device)
        with current(device):
            for name, width, given, kept in zip(names, bits, first, saved, strict=True):
                if name == BIN_REG.name:
                    kept.view(plan.count, -1).copy_(self._count(tensors, table, plan, given, BITS=width)[0])
                elif name == PARTIAL_L2.name:
                    self._threshold(tensors, table, plan, given, kept)
            constants = {**about(dtype, lists.is_aligned(tensors)), **tile(dtype, self.interpreted)}
            reduce = launch(terms_kernels.reduce_terms, TERMS=codes, **constants)
            reduce((plan.chunks,), table, fields(plan), plan.owner, first, saved, states, plan.chunk)
            constants = {"ACC": types(dtype)["ACC"], "LANES": skeletons.MERGE_LANES, **OPTIONS}
            merge = launch(terms_kernels.merge_terms, TERMS=codes, **constants)
            given = first, second, losses, saved, plan.chunk, plan.chunks
            merge((plan.count, len(names)), states, fields(plan), *given)
        return list(losses), list(saved)

    def terms_bwd(self, grads, weights, names, parameters, bits, flags, saved, out=None, needed=None):
        tensors, plan = self._list(weights, 1, "output")
        codes, first, second = _terms(names, parameters, bits, flags)
        gradients, add = self._gradients(weights, 1, "output", out, needed)
        table, *targets = self._tables(tensors, *(() if gradients is None else (gradients,)))
        aligned = lists.is_aligned([*tensors, *(gradients or ())])
        learned = tuple(
            [torch.empty_like(p) if BY_NAME[name].learned else None for name, p in zip(names, first, strict=True)]
        )
        dtype = weights[0].dtype
        constants = {**about(dtype, aligned), **tile(dtype, self.interpreted)}
        with current(weights[0].device):
            launch(terms_kernels.map_terms, TERMS=codes, ADD=add, **constants)(
                (plan.chunks,),
                table,
                (*targets, None)[0],
                fields(plan),
                plan.owner,
                tuple([g.contiguous() for g in grads]),
                first,
                second,
                tuple(saved),
                learned,
                plan.chunk,
            )
        return [None] * plan.count if gradients is None else gradients, [g for g in learned if g is not None]

    def _sampled_std(self, weights, out):
        tensors, plan = self._list(weights, 1, "output")
        (table,) = self._tables(tensors)
        constants = about(weights[0].dtype, lists.is_aligned(tensors))
        with current(out.device):
            sample = launch(sample_kernels.std_of_sample, BLOCK=COUNTED, **constants)
            sample((plan.count,), table, fields(plan), out)

    def _threshold(self, tensors, table, plan, rank, theta):
        """The |w| of this rank of every tensor, digit by digit, into `theta`."""
        dtype = tensors[0].dtype
        counts = self._count(tensors, table, plan, rank, PASSES=dtype.itemsize)
        constants = {"PASSES": dtype.itemsize, "DT": types(dtype)["DT"], **OPTIONS}
        store = launch(counts_kernels.store_threshold, **constants)
        store((plan.count,), rank, counts, theta, plan.count)

    def _count(self, tensors, table, plan, given, BITS=0, PASSES=None):
        """(passes, L, bins): how many weights are in each of 2^BITS bins of a step; with PASSES, have each digit."""
        bins = 2**BITS if PASSES is None else counts_kernels.DIGIT.value
        dtype = torch.int32 if max([t.numel() for t in tensors]) < 2**31 else torch.int64
        counts = torch.zeros(PASSES or 1, plan.count, bins, dtype=dtype, device=tensors[0].device)
        constants = about(tensors[0].dtype, lists.is_aligned(tensors))
        block = 2048 if self.interpreted else COUNTED
        for k in (None,) if PASSES is None else range(PASSES):
            count = launch(counts_kernels.count_chunks, BITS=BITS, PASS=k, BINS=bins, BLOCK=block, **constants)
            count((plan.chunks,), table, fields(plan), plan.owner, given, counts, plan.chunk, plan.count)
        return counts


def _terms(names, parameters, bits, flags):
    """(the terms as numbers, the first parameter of each or None, the second or None)"""
    first, second, at = [], [], 0
    for name in names:
        given = [p.contiguous() for p in parameters[at : at + tensors_of_term(name)]] + [None, None]
        first.append(given[0])
        second.append(given[1])
        at += tensors_of_term(name)
    keys = [
        "frozen" if name == SOFT_MIN_MAX.name and not flag else name for name, flag in zip(names, flags, strict=True)
    ]
    return terms_kernels.encode(keys, bits), tuple(first), tuple(second)
