"""The backend "cuda" on CPU tensors: the package's own launchers, over its kernels on the host.

    with emulated.RISING.chosen(): ...      within it every op runs on them, in this order of blocks and threads

A wrong kernel ends its launch with a RuntimeError that names the place (shim/emulation.h)."""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
from typing import NamedTuple
from unittest import mock

from emulate import build

from r2kernels import lists, use_backend
from r2kernels.backends import native
from r2kernels.backends.native import extension

backends = importlib.import_module("r2kernels.backends")
why_not = build.why_not


class Emulated(native.Native):
    def __init__(self):
        self.path = build.extension()
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
    """They are made for a CPU, or for a GPU's kernels."""
    for function in vars(lists).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


class Order(NamedTuple):
    """Of blocks, warps and lanes. A `Variant` of conftest.py."""

    name: str
    is_falling: bool
    backend: str = "cuda"

    def __str__(self):
        return f"emulated-{self.name}"

    @contextlib.contextmanager
    def chosen(self):
        serving, plain = backend(), backends._load
        ctypes.CDLL(str(serving.path)).emulate_order(self.is_falling)
        _forget_plans()
        with (
            mock.patch.object(backends, "_load", lambda name: (serving, None) if name == "cuda" else plain(name)),
            mock.patch.object(lists, "on_gpu", lambda device: True),
            use_backend("cuda"),
        ):
            yield self
        _forget_plans()


ORDERS = RISING, FALLING = Order("rising", False), Order("falling", True)
