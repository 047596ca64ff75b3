"""Products of float32 matrices in float32, whatever torch is told to make of them: autocast rounds them to bfloat16 on
one thread, `torch.set_float32_matmul_precision`, `allow_tf32` and `fp32_precision` to TF32 or bfloat16 in the whole
process."""

import contextlib
import threading

import torch

_SWITCHES = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
_lock = threading.Lock()
_inside, _before = 0, None  # calls under way on all threads, and what the first of them found


@contextlib.contextmanager
def full(device):
    """Within the block float32 means float32. The switches of the process are put back when the last thread leaves,
    and until then hold for the products of other threads as well, which so become more exact. Where a graph is
    compiled or exported, it is made of the plain operations."""
    if torch.compiler.is_compiling():
        yield
        return
    with torch.autocast(device.type, enabled=False) if _casts(device) else contextlib.nullcontext():
        _enter()
        try:
            yield
        finally:
            _leave()


def _casts(device):
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _enter():
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = _lifted()
        _inside += 1


def _leave():
    global _inside
    with _lock:
        _inside -= 1
        if _inside == 0 and _before is not None:
            _restore(*_before)


def _lifted():
    """(the precision of older versions of torch, that of each switch) before, or None where nothing was to be done."""
    switches = [switch.fp32_precision for switch in _SWITCHES]
    if {*switches} <= {"none", "ieee"}:
        return None
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # it is not asked for where the switches were set one by one
        precision = "highest"
    torch.set_float32_matmul_precision("highest")
    return precision, switches


def _restore(precision, switches):
    torch.set_float32_matmul_precision(precision)
    for switch, value in zip(_SWITCHES, switches, strict=True):
        switch.fp32_precision = "none"  # what `torch.backends.fp32_precision` says
        if switch.fp32_precision != value:
            switch.fp32_precision = value
