"""Sets of terms, of one or more: a launch that reads the weights and one that merges, and one launch backward.

The forward of bin_reg has these two launches of its own; partial_l2 first looks for its threshold (a launch for each
byte of a weight, and one). kure alone, and weight_stats, are launched by range_losses.py.
"""

import torch

from ... import lists
from ...contract import BIN_REG, BY_NAME, PARTIAL_L2, SOFT_MIN_MAX, numbers_saved, tensors_of_term
from .. import launchers
from . import regularizers_bins_kernels as bins_kernels
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
        made = [lists.empty_state(weights, 1, numbers_saved(name, b)) for name, b in zip(names, bits, strict=True)]
        with current(device):
            for name, width, given, (loss, saved) in zip(names, bits, first, made, strict=True):
                if name == BIN_REG.name:
                    self._bins(tensors, table, plan, given, width, loss, saved)
                elif name == PARTIAL_L2.name:
                    self._threshold(tensors, table, plan, given, saved)
            read = [term for name, *term in zip(names, codes, first, second, made, strict=True) if name != BIN_REG.name]
            if read:
                codes, first, second, given = zip(*read, strict=True)
                losses, saved = zip(*given, strict=True)
                states = torch.empty(
                    len(read) * plan.chunks, skeletons.STATE.value, dtype=losses[0].dtype, device=device
                )
                constants = {**about(dtype, lists.is_aligned(tensors)), **tile(dtype, self.interpreted)}
                reduce = launch(terms_kernels.reduce_terms, TERMS=codes, **constants)
                reduce((plan.chunks,), table, fields(plan), plan.owner, first, saved, states, plan.chunk)
                constants = {"ACC": types(dtype)["ACC"], "LANES": skeletons.MERGE_LANES, **OPTIONS}
                merge = launch(terms_kernels.merge_terms, TERMS=codes, **constants)
                results = first, second, losses, saved, plan.chunk, plan.chunks
                merge((plan.count, len(read)), states, fields(plan), *results)
        return [loss for loss, _ in made], [saved for _, saved in made]

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

    def _bins(self, tensors, table, plan, step, bits, loss, saved):
        """The loss of bin_reg and what it saves: a launch that compares the weights with the bins, and one that
        merges."""
        every, dtype = 2**bits, tensors[0].dtype
        of_program = bins_kernels.bins_of_program(bits, dtype.itemsize)
        parts = every // of_program
        sums = torch.empty(plan.chunks * parts, 2 * of_program + 1, dtype=loss.dtype, device=loss.device)
        lanes = 2048 if self.interpreted else bins_kernels.LANES
        constants = {"BITS": bits, "BINS": of_program, "BLOCK": lanes, "UNROLL": bins_kernels.UNROLL}
        reduce = launch(bins_kernels.sum_bins, **constants, **about(dtype, lists.is_aligned(tensors)))
        reduce((plan.chunks, parts), table, fields(plan), plan.owner, step, sums, plan.chunk)
        constants = {"BINS": of_program, "ALL": every, "ACC": types(dtype)["ACC"], **OPTIONS}
        merge = launch(bins_kernels.merge_bins, LANES=bins_kernels.MERGED // every, **constants)
        merge((plan.count,), sums, fields(plan), loss, saved, plan.chunk)

    def _threshold(self, tensors, table, plan, rank, theta):
        """The |w| of this rank of every tensor, digit by digit, into `theta`."""
        dtype = tensors[0].dtype
        counts = self._count(tensors, table, plan, rank)
        constants = {"PASSES": dtype.itemsize, "DT": types(dtype)["DT"], **OPTIONS}
        store = launch(counts_kernels.store_threshold, **constants)
        store((plan.count,), rank, counts, theta, plan.count)

    def _digits(self, weights, prefix, place, counts):
        tensors, plan = self._list(weights, 1, "output")
        (table,) = self._tables(tensors)
        with current(counts.device):
            count = launch(counts_kernels.count_chunks, PASS=place, **self._counting(tensors))
            given = table, fields(plan), plan.owner, None, prefix, counts, plan.chunk, plan.count
            count((plan.chunks,), *given)

    def _counting(self, tensors):
        """The constants of a histogram's kernel but which digit it is of."""
        block, types_of = 2048 if self.interpreted else COUNTED, types(tensors[0].dtype)
        return {"DT": types_of["DT"], "ALIGNED": lists.is_aligned(tensors), "BLOCK": block, **OPTIONS}

    def _count(self, tensors, table, plan, rank):
        """(bytes of a weight, L, 256): how many weights have each digit."""
        passes, digits = tensors[0].dtype.itemsize, counts_kernels.DIGIT.value
        dtype = torch.int32 if max([t.numel() for t in tensors]) < 2**31 else torch.int64
        counts = torch.zeros(passes, plan.count, digits, dtype=dtype, device=tensors[0].device)
        constants = self._counting(tensors)
        for k in range(passes):
            count = launch(counts_kernels.count_chunks, PASS=k, **constants)
            count((plan.chunks,), table, fields(plan), plan.owner, rank, None, counts, plan.chunk, plan.count)
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
