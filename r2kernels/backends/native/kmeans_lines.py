"""Hard k-means of scalars on a GPU: groups of up to MOST_VALUES values, a thread block for each."""

import itertools
import math

import torch

from .extension import Half, dtype_of, pointer

MOST_VALUES, MOST_CLUSTERS = 65536, 512
AT_ONCE, SCRATCH = 2**26, 2**28  # values, and bytes to work in


class NativeLines(Half):
    @staticmethod
    def serves_line(n, clusters):
        """Whether `fit_lines` takes groups of so many values."""
        return n <= MOST_VALUES and clusters <= MOST_CLUSTERS

    def fit_lines(self, values, clusters, weights, max_iter):
        """`algorithms.kmeans.fit` of d = 1 for each of a list of vectors of one float32 or float64 dtype: a list of
        (K,), ascending.

        `clusters`: K of each. `weights`: None, or for each vector None or float64 numbers >= 0, not all 0.
        """
        weights = [None] * len(values) if weights is None else weights
        found = [None] * len(values)

        def alike(i):  # sizes within a factor of two lie in one block, those behind their end are filled up
            return (len(values[i]) - 1).bit_length(), weights[i] is None

        for _, group in itertools.groupby(sorted(range(len(values)), key=alike), alike):
            some = list(group)
            stride, most = max(len(values[i]) for i in some), max(clusters[i] for i in some)
            scratch = self.library.lines_scratch(stride=stride, most=most, weighted=weights[some[0]] is not None)
            rows = max(1, min(AT_ONCE // stride, SCRATCH // scratch))
            for first in range(0, len(some), rows):
                part = some[first : first + rows]
                of = [[x[i] for i in part] for x in (values, clusters, weights)]
                for i, centroids in zip(part, self._fit_alike(*of, max_iter, stride, most, scratch), strict=True):
                    found[i] = centroids[: clusters[i]]
        return found

    def _fit_alike(self, values, clusters, weights, max_iter, stride, most, scratch):
        dtype, device = values[0].dtype, values[0].device
        sizes = torch.tensor([len(v) for v in values], device=device)
        there = torch.arange(stride, device=device) < sizes[:, None]
        block = _in_rows(values, there, math.inf)
        finite = (block.isfinite() | ~there).all(1, keepdim=True)
        if weights[0] is None:
            used, weight = there & finite, None
            block = torch.where(used, block, math.inf).sort(dim=1).values
        else:
            weight = _in_rows(weights, there, 0.0)
            used = there & finite & (weight > 0)
            block, order = torch.where(used, block, math.inf).sort(dim=1, stable=True)
            exponent = weight.amax(1, keepdim=True).frexp().exponent.clamp(-1000, 1000)
            weight = torch.where(used, weight, 0).gather(1, order).ldexp(-exponent)
        sizes = used.sum(1, dtype=torch.int32)
        counts = torch.tensor(clusters, dtype=torch.int32, device=device)
        room = torch.empty(len(values) * scratch, dtype=torch.uint8, device=device)
        out = torch.empty(len(values), most, dtype=torch.float64, device=device)
        lines = self.structs.Lines(
            values=block.data_ptr(),
            weights=pointer(weight),
            sizes=sizes.data_ptr(),
            clusters=counts.data_ptr(),
            scratch=room.data_ptr(),
            out=out.data_ptr(),
            count=len(values),
            stride=stride,
            most=most,
            dtype=dtype_of(self.structs, dtype),
            max_iter=max_iter,
        )
        self.library.fit_lines(lines, *self.queue(device))
        return out.to(dtype)


def _in_rows(vectors, there, otherwise):
    """(G, stride) with a vector in each row where `there` is true."""
    numbers = torch.cat(vectors)
    if len(numbers) == there.numel():
        return numbers.view(there.shape)
    return numbers.new_full(there.shape, otherwise).masked_scatter_(there, numbers)
