"""What every launch needs: the list as a table of addresses, where the results go, constants, and the device."""

import contextlib

import torch
import triton.language as tl

from ... import lists
from ...contract import accumulator
from . import chunks

DTYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
OPTIONS = {"num_warps": chunks.WARPS, "enable_fp_fusion": True}


class Launcher:
    """On CUDA tensors; in the interpreter on CPU tensors, since that reads the addresses in a table as the host's."""

    def __init__(self, interpreted):
        self.interpreted = interpreted
        self.devices = ("cpu",) if interpreted else ("cuda",)

    def _list(self, weights, d, layout):
        """(tensors as they lie in memory, table of their addresses, plan)"""
        device = weights[0].device
        tensors, runs = lists.dense(weights, d, layout)
        return tensors, lists.device_table(tensors, device), lists.plan(tensors, runs, d, device)

    def _targets(self, weights, d=1, layout="output", out=None):
        """(the results, which lie as gradients of the weights do; what a kernel is given for them; TARGET)"""
        if out is not None:
            return out, lists.device_table(out, weights[0].device), chunks.ADD
        made = lists.empty_gradients(weights, d, layout)
        if weights[0].is_cuda:
            return made, made[0], chunks.FLAT
        return made, lists.device_table(made, weights[0].device), chunks.TABLE

    def _constants(self, dtype, tensors):
        """`tensors`: all that are read or written by rows."""
        return {**types(dtype), "ALIGNED": lists.is_aligned(tensors), **OPTIONS}

    def _tile(self, dtype, d=1, reads=1):
        block, unroll = chunks.tile_of_rows(dtype.itemsize, d, reads, self.interpreted)
        return {"BLOCK": block, "UNROLL": unroll}


def types(dtype):
    return {"DT": DTYPES[dtype], "ACC": DTYPES[accumulator(dtype)]}


def current(device):
    """Triton launches on the current device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()
