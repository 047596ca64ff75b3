"""The quantizers of sharded tensors. A forward needs no message, a backward one: the gradients of the parameters are
summed over the shards."""

import torch

from ..reference.quantizers import dorefa_bwd_of_maximum
from .shards import Shards, region


def forward(kernel, row, call):
    def run(xs, *args):
        shards = Shards(xs)
        given, options = args[: row.parameters], args[row.parameters :]
        return shards.like(kernel(shards.local, *_Channels(shards, row, options).here(given), *options))

    return run


def backward(kernel, row, call):
    def run(gs, xs, *args):
        shards = Shards(xs)
        given, options = args[: row.parameters], args[row.parameters :]
        channels, gs = _Channels(shards, row, options), shards.aligned(gs)
        if row.name == "dorefa" and options[0] > 1 and not options[1]:
            return shards.like(_dorefa_backward(kernel, gs, shards, *given, options[0]))
        result = kernel(gs, shards.local, *channels.here(given), *options)
        made, *learned = result if row.learned else (result,)
        return (shards.like(made), *channels.summed(learned)) if row.learned else shards.like(made)

    return run


class _Channels:
    """Which numbers of a flat parameter belong to the shards here: with an axis those of their channels, else all."""

    def __init__(self, shards, row, options):
        self.shards = shards
        self.axis = options[2] if row.name == "lsq" else None
        self.scaled = row.name == "lsq"
        if self.axis is None:
            self.sizes = [1] * len(shards.local)
            return
        self.sizes = [w.shape[self.axis] for w in shards.weights]
        self.spans = [region(w)[self.axis] for w in shards.weights]

    def here(self, given):
        if self.axis is None:
            return given
        return [
            torch.cat([part[span] for part, span in zip(p.split(self.sizes), self.spans, strict=True)]) for p in given
        ]

    def summed(self, learned):
        """The gradients of flat parameters from those of the shards. LSQ's are divided by the root of the numbers of a
        channel of the shard."""
        tables = [self._placed(g.double() * self._roots() if self.scaled else g.double()) for g in learned]
        totals = self.shards.summed(*tables)
        return [self._flat(total).to(g.dtype) for total, g in zip(totals, learned, strict=True)]

    def _roots(self):
        """For every number here: the root of the share that the shard has of its channel."""
        shares = []
        for w, shard in zip(self.shards.weights, self.shards.local, strict=True):
            channels = [1 if self.axis is None else t.shape[self.axis] for t in (w, shard)]
            whole, here = (max(t.numel() // max(n, 1), 1) for t, n in zip((w, shard), channels, strict=True))
            shares += [(here / whole) ** 0.5] * channels[1]
        return self.shards.constant(shares)

    def _flat(self, table):
        """The inverse of `_placed`, of sums."""
        if self.axis is None:
            return table[:, 0]
        return torch.cat([row[:size] for row, size in zip(table, self.sizes, strict=True)])

    def _placed(self, g):
        """(L, most channels) with the numbers of the channels here, zeros for all others."""
        if self.axis is None:
            return g[:, None]
        table = g.new_zeros(len(self.sizes), max(self.sizes))
        pieces = g.split([span.stop - span.start for span in self.spans])
        for row, span, piece in zip(table, self.spans, pieces, strict=True):
            row[span] = piece
        return table


def _dorefa_backward(kernel, gs, shards, scale, bits):
    """What passes through max|t| takes a sum over all shards."""
    made = kernel(gs, shards.local, scale, bits, True)
    products = [g.to(scale.dtype) * x.to(scale.dtype).tanh() for g, x in zip(gs, shards.local, strict=True)]
    (totals,) = shards.summed(torch.stack([p.sum(dtype=torch.float64) for p in products])[:, None])
    return [
        g + dorefa_bwd_of_maximum(x, of_x, total[0].to(scale.dtype), bits).to(g.dtype)
        for g, x, of_x, total in zip(made, shards.local, scale, totals, strict=True)
    ]
