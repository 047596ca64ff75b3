"""The quantizers onto the skeletons by channel: one launch forward, two backward, for a list of any length."""

import functools
import math

import torch
import triton

from ... import lists
from ...contract import DOREFA, EWGS, LSQ, accumulator
from .. import launchers
from . import channel_skeletons
from .launch import OPTIONS, Launcher, about, current, fields, launch, tile
from .quantizers_kernels import QUANTIZERS, correct_maxima
from .skeletons import MERGE_LANES

COLUMNS, LANES = 32, 16  # channels that a program merges, and chunks of each at a time; of one channel MERGE_LANES
SHORT = 1024  # numbers in a channel that shares its program with others


class TritonQuantizers(Launcher, launchers.Quantizers):
    """Codes run from -LOW to HIGH. FLAG: those of LSQ are -1 and 1 alone, or those of EWGS signed; the gradient of
    PACT is that of PACT+."""

    def _quantize(self, op, xs, parameters, bits, flag, axis=None, codes=None):
        low, high = codes or (0, 2**bits - 1)
        flagged = (op is EWGS or (op is LSQ and bits == 1)) and flag
        return self._run(op, None, xs, parameters, bits, flag, axis, LOW=low, HIGH=high, FLAG=flagged)[0]

    def _quantize_bwd(self, op, gs, xs, parameters, bits, flag, axis=None, codes=None):
        low, high = (0, 1) if op is DOREFA else codes or (0, 2**bits - 1)  # one kernel of DoReFa for all bits
        flagged = op is not DOREFA and (op is not LSQ or bits == 1) and flag
        return self._run(op, gs, xs, parameters, bits, flag, axis, LOW=low, HIGH=high, FLAG=flagged)

    def _run(self, op, gs, xs, parameters, bits, flag, axis, LOW, HIGH, FLAG):
        """(the results, the gradients of the learned parameters); `gs` None: forward."""
        quantizer, device, dtype = _quantizer(op, bits, flag), xs[0].device, xs[0].dtype
        tensors, _ = lists.dense(xs)
        grads = () if gs is None else lists.like_weights(gs, tensors)
        made = lists.empty_gradients(xs)
        parameters = tuple([p.contiguous() for p in parameters])
        table, target, *of_grads = self._tables(tensors, made, *((grads,) if grads else ()))
        given = table, (*of_grads, None)[0], target
        sums = 0 if gs is None else quantizer.sums
        learned = tuple([torch.empty_like(p) for p in parameters[: op.learned]]) if sums else ()
        tiles = tile(dtype, self.interpreted, reads=1 if gs is None else 2)
        formula = {
            "SETUP": quantizer.setup,
            "FORMULA": quantizer.fwd if gs is None else quantizer.bwd,
            "SUMS": sums,
            "LOW": float(LOW),
            "HIGH": float(HIGH),
            "FLAG": bool(FLAG),
        }
        everything, each = [*tensors, *grads, *made], _short_channels(tensors, axis)
        aligned = lists.is_aligned(everything) if each else _is_aligned(everything, tensors, axis)
        constants = {**about(dtype, aligned), "enable_fp_fusion": False}
        run = functools.partial(_by_columns, each) if each else _by_chunks
        with current(device):
            run(quantizer.finish, given, tensors, axis, parameters, learned, formula, constants, tiles)
        return made, learned


def _by_columns(each, finish, given, tensors, axis, parameters, learned, formula, constants, tiles):
    """Several channels of `each` numbers to a program, which makes the gradients of their parameters too."""
    width = triton.next_power_of_2(each)
    columns = max(math.prod(tiles.values()) // width, 1)
    plan = lists.column_plan(tensors, axis, columns, tensors[0].device)
    shape = {"COLUMNS": columns, "EACH": each, "WIDTH": width}
    quantize = launch(channel_skeletons.quantize_columns, FINISH=finish, **shape, **formula, **constants)
    quantize((plan.chunks,), *given, fields(plan), plan.owner, parameters, learned)


def _by_chunks(finish, given, tensors, axis, parameters, learned, formula, constants, tiles):
    """A chunk of a channel to a program; what these leave is merged."""
    device, sums = tensors[0].device, formula["SUMS"]
    plan = lists.channel_plan(tensors, axis, device)
    partial = torch.empty(plan.chunks * sums, dtype=accumulator(tensors[0].dtype), device=device) if sums else None
    problem = (*given, fields(plan), plan.owner, parameters, partial, plan.chunk)
    place = _place(tensors, axis)
    launch(channel_skeletons.quantize_chunks, PLACE=place, **formula, **constants, **tiles)((plan.chunks,), *problem)
    if sums and finish:
        columns, lanes = (1, MERGE_LANES) if axis is None else (COLUMNS, LANES)
        most = 1 if axis is None else max([t.shape[axis] for t in tensors])
        shape = {"COLUMNS": columns, "LANES": lanes, "SUMS": sums, "HIGH": formula["HIGH"]}
        merge = launch(channel_skeletons.merge_columns, FINISH=finish, **shape, **OPTIONS)
        merge((plan.count, -(-most // columns)), partial, fields(plan), parameters, learned, plan.chunk)
    elif sums:
        launch(correct_maxima, LANES=MERGE_LANES, BLOCK=tiles["BLOCK"], **constants)((plan.chunks,), *problem)


def _quantizer(op, bits, flag):
    if op is DOREFA and bits == 1:
        return QUANTIZERS["dorefa_sign"]
    return QUANTIZERS["dorefa_detached" if op is DOREFA and flag else op.name]


def _place(tensors, axis):
    """How the rows of a channel lie."""
    if axis is None:
        return channel_skeletons.WHOLE
    if all([t.shape[axis] == 1 or t.stride(axis) * t.shape[axis] == t.numel() for t in tensors]):
        return channel_skeletons.RUNS
    return channel_skeletons.SPREAD if max([t.numel() for t in tensors]) < 2**31 else channel_skeletons.HUGE


def _short_channels(tensors, axis):
    """How many numbers the channels of all tensors have, where they are few and lie one behind the other; else 0."""
    if axis is None:
        return 0
    sizes = {t.numel() // t.shape[axis] for t in tensors}
    each = sizes.pop()
    dense = all([t.stride(axis) == each or t.shape[axis] == 1 for t in tensors])
    return each if dense and not sizes and each <= SHORT else 0


def _is_aligned(everything, tensors, axis):
    """Whether every chunk of dense rows begins on a 128-bit boundary."""
    whole = axis is None or all([t.shape[axis] == 1 or t.stride(axis) * t.element_size() % 16 == 0 for t in tensors])
    return whole and lists.is_aligned(everything)
