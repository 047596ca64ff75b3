"""The standard deviation of a sample of sharded weights: of the same numbers as of the whole weight, each taken where
it lies."""

import functools

import torch

from ..reference.lasting import lasting
from ..reference.sample import NUMBERS, dimensions, places
from .losses import merged_statistics
from .shards import Shards, region


def sampled_std(kernel, row, call):
    """`sampled_std_fwd` of lists with DTensors."""

    def run(weights):
        shards = Shards(weights)
        samples = [_here(w, shard) for w, shard in zip(weights, shards.local, strict=True)]
        table = call["weight_stats_fwd"](samples)
        counts = shards.constant([x.numel() for x in samples])[:, None]
        return merged_statistics(shards, counts, table)[:, 3].to(table.dtype)

    return run


def _here(w, shard):
    """Those of the numbers that stand for w that lie here."""
    if w.numel() < 2 * NUMBERS:
        return shard.reshape(-1)
    spans = tuple([(s.start, s.stop) for s in region(w)])
    order, found = _places(tuple(w.shape), w.stride(), spans, shard.device)
    return shard.permute(order).reshape(-1)[found]


@functools.lru_cache(maxsize=4096)
def _places(shape, strides, spans, device):
    """(the order of dimensions in which numbers are counted, which numbers of the shard are in the sample)"""
    whole = torch.empty_strided(shape, strides, dtype=torch.float32, device="meta")
    order = dimensions(whole)
    at = torch.unravel_index(places(whole.numel(), "cpu"), [shape[i] for i in order])
    spans = [spans[i] for i in order]
    inside = torch.stack([(a >= low) & (a < high) for a, (low, high) in zip(at, spans, strict=True)]).all(0)
    found = torch.zeros(int(inside.sum()), dtype=torch.int64, device="cpu")
    for a, (low, high) in zip(at, spans, strict=True):
        found = found * (high - low) + a[inside] - low
    return order, lasting(lambda: found.to(device), device, "the sample of a sharded weight")
