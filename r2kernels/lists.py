"""How a list of tensors becomes one launch: memory order, the plan of chunks, and where gradients lie.

A kernel reads a tensor through its dense memory. Column c of d is the rows k = 0..N-1 at element (k // run) * d * run
+ c * run + k % run; for d = 1 that is element k, so any dense stride order is read in place. Numbers past d * N are
leftovers.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import accumulator
from .reference.lasting import lasting

CHUNK = 4096  # rows per chunk on the CPU: 16 KiB of float32 stay in a core's first cache between its two passes
BLOCK = 4096  # rows per step of a GPU program
MOST_STEPS = 16  # steps per GPU program: few partial states for large lists,
FEWEST_PROGRAMS = 1056  # but first enough programs to fill a GPU (8 for each of 132 multiprocessors)
ROWS = 16384  # rows per chunk of whole rows on the CPU: sums over K clusters stay few beside them
FEWEST_ROWS = 1024  # per program of a GPU, a multiple of it
WAVE = 528  # blocks at once, 4 for each multiprocessor
# of a tensor in Plan.tensors: rows N, elements, run, first chunk, columns d, the first of them among all columns
FIELDS = 6
COUNTERS = 64  # the fewest that are kept
_kept: list = []  # tables that a captured CUDA graph reads at every replay


class Plan(NamedTuple):
    """Chunk i belongs to tensor t = owner[i]; with j = i - first chunk of t it is rows [j // d * chunk, ...) of
    column j % d. In a plan of whole rows it is rows [j * chunk, ...) of all columns, in one of whole columns columns
    [j * chunk, ...)."""

    tensors: Tensor | None  # (L, FIELDS) int64
    owner: Tensor | None  # (chunks,) int32
    count: int  # L
    chunks: int
    chunk: int  # rows in a full chunk
    d: int  # columns of every tensor; 0 where they differ
    alone: tuple  # the FIELDS of the tensor of a list of one, which has no tables


def on_gpu(device):
    """Whether a GPU's kernels read the tensors there, which decides how lists are cut."""
    return device.type == "cuda"


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
    """The plan for tensors of these sizes."""
    return _in_use(_plan(_numels(tensors), runs, d, device, False), device)


def short_plan(tensors, runs, d, device):
    """The plan in chunks that stay in a GPU's first cache while they are read several times."""
    return _in_use(_plan(_numels(tensors), runs, d, device, False, 1), device)


def row_plan(tensors, runs, d, device):
    """The plan of whole rows for tensors of these sizes."""
    return _in_use(_plan(_numels(tensors), runs, d, device, True), device)


def channel_plan(tensors, axis, device):
    """The plan for tensors of which every channel is a column; without an axis each tensor is one."""
    columns = tuple([1 if axis is None else t.shape[axis] for t in tensors])
    runs = tuple([1 if c == 1 else t.stride(axis) for t, c in zip(tensors, columns, strict=True)])
    return _in_use(_plan(_numels(tensors), runs, columns, device, False), device)


def column_plan(tensors, axis, columns, device):
    """The plan in chunks of so many whole columns, which are the channels."""
    sizes = tuple([(t.numel(), t.shape[axis]) for t in tensors])
    return _in_use(_column_plan(sizes, columns, device), device)


def _numels(tensors):
    return tuple([t.numel() for t in tensors])


@functools.lru_cache(maxsize=256)
def _column_plan(sizes, chunk, device):
    tensors = [(n // columns, n, n // columns, columns) for n, columns in sizes]
    return _tabled(tensors, [-(-columns // chunk) for _, columns in sizes], chunk, 0, device)


@functools.lru_cache(maxsize=256)
def _plan(numels, runs, d, device, whole, most_steps=MOST_STEPS):
    columns = (d,) * len(numels) if isinstance(d, int) else d
    rows = [n // c for n, c in zip(numels, columns, strict=True)]
    if whole and not on_gpu(device):
        chunk = ROWS
    elif whole:
        chunk = _whole_waves(rows)
    elif on_gpu(device):
        steps = sum([n * c for n, c in zip(rows, columns, strict=True)]) // (BLOCK * FEWEST_PROGRAMS)
        chunk = BLOCK * min(max(steps, 1), most_steps)
    else:
        chunk = CHUNK
    chunks = [(1 if whole else c) * -(-n // chunk) for n, c in zip(rows, columns, strict=True)]
    tensors = list(zip(rows, numels, runs or (1,) * len(numels), columns, strict=True))
    return _tabled(tensors, chunks, chunk, d if isinstance(d, int) else 0, device)


def _whole_waves(rows):
    """Rows per chunk of whole rows: of those that make about FEWEST_PROGRAMS chunks, or half as many, the fewest for
    which a GPU takes at most 5% longer than for the best, where a wave of WAVE blocks takes as long if it is not full.
    (Where 2 blocks or 1 fit on a multiprocessor, waves are halves or quarters.)"""
    least = max(-(-sum(rows) // (FEWEST_ROWS * FEWEST_PROGRAMS)), 1)
    times = {
        steps: steps * -(-sum([-(-n // (FEWEST_ROWS * steps)) for n in rows]) // WAVE)
        for steps in range(least, 2 * least + 2, max(least // 64, 1))
    }
    return FEWEST_ROWS * next(steps for steps, time in times.items() if time <= 1.05 * min(times.values()))


def _tabled(tensors, chunks, chunk, d, device):
    """tensors: (rows, elements, run, columns) of each, chunks: how many each has."""
    if len(tensors) == 1:
        rows, numel, run, columns = tensors[0]
        return Plan(None, None, 1, chunks[0], chunk, d, (rows, numel, run, 0, columns, 0))
    fields, first_chunk, first_column = [], 0, 0
    for (rows, numel, run, columns), n in zip(tensors, chunks, strict=True):
        fields.append((rows, numel, run, first_chunk, columns, first_column))
        first_chunk, first_column = first_chunk + n, first_column + columns
    table = torch.tensor(fields, dtype=torch.int64, device="cpu")
    indices = torch.arange(len(tensors), dtype=torch.int32, device="cpu")
    owner = torch.repeat_interleave(indices, torch.tensor(chunks, dtype=torch.int64, device="cpu"))
    return Plan(_on(table, device), _on(owner, device), len(tensors), first_chunk, chunk, d, (0,) * FIELDS)


def resident(values, dtype, device):
    """Numbers that every call needs, a tuple, as a tensor on the device that nothing ever writes."""
    return _in_use(_resident(values, dtype, device), device)


@functools.lru_cache(maxsize=1024)
def _resident(values, dtype, device):
    return _on(torch.tensor(values, dtype=dtype, device="cpu"), device)


def counters(count, device, stream):
    """(>= count,) int32 zeros for kernels of this stream, which run one after the other and each leave zeros."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)  # written again at every replay
    return _counters(max(1 << (count - 1).bit_length(), COUNTERS), device, stream)


@functools.cache
def _counters(count, device, stream):
    return _on(torch.zeros(count, dtype=torch.int32, device="cpu"), device)


def _on(table, device):
    return lasting(lambda: table.to(device), device, "a list of these sizes")


def _in_use(value, device):
    """The value, a plan or a tensor. What a CUDA graph reads is kept for good; else its memory is no other's, should
    the cache drop it, before this stream has done what it was given."""
    if device.type != "cuda":
        return value
    if torch.cuda.is_current_stream_capturing():
        _kept.append(value)
        return value
    for t in (value,) if isinstance(value, Tensor) else (value.tensors, value.owner):
        if t is not None:
            t.record_stream(torch.cuda.current_stream(device))
    return value


def is_aligned(tensors):
    """Whether every tensor starts at a multiple of 16 bytes, as 128-bit loads need."""
    pointers = 0
    for t in tensors:
        pointers |= t.data_ptr()
    return pointers % 16 == 0


def empty_gradients(weights, d=1, layout="output", needed=None):
    """Memory for the gradient of each weight, None for those that are not needed. (One flat tensor for all costs a page
    fault every 4 KB on the CPU, where it is mapped anew every step: 33 ms against 20 ms for the forward and backward of
    11.7M weights; and on a GPU as much memory again as all gradients.)"""
    if needed is None:
        return [_empty_gradient(w, d, layout) for w in weights]
    return [_empty_gradient(w, d, layout) if need else None for w, need in zip(weights, needed, strict=True)]


def _empty_gradient(w, d, layout):
    if d == 1 and w.is_contiguous():
        return torch.empty_like(w)
    return torch.empty_strided(w.shape, memory_order(w, d, layout)[0], dtype=w.dtype, device=w.device)


def laid_out(gradients, weights, d=1, layout="output"):
    """Gradients shaped like the weights, in memory as `empty_gradients` has them."""
    return [_empty_gradient(w, d, layout).copy_(g) for g, w in zip(gradients, weights, strict=True)]


def like_weights(others, tensors):
    """`others`, shaped like the weights that `dense` gave as `tensors`, lying in memory as these do; copied only
    where they do not."""
    return [
        o
        if o.stride() == w.stride() and not o.is_neg()
        else torch.empty_strided(w.shape, w.stride(), dtype=w.dtype, device=w.device).copy_(o)
        for o, w in zip(others, tensors, strict=True)
    ]


def with_zeros(others, weights, d=1, layout="output"):
    """`others`, shaped like the weights; zeros for those that are None, lying as `dense` has the weights."""
    zeros = empty_gradients([w for o, w in zip(others, weights, strict=True) if o is None], d, layout)
    if zeros:
        torch._foreach_zero_(zeros)
    made = iter(zeros)
    return [next(made) if o is None else o for o in others]


def stacked(steps):
    """The centroids, new centroids, gradients and moments of some iterations of DKM, (steps, L, K, ...) each."""
    *lengths, moments = zip(*[step[:4] for step in steps], strict=True)
    c, new, u = torch.stack([t for some in lengths for t in some]).chunk(3)
    return c, new, u, torch.stack(moments)


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
