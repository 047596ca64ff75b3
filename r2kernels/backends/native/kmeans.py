"""Hard k-means: the exact programme for scalars."""

import torch

from .extension import library


def partition(prefix, clusters):
    """`reference.kmeans.partition` in C++; `prefix` is a contiguous float64 tensor on the CPU."""
    starts = torch.empty(clusters, dtype=torch.int64, device="cpu")
    library().partition(
        prefix=prefix.data_ptr(), cells=prefix.shape[1] - 1, clusters=clusters, starts=starts.data_ptr()
    )
    return starts
