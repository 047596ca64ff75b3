"""Weights that are coded in parts, by several threads: no more of a checkpoint is in memory than they work on."""

import collections
import concurrent.futures
import math
from typing import NamedTuple

import torch

from ..files.clustered import Form
from ..files.uniform import Grid
from .report import histogram

PART = 2**23  # bytes of a weight that are coded at once, or one larger group
AT_ONCE = 2**27  # bytes of all parts that are read and not coded yet, or one larger part


class Part(NamedTuple):
    """Those indices of the first dimension of a planned weight."""

    planned: object
    begin: int
    end: int

    @property
    def nbytes(self):
        return self.planned.nbytes // self.planned.shape[0] * (self.end - self.begin)


class Coded(NamedTuple):
    """A part as it is stored (None: it is not finite), and what is known of it."""

    weight: object
    counts: torch.Tensor | None = None  # how often each code occurs
    energies: tuple = (0.0, 0.0)  # ||W||^2, ||W - W_hat||^2
    texts: tuple = ()  # of warnings
    panel: tuple | None = None


def cut(p, whole=False):
    """The parts of a planned weight: one, unless its groups lie one after the other along the first dimension."""
    channels, step = p.shape[0], None if whole else _step(p.shape, p.form)
    if step is None:
        return [Part(p, 0, channels)]
    most = PART * channels // p.nbytes
    each = max(most // step, 1) * step
    return [Part(p, i, min(i + each, channels)) for i in range(0, channels, each)]


def _step(shape, form):
    """Of how many channels a part is a multiple, so that its groups, and the bytes of its codes, are its own."""
    if isinstance(form, Form):
        rows, columns = form.granularity or (form.group_size, None)
        inner = math.prod(shape) // shape[0]
        together = form.axis or form.per_channel_scale or form.lut_dtype == "fp8"  # have something of all of a weight
        return None if together or inner % min(columns or inner, inner) else rows
    if isinstance(form, Grid) and form.axis == 0:
        return 8 // math.gcd(8, math.prod(shape) // shape[0] * form.bits)
    return None


def joined(shape, parts):
    """The stored weight of this shape that is made of those of its parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    tensors = [field for field, value in parts[0]._asdict().items() if isinstance(value, torch.Tensor)]
    return parts[0]._replace(shape=shape, **{f: torch.cat([getattr(part, f) for part in parts]) for f in tensors})


def code(w, form, encode, *, packed, plot):
    """A part of a weight as `encode(w, form, tell)` codes it."""
    texts = []
    weight = encode(w, form, tell=texts.append)
    if weight is None:
        return Coded(None)
    (energies, counts), panel = weight.errors(w), None
    if plot:
        hat, (low, high) = weight.decoded(), (x.item() for x in w.aminmax())
        panel = (low, high), histogram(w, low, high), histogram(hat.clamp(low, high), low, high)
    return Coded(weight.packed() if packed else weight, counts, energies, tuple(texts), panel)


def in_order(parts, read, work, jobs):
    """Yields work(part, read(part)) in the order of the parts: read here, and worked on by `jobs` threads."""
    threads = torch.get_num_threads()
    pool = concurrent.futures.ThreadPoolExecutor(jobs, "r2kernels", torch.set_num_threads, (max(threads // jobs, 1),))
    waiting = collections.deque()
    try:
        for part in parts:
            while len(waiting) > jobs or (waiting and sum(size for size, _ in waiting) + part.nbytes > AT_ONCE):
                yield waiting.popleft()[1].result()
            waiting.append((part.nbytes, pool.submit(work, part, read(part))))
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the threads' own number is the default of those to come
