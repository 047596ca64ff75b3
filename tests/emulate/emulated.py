"""The backend "cuda" on CPU tensors: the package's own launchers, over its kernels on the host.

    with emulated.chosen("rising"): ...         within it every op runs on them, in this order of blocks and threads

A wrong kernel ends its launch with a RuntimeError that names the place (shim/emulation.h)."""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))

import build  # noqa: E402

from r2kernels import lists, use_backend  # noqa: E402
from r2kernels.backends import native  # noqa: E402
from r2kernels.backends.native import extension  # noqa: E402

backends = importlib.import_module("r2kernels.backends")
ORDERS = ("rising", "falling")
why_not = build.why_not


class Emulated(native.Native):
    def __init__(self):
        self.path = build.build()
        spec = importlib.util.spec_from_file_location("_C", self.path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with mock.patch.object(extension, "library", lambda: module):
            super().__init__("cuda")
        self.devices = ("cpu",)

    def queue(self, device):
        return 0, 0


@functools.cache
def backend():
    return Emulated()


def _forget_plans():
    """Those for a CPU, or for the kernels."""
    for function in vars(lists).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@contextlib.contextmanager
def chosen(order="rising"):
    serving, plain = backend(), backends._load
    ctypes.CDLL(str(serving.path)).emulate_order(ORDERS.index(order))
    _forget_plans()
    with (
        mock.patch.object(backends, "_load", lambda name: (serving, None) if name == "cuda" else plain(name)),
        mock.patch.object(lists, "on_gpu", lambda device: True),
        use_backend("cuda"),
    ):
        yield
    _forget_plans()
