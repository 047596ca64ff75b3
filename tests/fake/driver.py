"""A driver of no GPU: Triton binds, specializes and compiles for sm_90, and launches nothing. To be made active before
the package is imported; then `steer()` sends CPU tensors to the Triton backend as if they were on a GPU.

What a kernel would have written is left as it was, so results mean nothing: what counts is what was compiled and
launched.
"""

import importlib

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

launched, compiled = [], []


class NoLauncher:
    """Of one compiled kernel."""

    def __init__(self, source, metadata):
        self.name = source.fn.__name__

    def __call__(self, x, y, z, *arguments):
        launched.append((self.name, (x, y, z)))


class NoUtilities:
    def load_binary(self, name, binary, shared, device):
        """(module, function, registers, spills, most threads)"""
        return 1, 1, 64, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}


class NoDriver:
    launcher_cls, utils = NoLauncher, NoUtilities()

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def map_python_to_cpp_type(self, kind):
        return kind


def _count(*, fn, **_):
    compiled.append(fn.name.rpartition(".")[2])


def steer():
    """The backend "triton" serves CPU tensors from now on, with the plans of a GPU."""
    driver.set_active(NoDriver())
    triton.knobs.runtime.jit_cache_hook = _count  # called for what this process has not compiled yet
    backends, lists = importlib.import_module("r2kernels.backends"), importlib.import_module("r2kernels.lists")
    backend = importlib.import_module("r2kernels.backends.triton").Triton(interpreted=False)
    backend.devices = ("cpu",)
    plain = backends._load
    backends._load = lambda name: (backend, None) if name == "triton" else plain(name)
    lists.on_gpu = lambda device: True
