"""How a program finds its chunk of a list of tensors, and where its results go; how a list is cut is told in
`lists.py`."""

import inspect

import triton
import triton.language as tl

WARPS = 4
FIELDS = tl.constexpr(6)  # of a tensor, as `lists.Plan` has them:
N_ROWS, N_ELEMENTS, RUN, FIRST_CHUNK, N_COLUMNS, FIRST_COLUMN = [tl.constexpr(i) for i in range(6)]
EDGE = tl.constexpr(64)  # elements at once of what lies behind the rows
SHIFT = tl.constexpr(2**32)
TUPLES = tl.constexpr((tl.tuple, tuple))  # compiled, and in the interpreter
WORDS = 64  # that a launch writes
ALIGN = tl.constexpr(16)  # elements: a mask that changes only at its multiples leaves 128-bit accesses whole
PROPAGATE = tl.constexpr(tl.PropagateNan.ALL)


def tile_of_rows(itemsize, d=1, reads=1, interpreted=False):
    """(BLOCK, UNROLL): one 128-bit access a thread and block, four loads or more in flight, in all 4096 weights or
    less; fewer for gathers, whose addresses take registers. The interpreter's cost is per operation, so there a block
    is large."""
    if interpreted:
        return 2048, 2
    return 32 * WARPS * 16 // itemsize, 2 if d > 1 else (8 if itemsize == 4 and reads == 1 else 4) // reads


def jit(kernel):
    """A kernel that Triton compiles once for its constants, the dtypes of its arguments and those that are None: never
    again for addresses or numbers that are multiples of 16, or 1."""
    names = [p.name for p in inspect.signature(kernel).parameters.values() if p.annotation is not tl.constexpr]
    return triton.jit(kernel, do_not_specialize=names, do_not_specialize_on_alignment=names)


def as_argument(number):
    """A number in a tuple of arguments: odd, and never 32 bits, or Triton would compile the kernel again for numbers
    that are 1, multiples of 16, or beyond 2^31."""
    return 2 * (number + 2**32) + 1


@triton.jit
def from_argument(number):
    return (number >> 1) - SHIFT


@jit
def write_words(p_out, words, first):
    """Addresses into a table, which so becomes part of a CUDA graph: with no copy from the host."""
    for i in tl.static_range(len(words)):
        tl.store(p_out + first + i, from_argument(words[i]))


@triton.jit
def field(p_tensors, t, FIELD: tl.constexpr):
    """Of tensor t in the table, or of the only one, whose fields are arguments."""
    if isinstance(p_tensors, TUPLES.value):
        return from_argument(p_tensors[FIELD])
    else:
        return tl.load(p_tensors + t * FIELDS + FIELD)


@triton.jit
def owner(p_owner, i):
    """The tensor of chunk i."""
    return i * 0 if p_owner is None else tl.load(p_owner + i)


@triton.jit
def chunk_of_program(i, p_tensors, p_owner, n_chunk, D: tl.constexpr):
    """(tensor, column, first row, rows of the column, run) of chunk i."""
    t = owner(p_owner, i)
    j = i - field(p_tensors, t, FIRST_CHUNK)
    return t, (j % D).to(tl.int32), j // D * n_chunk, field(p_tensors, t, N_ROWS), field(p_tensors, t, RUN)


@triton.jit
def tensor_pointer(p_table, t, DT: tl.constexpr, ALIGNED: tl.constexpr):
    """Of tensor t in a table of addresses, or the only tensor itself."""
    p = tl.load(p_table + t).to(tl.pointer_type(DT)) if p_table.dtype.element_ty == tl.int64 else p_table
    return tl.multiple_of(p, 16) if ALIGNED else p


@triton.jit
def zero_leftovers(p, start, end):
    """Elements [start, end) of the results."""
    while start < end:
        o = start + tl.arange(0, EDGE)
        tl.store(p + o, tl.zeros([EDGE], p.dtype.element_ty), mask=o < end)
        start += EDGE
