"""How a list of tensors becomes one launch: memory order, addresses, the plan of chunks, and where gradients lie.

A kernel reads a tensor through its dense memory. Column c of d is the rows k = 0..N-1 at element (k // run) * d * run
+ c * run + k % run; for d = 1 that is element k, so any dense stride order is read in place. Numbers past d * N are
leftovers.
"""

import functools
from array import array
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import accumulator

CHUNK = 4096  # rows per chunk on the CPU: 16 KiB of float32 stay in a core's first cache between its two passes
BLOCK = 4096  # rows per step of a GPU program
MOST_STEPS = 16  # steps per GPU program: few partial states for large lists,
FEWEST_PROGRAMS = 1056  # but first enough programs to fill a GPU (8 for each of 132 multiprocessors)
ROWS = 16384  # rows per chunk of whole rows on the CPU: sums over K clusters stay few beside them
FEWEST_ROWS = 1024  # per program of a GPU, a multiple of it
WAVE = 528  # blocks at once, 4 for each multiprocessor
SEGMENT = 64  # elements: gradients of a list on a GPU start at multiples of it, so that 128-bit stores are aligned
# of a tensor in Plan.tensors: rows N, elements, run, first chunk, gradient offset, columns d, the first of them among
# all columns
FIELDS = 7
_kept: list = []  # tables that a captured CUDA graph reads at every replay


class Plan(NamedTuple):
    """Chunk i belongs to tensor t = owner[i]; with j = i - first chunk of t it is rows [j // d * chunk, ...) of
    column j % d. In a plan of whole rows it is rows [j * chunk, ...) of all columns, in one of whole columns columns
    [j * chunk, ...)."""

    tensors: Tensor  # (L, FIELDS) int64
    owner: Tensor  # (chunks,) int32
    count: int  # L
    chunks: int
    chunk: int  # rows in a full chunk
    d: int  # columns of every tensor; 0 where they differ
    elements: int  # of the flat gradient


def is_dense(w):
    """Whether the elements of w fill one block of memory, each once, in whatever order."""
    if w.is_contiguous():
        return True
    size = 1
    for stride, n in sorted((s, n) for n, s in zip(w.shape, w.stride(), strict=True) if n != 1):
        if stride != size:
            return False
        size *= n
    return True


def memory_order(w, d=1, layout="output"):
    """(strides, run): how the elements of w lie in the memory that a kernel reads, or would lie in the copy made for
    it."""
    dense = is_dense(w)
    if d == 1:
        return (w.stride() if dense else _contiguous(w.shape)), 1
    by_output = layout == "output" and w.dim() > 1
    axis = 0 if by_output else w.dim() - 1
    if dense and w.dim() > 0 and w.shape[axis] % d == 0:
        return w.stride(), w.stride(axis)
    if not by_output:
        return _contiguous(w.shape), 1
    swapped = list(range(w.dim()))
    swapped[0], swapped[-1] = swapped[-1], swapped[0]
    strides = _contiguous([w.shape[i] for i in swapped])
    return tuple([strides[i] for i in swapped]), 1


def _contiguous(shape):
    strides, size = [], 1
    for n in reversed(shape):
        strides.append(size)
        size *= max(n, 1)
    return tuple(reversed(strides))


def dense(weights, d=1, layout="output"):
    """(tensors, runs): each weight as memory that a kernel can address; copied only where its strides do not allow
    that."""
    if d == 1:
        return _positive([w if w.is_contiguous() or is_dense(w) else w.contiguous() for w in weights]), None
    tensors, runs = [], []
    for w in weights:
        strides, run = memory_order(w, d, layout)
        tensors.append(
            w
            if strides == w.stride()
            else torch.empty_strided(w.shape, strides, dtype=w.dtype, device=w.device).copy_(w)
        )
        runs.append(run)
    return _positive(tensors), tuple(runs)


def _positive(tensors):
    """Tensors whose memory holds their numbers, not the negatives of them as that of `z.conj().imag` does."""
    if True in map(Tensor.is_neg, tensors):
        return [t.resolve_neg() for t in tensors]
    return tensors


def plan(tensors, runs, d, device):
    """The plan for tensors of these sizes; made once for every list of sizes."""
    value = _plan(tuple([t.numel() for t in tensors]), runs, d, device, False)
    _keep_if_captured(value, device)
    return value


def short_plan(tensors, runs, d, device):
    """The plan in chunks that stay in a GPU's first cache while they are read several times."""
    value = _plan(tuple([t.numel() for t in tensors]), runs, d, device, False, 1)
    _keep_if_captured(value, device)
    return value


def row_plan(tensors, runs, d, device):
    """The plan of whole rows for tensors of these sizes."""
    value = _plan(tuple([t.numel() for t in tensors]), runs, d, device, True)
    _keep_if_captured(value, device)
    return value


def channel_plan(tensors, axis, device):
    """The plan for tensors of which every channel is a column; without an axis each tensor is one."""
    columns = tuple([1 if axis is None else t.shape[axis] for t in tensors])
    runs = tuple([1 if c == 1 else t.stride(axis) for t, c in zip(tensors, columns, strict=True)])
    value = _plan(tuple([t.numel() for t in tensors]), runs, columns, device, False)
    _keep_if_captured(value, device)
    return value


def column_plan(tensors, axis, columns, device):
    """The plan in chunks of so many whole columns, which are the channels."""
    value = _column_plan(tuple([(t.numel(), t.shape[axis]) for t in tensors]), columns, device)
    _keep_if_captured(value, device)
    return value


@functools.lru_cache(maxsize=256)
def _column_plan(sizes, chunk, device):
    numel, columns = torch.tensor(sizes, dtype=torch.int64, device="cpu").unbind(1)
    return _tabled(numel, numel // columns, columns, (columns + chunk - 1) // chunk, chunk, 0, device)


@functools.lru_cache(maxsize=256)
def _plan(numels, runs, d, device, whole, most_steps=MOST_STEPS):
    numel = torch.tensor(numels, dtype=torch.int64, device="cpu")
    columns = torch.tensor(d, dtype=torch.int64, device="cpu").expand(len(numels)).contiguous()
    rows = numel // columns
    if whole:
        chunk = ROWS if device.type == "cpu" else _whole_waves(rows)
    else:
        chunk = CHUNK
        if device.type == "cuda":
            steps = int((rows * columns).sum()) // (BLOCK * FEWEST_PROGRAMS)
            chunk = BLOCK * min(max(steps, 1), most_steps)
    chunks = (1 if whole else columns) * ((rows + chunk - 1) // chunk)
    run = torch.tensor(runs, dtype=torch.int64, device="cpu") if runs else torch.ones_like(numel)
    return _tabled(numel, run, columns, chunks, chunk, d if isinstance(d, int) else 0, device)


def _whole_waves(rows):
    """Rows per chunk of whole rows: of those that make about FEWEST_PROGRAMS chunks, or half as many, the fewest for
    which a GPU takes at most 5% longer than for the best, where a wave of WAVE blocks takes as long if it is not full.
    (Where 2 blocks or 1 fit on a multiprocessor, waves are halves or quarters.)"""
    least = max(-(-int(rows.sum()) // (FEWEST_ROWS * FEWEST_PROGRAMS)), 1)
    times = {
        steps: steps * -(-int((-(-rows // (FEWEST_ROWS * steps))).sum()) // WAVE)
        for steps in range(least, 2 * least + 2)
    }
    return FEWEST_ROWS * next(steps for steps, time in times.items() if time <= 1.05 * min(times.values()))


def _tabled(numel, run, columns, chunks, chunk, d, device):
    padded = (numel + SEGMENT - 1) // SEGMENT * SEGMENT
    first, offset = chunks.cumsum(0) - chunks, padded.cumsum(0) - padded
    owner = torch.repeat_interleave(torch.arange(len(numel), dtype=torch.int32, device="cpu"), chunks)
    table = torch.stack([numel // columns, numel, run, first, offset, columns, columns.cumsum(0) - columns], 1)
    return Plan(table.to(device), owner.to(device), len(numel), len(owner), chunk, d, int(padded.sum()))


def host_table(tensors):
    """Addresses on the host, for kernels on the CPU."""
    return array("q", [t.data_ptr() for t in tensors])


def device_table(tensors, device):
    """Addresses as an int64 tensor on the device. Its content is a function of its key, so it cannot go stale."""
    value = _device_table(tuple([t.data_ptr() for t in tensors]), device)
    _keep_if_captured(value, device)
    return value


@functools.lru_cache(maxsize=1024)
def _device_table(pointers, device):
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "r2kernels met these weights for the first time during CUDA-graph capture; "
            "run one step with them before the capture"
        )
    return torch.tensor(pointers, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


def sizes(counts, device):
    """Numbers of clusters as an int32 tensor on the device."""
    value = _sizes(counts, device)
    _keep_if_captured(value, device)
    return value


@functools.lru_cache(maxsize=256)
def _sizes(counts, device):
    return torch.tensor(counts, dtype=torch.int32, device="cpu").to(device, non_blocking=True)


def _keep_if_captured(value, device):
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _kept.append(value)


def is_aligned(tensors):
    """Whether every tensor starts at a multiple of 16 bytes, as 128-bit loads need."""
    pointers = 0
    for t in tensors:
        pointers |= t.data_ptr()
    return pointers % 16 == 0


def gradient_offsets(weights):
    """Element offsets of the gradients of `weights` in one flat tensor, its size at the end."""
    offsets = [0]
    for w in weights:
        offsets.append(offsets[-1] + (w.numel() + SEGMENT - 1) // SEGMENT * SEGMENT)
    return offsets


def empty_gradients(weights, d=1, layout="output"):
    """Memory for the gradients: on a GPU one flat tensor (static offsets, no table of addresses), elsewhere a tensor
    for each weight (a flat block above 32 MB is mapped anew every step: 33 ms against 20 ms for the forward and
    backward of 11.7M weights)."""
    w = weights[0]
    if w.device.type == "cuda":
        return [torch.empty(gradient_offsets(weights)[-1], dtype=w.dtype, device=w.device)]
    return [torch.empty_like(w) if d == 1 and w.is_contiguous() else _empty_gradient(w, d, layout) for w in weights]


def _empty_gradient(w, d, layout):
    return torch.empty_strided(w.shape, memory_order(w, d, layout)[0], dtype=w.dtype, device=w.device)


def pack_gradients(gradients, weights, d=1, layout="output"):
    """Gradients shaped like the weights, laid out as `empty_gradients` has them."""
    if weights[0].device.type == "cuda":
        flat = torch.zeros(gradient_offsets(weights)[-1], dtype=weights[0].dtype, device=weights[0].device)
        for g, part in zip(gradients, carve_gradients([flat], weights, d, layout), strict=True):
            part.copy_(g)
        return [flat]
    return [_empty_gradient(w, d, layout).copy_(g) for g, w in zip(gradients, weights, strict=True)]


def carve_gradients(buffers, weights, d=1, layout="output"):
    """What the ops returned, as one gradient for each weight; views of the flat tensor on a GPU."""
    if weights[0].device.type != "cuda":
        return buffers
    flat, offsets = buffers[0], gradient_offsets(weights)
    return [
        flat.as_strided(w.shape, memory_order(w, d, layout)[0], offset)
        for w, offset in zip(weights, offsets[:-1], strict=True)
    ]


def like_weights(others, tensors):
    """`others`, shaped like the weights that `dense` gave as `tensors`, lying in memory as these do; copied only
    where they do not."""
    return [
        o
        if o.stride() == w.stride() and not o.is_neg()
        else torch.empty_strided(w.shape, w.stride(), dtype=w.dtype, device=w.device).copy_(o)
        for o, w in zip(others, tensors, strict=True)
    ]


def in_layout_order(codes, w, d=1, layout="output"):
    """One number for each row of w, which lie as `dense` has the rows in memory, in the order in which `layout` reads
    them."""
    strides, run = memory_order(w, d, layout)
    shape = list(w.shape)
    by_output = d > 1 and layout == "output" and w.dim() > 1
    axis = 0 if by_output else w.dim() - 1
    if w.dim() < 2 or (d > 1 and w.shape[axis] % d):
        return codes  # dense has copied them into that order
    shape[axis] //= d
    rows = codes.as_strided(shape, [s // d if s > run else s for s in strides])
    return (rows.transpose(0, -1) if by_output else rows).reshape(-1)


def empty_state(weights, d, saved):
    """(loss, saved) of a range loss, uninitialised."""
    w, count = weights[0], len(weights)
    dtype = accumulator(w.dtype)
    return torch.empty(count, dtype=dtype, device=w.device), torch.empty(count, d, saved, dtype=dtype, device=w.device)
