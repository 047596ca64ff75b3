"""Hard k-means of rows of d numbers: all groups of a list in one call, on the CPU."""

from array import array

import torch

from ...contract import accumulator
from .extension import dtype_of, library, pointer


def fit_rows(rows, clusters, weights, max_iter, draws):
    """`algorithms.kmeans.fit` of d > 1 for each of a list of contiguous matrices (N, d) of one d and dtype: a list of
    (K, d) of the accumulator's dtype.

    `clusters`: K of each. `weights`: None, or for each group None or N float64 numbers >= 0, not all 0. `draws`:
    `algorithms.kmeans.draws`.
    """
    structs, first = library(), rows[0]
    weights = [None] * len(rows) if weights is None else weights
    drawn = []
    for matrix, k, weight in zip(rows, clusters, weights, strict=True):
        found = draws(len(matrix), k)
        if weight is not None and found[0] is not None:
            found = draws(int(weight.count_nonzero()), k)
        drawn.append(found)
    d = first.shape[1]
    made = torch.empty(sum(clusters), d, dtype=accumulator(first.dtype), device="cpu").split(clusters)
    sizes, counts = array("q", map(len, rows)), array("q", clusters)
    seeds = array("q", [0 if seeds is None else len(seeds) for seeds, _ in drawn])
    tables = [
        array("q", map(pointer, tensors))
        for tensors in (rows, weights, [seeds for seeds, _ in drawn], [uniform for _, uniform in drawn], made)
    ]
    rows_at, weights_at, drawn_at, uniform_at, out_at = (table.buffer_info()[0] for table in tables)
    groups = structs.RowGroups(
        rows=rows_at,
        weights=weights_at,
        drawn=drawn_at,
        uniform=uniform_at,
        out=out_at,
        sizes=sizes.buffer_info()[0],
        clusters=counts.buffer_info()[0],
        seeds=seeds.buffer_info()[0],
        count=len(rows),
        d=d,
        dtype=dtype_of(structs, first.dtype),
        max_iter=max_iter,
    )
    structs.cpu.fit_rows(groups=groups, threads=torch.get_num_threads())
    return list(made)
