"""The exact |w| of a given rank among all shards of a weight, by its digits from the highest on.

Told at DIGITS in contract.py: what the digits are, and the tables of which this is made.
"""

import torch


def select(count, merge, rank, dtype):
    """(theta, local_rank): the rank[t]-th smallest |w| of weight t over all shards, counted from 1, in the dtype of
    sums; and how many |w| of this shard are up to it, (L,) int64. NaN is above all numbers.

    `count(prefix, place)` gives the (L, RADIX) table of this shard, `merge(table)` the sum of the tables of all. `rank`
    is (L,) int64: below 1 it gives NaN and 0, above N the largest, and 0 where no shard has any weights. `dtype` is
    that of the weights, which has as many digits as bytes.
    """
    prefix, local_rank, left = torch.zeros_like(rank), torch.zeros_like(rank), rank
    for place in range(dtype.itemsize):
        own = count(prefix, place)
        up_to = merge(own).cumsum(1)
        left = torch.minimum(left, up_to[:, -1])
        digit = (up_to < left[:, None]).sum(1)
        left = left - _below(up_to, digit)
        local_rank = local_rank + _below(own.cumsum(1), digit)
        prefix = prefix * own.shape[1] + digit
    local_rank = local_rank + own.gather(1, digit[:, None])[:, 0]
    theta = _number(prefix, dtype)
    return torch.where(rank < 1, torch.nan, theta), torch.where(rank < 1, 0, local_rank)


def _below(up_to, digit):
    """How many have a smaller digit."""
    before = up_to.gather(1, (digit - 1).clamp(min=0)[:, None])[:, 0]
    return torch.where(digit > 0, before, 0)


def _number(bits, dtype):
    """The number that has these bits."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    return bits.to(integer).view(dtype).to(torch.promote_types(dtype, torch.float32))
