"""The only caller of `_C`: its two halves, what describes a list of tensors to them, addresses, and where a call runs.

Every op of a half is called as (list, address of the table of its tensors' addresses, device, queue), and by name what
csrc/contract.h has it take: 0 for the address of what is not there.
"""

import importlib
from array import array

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


def address(table):
    """Of a table of addresses, as `Half.table` makes it; 0 for None."""
    return table.buffer_info()[0] if type(table) is array else pointer(table)


def described(structs, plan, dtype):
    """The `List` of a plan, made once: it says of the tensors all but where they lie."""
    found = _lists.get((id(plan), dtype))
    if found is None:
        if len(_lists) >= MOST_LISTS:
            _lists.clear()
        dtypes = {
            torch.float64: structs.Dtype.f64,
            torch.float32: structs.Dtype.f32,
            torch.bfloat16: structs.Dtype.bf16,
            torch.float16: structs.Dtype.f16,
        }
        made = structs.List(
            tensors=plan.tensors.data_ptr(),
            owner=plan.owner.data_ptr(),
            count=plan.count,
            chunks=plan.chunks,
            chunk=plan.chunk,
            d=plan.d,
            dtype=dtypes[dtype],
        )
        found = _lists[id(plan), dtype] = plan, made
    return found[1]


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

    def table(self, tensors):
        """The addresses of tensors, where a kernel can read them; to be kept until the call is over."""
        return lists.device_table(tensors, tensors[0].device) if self.on_gpu else lists.host_table(tensors)

    def listed(self, weights, d, layout, plan_of=lists.plan):
        """(the List, the table of its addresses, the plan, the tensors that lie there)"""
        tensors, runs = lists.dense(weights, d, layout)
        plan = plan_of(tensors, runs, d, tensors[0].device)
        return described(self.structs, plan, tensors[0].dtype), self.table(tensors), plan, tensors

    def target(self, gradients, add):
        """(the address that a kernel is given for them, what must be kept until the call is over): of the flat tensor
        on a GPU, or of a table on the CPU and where they are added to what is there."""
        if self.on_gpu and not add:
            return gradients[0].data_ptr(), None
        table = self.table(gradients)
        return address(table), table
