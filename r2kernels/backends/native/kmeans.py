"""Hard k-means of single numbers: groups in one call, and the exact programme alone."""

from array import array

import torch

from ...contract import accumulator
from .extension import dtype_of, half, library, pointer


def fit_lines(groups, clusters, weights, max_iter, zero=False):
    """The centroids of contiguous tensors of one dtype on the CPU: (K,) of each, ascending, in the accumulator's dtype.

    clusters: an int for each. weights: for each float64 numbers, as many, or None. zero: as `preserve_zeros`, but for
    the last bits of the centroid at 0.
    """
    found = list(torch.empty(sum(clusters), dtype=accumulator(groups[0].dtype), device="cpu").split(clusters))
    values, masses, out = (array("q", map(pointer, tensors)) for tensors in (groups, weights, found))
    sizes = array("q", [g.numel() for g in groups])
    masses = masses if any(masses) else None
    _fit(values, sizes, array("q", clusters), masses, out, groups[0].dtype, max_iter, zero)
    return found


def fit_block(block, clusters, weights, max_iter, zero=False):
    """The same of the rows of a contiguous (groups, n) tensor, with (groups, n) weights or None: (groups, K)."""
    groups, n = block.shape
    out = block.new_empty(groups, clusters, dtype=accumulator(block.dtype))

    def rows(tensor):
        step = tensor.stride(0) * tensor.element_size()
        return array("q", range(tensor.data_ptr(), tensor.data_ptr() + groups * step, step))

    numbers = array("q", [n]) * groups, array("q", [clusters]) * groups
    _fit(rows(block), *numbers, None if weights is None else rows(weights), rows(out), block.dtype, max_iter, zero)
    return out


def _fit(pointers, sizes, clusters, weights, out, dtype, max_iter, zero):
    cpu, address = half("cpu"), lambda numbers: 0 if numbers is None else numbers.buffer_info()[0]
    lines = library().LineGroups(
        sizes=address(sizes),
        clusters=address(clusters),
        weights=address(weights),
        out=address(out),
        count=len(sizes),
        dtype=dtype_of(library(), dtype),
        max_iter=max_iter,
        zero=zero,
    )
    cpu.fit_lines(address(pointers), lines, threads=torch.get_num_threads())


def partition(prefix, clusters):
    """`partition` of algorithms/kmeans.py in C++; `prefix` is a contiguous float64 tensor on the CPU."""
    starts = torch.empty(clusters, dtype=torch.int64, device="cpu")
    half("cpu").partition(
        prefix=prefix.data_ptr(), cells=prefix.shape[1] - 1, clusters=clusters, starts=starts.data_ptr()
    )
    return starts
