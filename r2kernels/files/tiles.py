"""How a weight is cut into groups, each with a table of its own, and put together again."""

import math
from typing import NamedTuple

import torch

from .packing import Groups

GRANULARITIES = ("tensor", "channel", "group", "row")


def check_granularity(granularity, group_size, name="the weight"):
    """An error unless these say in one way how weights are cut into groups."""
    if isinstance(granularity, (tuple, list)):
        for value in granularity:
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"granularity of {name} must be of ints or None, got {granularity!r}")
        if len(granularity) != 2 or any(value is not None and value < 1 for value in granularity):
            raise ValueError(f"granularity of {name} must be (rows, columns), each >= 1 or None, got {granularity!r}")
    elif granularity is not None and granularity not in GRANULARITIES:
        raise ValueError(
            f"granularity of {name} must be one of {GRANULARITIES} or (rows, columns), got {granularity!r}"
        )
    if (granularity == "group") > (group_size is not None):
        raise ValueError(f'granularity="group" of {name} needs group_size')
    if group_size is not None and granularity not in (None, "group"):
        raise ValueError(f"group_size={group_size} of {name} cannot be given with granularity={granularity!r}")


def canonical(granularity, group_size):
    """(granularity, group_size) as they are stored: a tuple only where `group_size` does not say the same."""
    if granularity in ("channel", "row"):
        return None, 1
    if not isinstance(granularity, (tuple, list)):
        return None, group_size
    if len(granularity) == 2 and granularity[1] is None:
        return None, granularity[0]
    return tuple(granularity), None


class Block(NamedTuple):
    """Groups of one size that lie side by side."""

    first: int  # how many groups are before these
    counts: tuple  # how many, along each dimension of the view
    tile: tuple  # how large, along the same
    shape: tuple  # of each as it is clustered: flat where rows are single weights, which costs launches less
    each: int  # rows of d in a group
    left: int  # weights that they leave over

    @property
    def count(self):
        return math.prod(self.counts)


class Runs(NamedTuple):
    """How the codes of a weight lie: `Groups` one after the other, of the blocks that have codes."""

    parts: tuple

    @property
    def rows(self):
        return sum(groups.rows for groups in self.parts)

    @property
    def nbytes(self):
        return sum(groups.nbytes for groups in self.parts)


class Geometry:
    """The groups of a weight of this shape, clustered as `form` says.

    With its output channels first it is seen as a `view` of a dimension for each number of the tile, (channels, all
    else) for two, and cut into tiles; those at the ends may be smaller. `blocks`: the full ones, then those at the end
    of the last dimension, of the one before, of both. Within a block they count through the last dimension first.
    """

    def __init__(self, shape, form):
        tile, d = form.granularity or (form.group_size, None), form.cluster_dim
        self.shape = form.channels_first(shape)
        last = len(tile) - 1
        self.view = (*self.shape[:last], math.prod(self.shape[last:]))
        cuts = [()]
        for size, most in zip(self.view, tile, strict=True):
            most = min(most or size, size)
            ends = [(size // most, most), (1, size % most)] if size % most else [(size // most, most)]
            cuts = [(*cut, end) for cut in cuts for end in ends]
        self.blocks, self.groups = [], 0
        for cut in cuts:
            counts, sizes = tuple(count for count, _ in cut), tuple(size for _, size in cut)
            tail = self.shape[last:] if sizes[-1] == self.view[-1] else sizes[-1:]
            shape = (*sizes[:-1], *tail) if d > 1 else (math.prod(sizes),)
            self.blocks.append(Block(self.groups, counts, sizes, shape, *divmod(math.prod(sizes), d)))
            self.groups += self.blocks[-1].count
        self.rows = sum(b.count * b.each for b in self.blocks)
        self.leftovers = sum(b.count * b.left for b in self.blocks)

    def runs(self, bits):
        """How the codes lie in `bits` bits each."""
        return Runs(tuple(Groups(b.count * b.each, b.each, bits) for b in self.blocks if b.each))

    def cut(self, w):
        """[(groups, *shape)] of the blocks of a weight with its output channels first; views where they can be."""
        regions, n = [w.reshape(self.view)], len(self.view)
        for i in range(n):
            ends = list(dict.fromkeys(b.counts[i] * b.tile[i] for b in self.blocks))
            if len(ends) > 1:
                regions = [part for region in regions for part in region.split(ends, i)]
        found = []
        for b, region in zip(self.blocks, regions, strict=True):
            parted = region.reshape([size for pair in zip(b.counts, b.tile, strict=True) for size in pair])
            found.append(parted.permute(*range(0, 2 * n, 2), *range(1, 2 * n, 2)).reshape(b.count, *b.shape))
        return found

    def together(self, stacks):
        """The inverse of `cut`."""
        regions, n = [], len(self.view)
        for b, stack in zip(self.blocks, stacks, strict=True):
            order = [axis for i in range(n) for axis in (i, n + i)]
            sizes = [count * size for count, size in zip(b.counts, b.tile, strict=True)]
            regions.append(stack.reshape(*b.counts, *b.tile).permute(order).reshape(sizes))
        for i in reversed(range(n)):
            ends = len({b.counts[i] * b.tile[i] for b in self.blocks})
            regions = (
                [torch.cat(regions[j : j + ends], i) for j in range(0, len(regions), ends)] if ends > 1 else regions
            )
        return regions[0].reshape(self.shape)

    def pieces(self, w):
        """The groups of a weight with its output channels first."""
        return [w] if self.groups == 1 else [piece for stack in self.cut(w) for piece in stack.unbind()]

    def whole(self, pieces):
        """The inverse of `pieces`."""
        if self.groups == 1:
            return pieces[0]
        return self.together([torch.stack(part) for part in self.split(pieces)])

    def split(self, groups):
        """Something of all groups, by blocks."""
        return [groups[b.first : b.first + b.count] for b in self.blocks]
