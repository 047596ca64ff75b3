"""The only caller of `_C`: its two halves, what describes a list of tensors to them, addresses, and where a call runs.

Every op of a half is called as (list, table of its tensors' addresses, device, queue), and by name what csrc/contract.h
has it take: 0 for the address of what is not there.
"""

import importlib
import itertools
from array import array
from typing import NamedTuple

import torch

from ... import lists

MOST_LISTS = 256  # as many as there are plans in `lists`
_lists = {}  # (id of a plan, dtype) -> (the plan, its List); the plan is kept, or another could get its id


def library():
    try:
        return importlib.import_module("r2kernels._C")
    except ModuleNotFoundError as error:
        raise ImportError(
            "the extension was not built: at installation no C++ compiler was found, or the build was cut off"
        ) from error


def half(name):
    """`_C.cpu` or `_C.cuda`; ImportError or RuntimeError where this machine cannot run it."""
    extension = library()
    if name == "cpu":
        return extension.cpu
    if not hasattr(extension, "cuda"):
        raise ImportError("the extension was built without CUDA: no nvcc was found then, or R2KERNELS_CUDA=0 was set")
    problem = extension.cuda.problem()
    if problem:
        raise RuntimeError(problem)
    return extension.cuda


def on_codes(name, *args):
    """A function of the extension on packed or coded codes on the CPU: tensors are given by their address, groups as a
    tuple, the number of threads is added."""
    codes = library().codes
    given = [
        a.data_ptr() if isinstance(a, torch.Tensor) else _groups(codes, *a) if isinstance(a, tuple) else a for a in args
    ]
    return getattr(codes, name)(*given, threads=torch.get_num_threads())


def _groups(codes, rows, each, bits):
    return codes.Groups(rows=rows, each=each, bits=bits)


def pointer(tensor):
    """0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_of(structs, dtype):
    return {
        torch.float64: structs.Dtype.f64,
        torch.float32: structs.Dtype.f32,
        torch.bfloat16: structs.Dtype.bf16,
        torch.float16: structs.Dtype.f16,
    }[dtype]


def described(structs, plan, dtype):
    """The `List` of a plan, made once: it says of the tensors all but where they lie."""
    found = _lists.get((id(plan), dtype))
    if found is None:
        if len(_lists) >= MOST_LISTS:
            _lists.clear()
        made = structs.List(
            tensors=pointer(plan.tensors),
            owner=pointer(plan.owner),
            count=plan.count,
            chunks=plan.chunks,
            chunk=plan.chunk,
            d=plan.d,
            dtype=dtype_of(structs, dtype),
            alone=structs.Tensor(*plan.alone),
        )
        found = _lists[id(plan), dtype] = plan, made
    return found[1]


class Table(NamedTuple):
    """What an op is given for addresses of tensors: where their table lies, or on a GPU the address of the only one."""

    address: int
    kept: object  # until the call is over


NO_TABLE = Table(0, None)


class Half:
    """What the launchers of all families need of one half of the extension."""

    def __init__(self, name):
        self.library, self.structs, self.contract = half(name), library(), library().contract()
        self.devices, self.on_gpu = (name,), name == "cuda"

    def queue(self, device):
        """(device index, stream) on a GPU, (0, number of threads) on the CPU."""
        if self.on_gpu:
            index = device.index if device.index is not None else torch.cuda.current_device()
            return index, torch._C._cuda_getCurrentRawStream(index)
        return 0, torch.get_num_threads()

    def tables(self, *groups):
        """For each group of tensors, of which some may be None, a `Table`."""
        rows = [array("q", map(pointer, tensors)) for tensors in groups]
        if not self.on_gpu:
            return [Table(row.buffer_info()[0], row) for row in rows]
        if max(map(len, rows)) == 1:
            return [Table(row[0], None) for row in rows]
        device = next(t.device for tensors in groups for t in tensors if t is not None)
        room = torch.empty(sum(map(len, rows)), dtype=torch.int64, device=device)
        every = array("q", itertools.chain(*rows))
        self.library.write_words(every.buffer_info()[0], len(every), room.data_ptr(), *self.queue(device))
        begins = itertools.accumulate(map(len, rows[:-1]), initial=0)
        return [Table(room.data_ptr() + 8 * begin, room) for begin in begins]

    def listed(self, weights, d, layout, plan_of=lists.plan):
        """(the List, the plan, the tensors whose addresses it is to be called with)"""
        tensors, runs = lists.dense(weights, d, layout)
        plan = plan_of(tensors, runs, d, tensors[0].device)
        return described(self.structs, plan, tensors[0].dtype), plan, tensors
