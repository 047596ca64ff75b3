"""Launchers of the regularizers onto the Triton kernels: all terms by one launch that reads the weights and one that merges, and one launch backward.

bin_reg counts beforehand (one launch more), partial_l2 looks for its threshold (a launch for each byte of a weight, and one).
"""

import torch

from ... import lists
from ...contract import accumulator, tensors_of_term

SAVED = {"l_inf": 2, "margin": 1, "soft_min_max": 8, "kure": 4, "msqe": 1, "partial_l2": 1}  # bin_reg: 2^bits
LEARNED = ("margin", "soft_min_max", "msqe")
KEYS = ("l_inf", "margin", "soft_min_max", "frozen", "kure", "bin_reg", "msqe", "partial_l2")
COUNTED = 1024  # weights of a histogram at once


class Regularizers:
    """The regularizers' ops; `out`: the gradients are added to these tensors."""

    def bin_reg_fwd(self, weights, step, bits):
        return self._term_fwd("bin_reg", weights, step, bits)

    def bin_reg_bwd(self, grad, weights, step, saved, bits, out=None):
        return self.terms_bwd([grad], weights, ["bin_reg"], [step], [bits], [False], [saved], out)[0]

    def msqe_fwd(self, weights, step, bits):
        return self._term_fwd("msqe", weights, step, bits)

    def msqe_bwd(self, grad, weights, step, saved, bits, out=None):
        gradients, (g_step,) = self.terms_bwd([grad], weights, ["msqe"], [step], [bits], [False], [saved], out)
        return gradients, g_step

    def partial_l2_fwd(self, weights, rank):
        return self._term_fwd("partial_l2", weights, rank, 0)

    def partial_l2_bwd(self, grad, weights, rank, saved, out=None):
        return self.terms_bwd([grad], weights, ["partial_l2"], [rank], [0], [False], [saved], out)[0]

    def _term_fwd(self, name, weights, parameter, bits):
        (loss,), (saved,) = self.terms_fwd(weights, [name], [parameter], [bits], [False])
        return loss, saved

    def terms_fwd(self, weights, names, parameters, bits, flags):
        tensors, table, plan = self._list(weights, 1, "output")
        device, wide = weights[0].device, accumulator(weights[0].dtype)
        codes, first, second = self._terms(names, parameters, bits, flags)
        losses = tuple([torch.empty(plan.count, dtype=wide, device=device) for _ in names])
        saved = tuple(
            [
                torch.empty(plan.count, 1, SAVED.get(name, 2**b), dtype=wide, device=device)
                for name, b in zip(names, bits, strict=True)
            ]
        )
        states = torch.empty(len(names) * plan.chunks, self.skeletons.STATE.value, dtype=wide, device=device)
        constants = self._constants(weights[0].dtype, 1, tensors)
        del constants["D"]
        with self.current(device):
            for name, width, given, kept in zip(names, bits, first, saved, strict=True):
                if name == "bin_reg":
                    kept.view(plan.count, -1).copy_(self._count(tensors, table, plan, given, BITS=width, PASS=None)[0])
                elif name == "partial_l2":
                    passes = weights[0].element_size()
                    counts = self._count(tensors, table, plan, given, BITS=0, PASS=passes)
                    self.regularizers.store_threshold[(plan.count,)](
                        given, counts, kept, plan.count, PASSES=passes, DT=constants["DT"], **self.options
                    )
            self.regularizers.reduce_terms[(plan.chunks,)](
                table, plan.tensors, plan.owner, first, saved, states, plan.chunk, TERMS=codes, **constants
            )
            self.regularizers.merge_terms[(plan.count, len(names))](
                states,
                plan.tensors,
                first,
                second,
                losses,
                saved,
                plan.chunk,
                plan.chunks,
                TERMS=codes,
                ACC=constants["ACC"],
                LANES=self.skeletons.MERGE_LANES,
                **self.options,
            )
        return list(losses), list(saved)

    def terms_bwd(self, grads, weights, names, parameters, bits, flags, saved, out=None):
        tensors, table, plan = self._list(weights, 1, "output")
        codes, first, second = self._terms(names, parameters, bits, flags)
        gradients = lists.empty_gradients(weights) if out is None else out
        flat = out is None and weights[0].is_cuda
        targets = gradients[0] if flat else lists.device_table(gradients, weights[0].device)
        target = self.skeletons.FLAT if flat else self.skeletons.TABLE if out is None else self.skeletons.ADD
        of_parameters = tuple(
            [torch.empty_like(p) if name in LEARNED else None for name, p in zip(names, first, strict=True)]
        )
        constants = self._constants(weights[0].dtype, 1, [*tensors, *gradients])
        del constants["D"]
        with self.current(weights[0].device):
            self.regularizers.map_terms[(plan.chunks,)](
                table,
                targets,
                plan.tensors,
                plan.owner,
                tuple([g.contiguous() for g in grads]),
                first,
                second,
                tuple(saved),
                of_parameters,
                plan.chunk,
                TERMS=codes,
                TARGET=target,
                **constants,
            )
        return gradients, [g for g in of_parameters if g is not None]

    def _terms(self, names, parameters, bits, flags):
        """(the terms as numbers, the first parameter of each or None, the second or None)"""
        codes, first, second, at, lanes = [], [], [], 0, 0
        for name, width, flag in zip(names, bits, flags, strict=True):
            term = KEYS.index("frozen" if name == "soft_min_max" and not flag else name)
            codes.append(self.regularizers.encode(term, width, lanes))
            given = [p.contiguous() for p in parameters[at : at + tensors_of_term(name)]] + [None, None]
            first.append(given[0])
            second.append(given[1])
            at, lanes = at + tensors_of_term(name), lanes + self.regularizers.LANES_OF[term]
        return tuple(codes), tuple(first), tuple(second)

    def _count(self, tensors, table, plan, given, BITS, PASS):
        """(passes, L, bins): what count_chunks has found; of the bins in one pass"""
        bins = 2**BITS if PASS is None else self.regularizers.DIGIT.value
        dtype = torch.int32 if max([t.numel() for t in tensors]) < 2**31 else torch.int64
        counts = torch.zeros(PASS or 1, plan.count, bins, dtype=dtype, device=tensors[0].device)
        constants = self._constants(tensors[0].dtype, 1, tensors)
        for name in ("D", "UNROLL", "BLOCK"):
            del constants[name]
        for k in (None,) if PASS is None else range(PASS):
            self.regularizers.count_chunks[(plan.chunks,)](
                table,
                plan.tensors,
                plan.owner,
                given,
                counts,
                plan.chunk,
                plan.count,
                BITS=BITS,
                PASS=k,
                BINS=bins,
                BLOCK=2048 if self.interpreted else COUNTED,
                **constants,
            )
        return counts
