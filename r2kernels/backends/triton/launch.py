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
    `uniform`: that the constants tell the kind of all arguments, as those of a kernel under `chunks.jit` do where
    memory is aligned.
    """

    def __init__(self, kernel, uniform=False, **constants):
        self.kernel, self.constants, self.uniform, self.compiled = kernel, constants, uniform, {}
        self.runtime, self.interpreted = triton.knobs.runtime, triton.knobs.runtime.interpret
        parameters = inspect.signature(kernel.fn).parameters.values()
        self.last = tuple([constants[p.name] for p in parameters if p.annotation is tl.constexpr])

    def __call__(self, grid, *arguments):
        if self.interpreted:
            self.kernel[grid](*arguments, **self.constants)
            return
        active = driver.active
        device = active.get_current_device()
        key = device if self.uniform else (device, *[_kind(a) for a in arguments])
        compiled = self.compiled.get(key)
        if compiled is None or self.runtime.launch_enter_hook.calls or self.runtime.launch_exit_hook.calls:
            self.compiled[key] = self.kernel[grid](*arguments, **self.constants)
            return
        stream = active.get_current_stream(device)
        hooks = compiled.packed_metadata, None, None, None  # no metadata for hooks that are not there
        compiled.run(*grid, *(1, 1)[len(grid) - 1 :], stream, compiled.function, *hooks, *arguments, *self.last)


def _kind(argument):
    """All that Triton makes another kernel for. Numbers in tuples are those of `chunks.as_argument`, of one kind."""
    if argument is None or type(argument) is int:
        return argument
    if type(argument) is tuple:
        return tuple([None if type(a) is int else _kind(a) for a in argument])
    return argument.dtype, argument.data_ptr() % 16 == 0


@functools.cache
def launch(kernel, **constants):
    """The `Launch` of a kernel with these constants."""
    return Launch(kernel, **constants)


@functools.cache
def _writer():
    return Launch(chunks.write_words, True, num_warps=1)


class Launcher:
    """On CUDA tensors; in the interpreter on CPU tensors, since that reads the addresses in a table as the host's."""

    def __init__(self, interpreted):
        self.interpreted = interpreted
        self.devices = ("cpu",) if interpreted else ("cuda",)

    def _list(self, weights, d, layout):
        """(tensors as they lie in memory, plan)"""
        tensors, runs = lists.dense(weights, d, layout)
        if d > 1 and max([t.numel() for t in tensors]) >= 2**32:
            raise ValueError("the Triton kernels read columns of fewer than 2^32 elements; choose the backend cuda")
        return tensors, lists.plan(tensors, runs, d, weights[0].device)

    def _tables(self, *groups):
        """For each group of tensors what a kernel is given: the only tensor itself, or a table of their addresses."""
        if len(groups[0]) == 1:
            return [group[0] for group in groups]
        device, count = groups[0][0].device, len(groups[0]) + len(groups[0]) % 2  # each table at a multiple of 16 bytes
        words = []
        for group in groups:
            words += [*map(torch.Tensor.data_ptr, group), *[0] * (count - len(group))]
        if self.interpreted:
            table = torch.tensor(words, dtype=torch.int64, device=device)
        else:
            at_once = chunks.WORDS
            words += [0] * (-len(words) % at_once)
            table = torch.empty(len(words), dtype=torch.int64, device=device)
            numbers = tuple(map(chunks.as_argument, words))
            with current(device):
                for i in range(0, len(words), at_once):
                    _writer()((1,), table, numbers[i : i + at_once], i)
        return [table[i * count : (i + 1) * count] for i in range(len(groups))]

    def _counters(self, count, device):
        """(>= count,) zeros, which kernels leave as zeros: those of a stream, or of a CUDA graph its own."""
        if self.interpreted:
            return torch.zeros(count, dtype=torch.int32, device=device)
        active = driver.active
        stream = active.get_current_stream(active.get_current_device() if device.index is None else device.index)
        return lists.counters(count, device, stream)

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
    return plan.tensors if plan.tensors is not None else _as_arguments(plan.alone)


@functools.lru_cache(maxsize=256)
def _as_arguments(numbers):
    return tuple(map(chunks.as_argument, numbers))


def current(device):
    """Triton launches on the current device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()
