"""DKM's passes over sharded weights: those of a backend over the shards, their K-sized results merged.

A forward of T iterations takes T messages of K (d + 3) numbers for each weight, a backward one more for each pass over
the K-sized numbers; W_hat and dL/dW take none.
"""

import torch

from ..reference import parameters
from .shards import Shards, is_sharded, local


def over(DKM):
    """A backend's DKM as a class that takes lists with DTensors."""

    def passes(weights, *problem):
        return ShardedDKM(DKM, weights, *problem) if is_sharded(weights) else DKM(weights, *problem)

    return passes


class ShardedDKM:
    """The passes over the whole weights. Centroids, moments and their gradients are those of all shards, W_hat and
    gradients of weights DTensors. A rank whose shards are all empty has no passes of its own."""

    def __init__(self, DKM, weights, tau, clusters, metric, d, layout):
        self.shards, self.clusters = Shards(weights), clusters
        self.weights = self.shards.local
        self.signed = metric == "euclidean" and d == 1
        self.at = [i for i, w in enumerate(self.weights) if w.numel()]
        self.here, self._given = None, (None, None)
        if self.at:
            kept = tuple([clusters[i] for i in self.at])
            self.here = DKM([self.weights[i] for i in self.at], self._own(tau), kept, metric, d, layout)

    def _own(self, x):
        return x if len(self.at) == len(self.weights) else x.index_select(0, self._places())

    def _places(self):
        return self.shards.constant(self.at, torch.int64)

    def _placed(self, x, like):
        """(L, ...) float64 with these numbers of the weights that lie here, zeros for those of others."""
        if x is not None and len(self.at) == len(self.weights):
            return x.double()
        placed = torch.zeros(len(self.weights), *like.shape[1:], dtype=torch.float64, device=like.device)
        return placed if x is None else placed.index_copy_(0, self._places(), x.double())

    def _summed(self, x, like):
        return self.shards.summed(self._placed(x, like))[0].to(like.dtype)

    def update(self, c, *out):
        """(new centroids, moments): of every shard [S, S (c' - c), and signed also its sums of signs about c]."""
        d = c.shape[2]
        sums = None
        if self.here:
            own = self._own(c)
            new, moments = (t.double() for t in self.here.update(own))
            S, moved = moments[..., :1], new - own.double()
            sums = [S, S * moved]
            if self.signed:
                sums += [moments[..., 1:2], moments[..., 2:3] + moments[..., 1:2] * moved]
            sums = torch.cat(sums, -1)
        like = c.new_empty(*c.shape[:2], d + (3 if self.signed else 1))
        (total,) = self.shards.summed(self._placed(sums, like))
        S, moved = total[..., :1], total[..., 1 : 1 + d]
        moved = moved / torch.where(S == 0, 1, S)
        new = (c.double() + moved).to(c.dtype)
        moments = [S]
        if self.signed:
            signs = total[..., 2:3]
            moments += [signs, total[..., 3:4] - signs * (new.double() - c.double())]
        made = new, torch.cat(moments, -1).to(c.dtype)
        for to, result in zip(out, made, strict=False):
            to.copy_(result)
        return made

    def output(self, c, new):
        made = self.here.output(self._own(c), self._own(new)) if self.here else []
        return self._like(made)

    def _like(self, made):
        """DTensors like the weights, of what was made of those that are not empty."""
        made = dict(zip(self.at, made, strict=True))
        empty = [None if i in made else torch.empty_like(w) for i, w in enumerate(self.weights)]
        return self.shards.like([made.get(i, e) for i, e in enumerate(empty)])

    def _some(self, grads):
        """The gradients of W_hat that lie here; the passes of one backward are given the same list."""
        if self._given[0] is not grads:
            aligned = self.shards.aligned(grads)
            self._given = grads, [aligned[i] for i in self.at]
        return self._given[1]

    def upstream(self, c, grads):
        return self._summed(self.here and self.here.upstream(self._own(c), self._some(grads)), c)

    def recur(self, c, new, u, moments, grads=None):
        own = self.here and self.here.recur(
            *[self._own(t) for t in (c, new, u, moments)], None if grads is None else self._some(grads)
        )
        return self._summed(own, c)

    def gradient(self, steps, grads):
        if not self.here:
            return self._like([])
        steps = [(*[self._own(t) for t in step], last) for *step, last in steps]
        return self._like(self.here.gradient(steps, self._some(grads)))

    def jacobian(self, c, new, moments):
        """(L, K, K): every shard's part is divided by the S of all."""
        own = self.here and self.here.jacobian(*[self._own(t) for t in (c, new, moments)])
        like = torch.empty(*c.shape[:2], c.shape[1], dtype=torch.float64, device="meta")
        return self.shards.summed(self._placed(own, like.to(c.device) if own is None else own))[0]


def tolerance(tol, weights):
    """`parameters.tolerance` for weights of which some may be DTensors."""
    if tol is not None or not is_sharded(weights):
        return parameters.tolerance(tol, weights)
    shards = Shards(weights)
    empty = shards.local[0].new_tensor([torch.inf, -torch.inf])
    ends = torch.stack([torch.stack(w.aminmax()) if w.numel() else empty for w in shards.local])
    (ranges,) = shards.merged([ends], lambda part, table: (table[..., 1].amax(0) - table[..., 0].amin(0),))
    return 1e-6 * ranges


def assign(kernel, row, call):
    """Codes of the rows of the shards here."""

    def run(weights, *args):
        return kernel([local(w) for w in weights], *args)

    return run
