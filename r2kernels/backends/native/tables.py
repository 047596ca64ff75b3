"""Rows of weights on the CPU that each have a table of scalars: the nearest entries, and what they err by."""

import torch

from .extension import dtype_of, half, library, pointer


def nearest(rows, tables):
    """(groups, n) uint8: for each number the entry of its row's table that `assign` finds. tables: (groups, K) in the
    accumulator's dtype; both contiguous."""
    codes = torch.empty(rows.shape, dtype=torch.uint8, device="cpu")
    _call("nearest", rows, tables, codes)
    return codes


def errors(rows, codes, tables):
    """((groups, 2) float64: sums of w^2 and of (w - its entry)^2; (K,) how often each code occurs). tables: (groups, K)
    in the dtype of the rows; all contiguous."""
    sums = torch.empty(len(rows), 2, dtype=torch.float64, device="cpu")
    counts = torch.zeros(tables.shape[1], dtype=torch.int64, device="cpu")
    _call("errors", rows, tables, codes, sums, counts)
    return sums, counts


def _call(name, rows, tables, codes, sums=None, counts=None):
    structs = half("cpu")
    given = structs.Tables(
        weights=rows.data_ptr(),
        tables=tables.data_ptr(),
        groups=rows.shape[0],
        n=rows.shape[1],
        entries=tables.shape[1],
        dtype=dtype_of(library(), rows.dtype),
        codes=codes.data_ptr(),
        sums=pointer(sums),
        counts=pointer(counts),
    )
    getattr(structs, name)(given, threads=torch.get_num_threads())
