"""Launchers of bin_reg, msqe, partial_l2 and of several regularizers from one read."""

import torch

from ... import lists
from ...contract import TERMS, accumulator, tensors_of_term

SAVED = {
    "l_inf": 2,
    "margin": 1,
    "soft_min_max": 8,
    "kure": 4,
    "msqe": 1,
    "partial_l2": 1,
}  # numbers saved for each tensor; of bin_reg 2^bits
PARTIAL = 8  # numbers in a chunk's partial state; of bin_reg a count and a sum for each bin
LEARNED = ("margin", "soft_min_max", "msqe")
_CODE = {name: i for i, name in enumerate(TERMS)}


class Regularizers:
    """Mixin of `Native`: its `_list`, `_target` and `_queue` are used here."""

    def bin_reg_fwd(self, weights, step, bits):
        return self._one("bin_reg", weights, step, bits)

    def bin_reg_bwd(self, grad, weights, step, saved, bits, out=None):
        return self.terms_bwd([grad], weights, ["bin_reg"], [step], [bits], None, [saved], out)[0]

    def msqe_fwd(self, weights, step, bits):
        return self._one("msqe", weights, step, bits)

    def msqe_bwd(self, grad, weights, step, saved, bits, out=None):
        gradients, (g_step,) = self.terms_bwd([grad], weights, ["msqe"], [step], [bits], None, [saved], out)
        return gradients, g_step

    def partial_l2_fwd(self, weights, rank):
        return self._one("partial_l2", weights, rank)

    def partial_l2_bwd(self, grad, weights, rank, saved, out=None):
        return self.terms_bwd([grad], weights, ["partial_l2"], [rank], [0], None, [saved], out)[0]

    def _one(self, name, weights, parameter, bits=0):
        (loss,), (saved,) = self.terms_fwd(weights, [name], [parameter], [bits], [False])
        return loss, saved

    def terms_fwd(self, weights, names, parameters, bits, flags):
        described, plan, alive = self._list(weights, 1, "output", lists.plan if len(names) == 1 else lists.short_plan)
        device, wide = weights[0].device, accumulator(weights[0].dtype)
        terms, losses, states = [], [], []
        for name, (first, second), width, flag in zip(names, _given(names, parameters), bits, flags, strict=True):
            loss, saved = lists.empty_state(weights, 1, 2**width if name == "bin_reg" else SAVED[name])
            if name == "partial_l2":
                self._rank(described, plan, first, saved)
                first = saved
            partial = torch.empty(
                plan.chunks, 2 * 2**width if name == "bin_reg" else PARTIAL, dtype=wide, device=device
            )
            terms.append(
                (
                    _CODE[name],
                    _pointer(first),
                    _pointer(second),
                    flag,
                    partial.data_ptr(),
                    loss.data_ptr(),
                    saved.data_ptr(),
                    width,
                )
            )
            losses.append(loss)
            states.append(saved)
            alive = (*alive, partial)
        self.library.terms_fwd(described, terms, *self._queue(device))
        del alive
        return losses, states

    def _rank(self, described, plan, rank, theta):
        """The rank[t]-th smallest |w| of each tensor into `theta`."""
        scratch = (
            torch.empty(self.library.rank_scratch(plan.count), dtype=torch.uint8, device=theta.device)
            if self.on_gpu
            else None
        )
        rank = rank.contiguous()
        self.library.rank(described, rank.data_ptr(), theta.data_ptr(), _pointer(scratch), *self._queue(theta.device))

    def terms_bwd(self, grads, weights, names, parameters, bits, flags, saved, out=None):
        described, _, alive = self._list(weights, 1, "output")
        gradients, target, table = self._target(weights, 1, "output", out)
        terms, of_parameters = [], []
        for grad, name, (first, second), width, kept in zip(
            grads, names, _given(names, parameters), bits, saved, strict=True
        ):
            learned = None
            if name in LEARNED:
                learned = torch.empty_like(first)
                of_parameters.append(learned)
            if name == "partial_l2":
                first = kept
            terms.append(
                (
                    _CODE[name],
                    grad.data_ptr(),
                    grad.stride(0),
                    _pointer(first),
                    _pointer(second),
                    kept.data_ptr(),
                    _pointer(learned),
                    width,
                )
            )
        self.library.terms_bwd(described, terms, target, out is not None, *self._queue(weights[0].device))
        del alive, table
        return gradients, of_parameters


def _given(names, parameters):
    """(first, second) parameter of each term, None where it has none."""
    at = 0
    for name in names:
        count = tensors_of_term(name)
        yield (*parameters[at : at + count], None, None)[:2]
        at += count


def _pointer(tensor):
    return 0 if tensor is None else tensor.data_ptr()
