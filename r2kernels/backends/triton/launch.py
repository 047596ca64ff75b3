"""What every launch needs: the list as a table of addresses, where the results go, constants, the device; and a way
around Triton's binder."""

import contextlib
import functools
import inspect

import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver

from ... import lists
from ...contract import accumulator
from . import chunks

DTYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
OPTIONS = {"num_warps": chunks.WARPS, "enable_fp_fusion": True}


class Launch:
    """A kernel with its constants: `launch(grid, *arguments)` is `kernel[grid](*arguments, **constants)`.

    What Triton compiles for arguments of a kind is called directly from then on: its binder takes 10 us a launch.
    """

    def __init__(self, kernel, **constants):
        self.kernel, self.constants, self.compiled = kernel, constants, {}
        parameters = inspect.signature(kernel.fn).parameters.values()
        self.last = tuple([constants[p.name] for p in parameters if p.annotation is tl.constexpr])

    def __call__(self, grid, *arguments):
        if triton.knobs.runtime.interpret:
            self.kernel[grid](*arguments, **self.constants)
            return
        device = driver.active.get_current_device()
        key = (device, *map(_kind, arguments))
        compiled = self.compiled.get(key)
        if compiled is None:
            self.compiled[key] = self.kernel[grid](*arguments, **self.constants)
            return
        x, y, z = (*grid, 1, 1)[:3]
        stream, runtime = driver.active.get_current_stream(device), triton.knobs.runtime
        metadata = compiled.launch_metadata(grid, stream, *arguments, *self.last)
        hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
        call = compiled.function, compiled.packed_metadata, metadata, *hooks
        compiled.run(x, y, z, stream, *call, *arguments, *self.last)


def _kind(argument):
    """All that Triton makes another kernel for. Numbers in tuples are those of `chunks.as_argument`, of one kind."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, tuple):
        return tuple([None if isinstance(a, int) else _kind(a) for a in argument])
    return argument


@functools.cache
def launch(kernel, **constants):
    """The `Launch` of a kernel with these constants."""
    return Launch(kernel, **constants)


class Launcher:
    """On CUDA tensors; in the interpreter on CPU tensors, since that reads the addresses in a table as the host's."""

    def __init__(self, interpreted):
        self.interpreted = interpreted
        self.devices = ("cpu",) if interpreted else ("cuda",)

    def _list(self, weights, d, layout):
        """(tensors as they lie in memory, plan)"""
        tensors, runs = lists.dense(weights, d, layout)
        return tensors, lists.plan(tensors, runs, d, weights[0].device)

    def _tables(self, *groups):
        """For each group of tensors what a kernel is given: the only tensor itself, or a table of their addresses."""
        if len(groups[0]) == 1:
            return [group[0] for group in groups]
        count, device = len(groups[0]), groups[0][0].device
        words = [t.data_ptr() for group in groups for t in group]
        if self.interpreted:
            table = torch.tensor(words, dtype=torch.int64, device=device)
        else:
            at_once = chunks.WORDS
            words += [0] * (-len(words) % at_once)
            table = torch.empty(len(words), dtype=torch.int64, device=device)
            write = launch(chunks.write_words, num_warps=1)
            with current(device):
                for i in range(0, len(words), at_once):
                    write((1,), table, tuple(map(chunks.as_argument, words[i : i + at_once])), i)
        return [table[i * count : (i + 1) * count] for i in range(len(groups))]

    def _gradients(self, weights, d, layout, out, needed):
        """(the gradients, or None where none is needed; whether they are added to)"""
        if out is not None:
            return out, True
        if needed is not None and not any(needed):
            return None, False
        return lists.empty_gradients(weights, d, layout), False


@functools.cache
def about(dtype, aligned):
    """The constants that all kernels over the rows of tensors take."""
    return {**types(dtype), "ALIGNED": aligned, **OPTIONS}


@functools.cache
def tile(dtype, interpreted, d=1, reads=1):
    block, unroll = chunks.tile_of_rows(dtype.itemsize, d, reads, interpreted)
    return {"BLOCK": block, "UNROLL": unroll}


def types(dtype):
    return {"DT": DTYPES[dtype], "ACC": DTYPES[accumulator(dtype)]}


def fields(plan):
    """Of the tensors of a plan, as a kernel is given them."""
    return plan.tensors if plan.tensors is not None else tuple(map(chunks.as_argument, plan.alone))


def current(device):
    """Triton launches on the current device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()
