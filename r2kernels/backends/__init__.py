"""Which module serves which device. An explicit choice never falls back; an automatic fall-back warns once."""

import contextlib
import functools
import importlib
import os
import threading
import warnings

import torch

NAMES = ("triton", "cuda", "cpu", "reference")
_DEFAULTS = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}
# Triton cannot scatter: sums by cluster cost it K times as much, counts by digit 93 instructions for each weight
# where CUDA C++ needs 6
_DEFAULTS_OF_SCATTERS = {**_DEFAULTS, "cuda": ("cuda", "triton")}
_chosen = threading.local()


def backends():
    """name -> None if the backend is usable on this machine, else the reason why not."""
    return {name: _load(name)[1] for name in NAMES}


@contextlib.contextmanager
def use_backend(name):
    """Within the block, on this thread, every op runs on this backend, or raises with the reason why it cannot.
    `None` gives the default back."""
    if name is not None and name not in NAMES:
        raise ValueError(f"backend {name!r} is unknown; allowed are {NAMES}")
    before = getattr(_chosen, "name", None)
    _chosen.name = name
    try:
        yield
    finally:
        _chosen.name = before


def chosen():
    """The backend chosen explicitly, by `use_backend` or R2KERNELS_BACKEND, or None."""
    return getattr(_chosen, "name", None) or _environment()


@functools.cache
def _environment():
    name = os.environ.get("R2KERNELS_BACKEND") or None
    if name is not None and name not in NAMES:
        raise ValueError(f"R2KERNELS_BACKEND={name!r} is unknown; allowed are {NAMES}")
    return name


def serving(device, scatters=False):
    """The name of the backend that serves tensors on `device`; RuntimeError where the one chosen explicitly cannot.

    `scatters`: for ops that sum by cluster or count by code."""
    name = getattr(_chosen, "name", None) or _environment()
    if name is None:
        return _default(device.type, scatters)
    reason = _why_not(name, device.type)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} was chosen explicitly but cannot be used: {reason}")
    return name


def select(device, scatters=False):
    """The backend for tensors on `device`: an object with the ops as functions, or None for the reference."""
    return _load(serving(device, scatters))[0]


def _why_not(name, kind):
    """Why a backend cannot serve tensors of this kind of device, or None."""
    backend, reason = _load(name)
    if reason is None and backend is not None and kind not in backend.devices:
        reason = f"it serves {' and '.join(backend.devices)} tensors, W is on {kind}"
    return reason


@functools.cache
def _default(kind, scatters):
    for name in (_DEFAULTS_OF_SCATTERS if scatters else _DEFAULTS).get(kind, ()):
        reason = _why_not(name, kind)
        if reason is None:
            return name
        warnings.warn(
            f"r2kernels: backend {name!r} is not usable ({reason}); {kind} tensors fall back to a slower one. "
            "`r2kernels info` shows all.",
            RuntimeWarning,
            stacklevel=2,
        )
    return "reference"


@functools.cache
def _load(name):
    """(backend, None), or (None, reason)."""
    try:
        return {"triton": _triton, "cuda": _native, "cpu": _native, "reference": lambda name: None}[name](name), None
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)


def _triton(_):
    return importlib.import_module(".triton", __name__).load()


def _native(name):
    return importlib.import_module(".native", __name__).load(name)


def versions():
    """What an `info` table says of the machine's torch, Triton and extension."""
    found = {"torch": torch.__version__, "triton": None, "extension": None}
    with contextlib.suppress(ImportError):
        found["triton"] = importlib.import_module("triton").__version__
    with contextlib.suppress(ImportError):
        found["extension"] = importlib.import_module("r2kernels._C").build
    return found
