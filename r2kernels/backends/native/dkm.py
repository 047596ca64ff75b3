"""DKM: the passes that algorithms/ iterates, over the weights, or for 16 bits on the CPU over the values they have."""

import torch

from ... import lists
from .extension import NO_TABLE, Half, pointer

# weights of a 16-bit tensor from which on DKM works on its values
TABLED = {"euclidean": 2**16, "sqeuclidean": 2**13}


def functions(library):
    """name -> pass"""
    return {
        "update": library.dkm_update,
        "output": library.dkm_output,
        "upstream": library.dkm_upstream,
        "recur": library.dkm_recur,
        "gradient": library.dkm_gradient,
        "jacobian": library.dkm_jacobian,
        "assign": library.dkm_assign,
    }


class NativeClusterings(Half):
    def DKM(self, weights, tau, clusters, metric, d, layout):
        halves = d == 1 and not self.on_gpu and weights[0].element_size() == 2
        if halves and max([w.numel() for w in weights]) >= TABLED[metric]:
            return ValueDKM(self, weights, tau, clusters, metric)
        return NativeDKM(self, weights, tau, clusters, metric, d, layout)

    def assign_fwd(self, weights, centroids, clusters, d, layout):
        size = centroids.abs().amax((1, 2))  # its scale is all that `assign` takes of a tau
        return NativeDKM(self, weights, size, clusters, "euclidean", d, layout).assign(centroids)


class NativeDKM:
    """The passes of `reference.DKM` over a list. `counts`: Table of how many weights there are of each value."""

    def __init__(self, native, weights, tau, clusters, metric, d, layout, counts=NO_TABLE):
        self.native, self.weights, self.clusters, self.geometry = native, weights, clusters, (d, layout)
        self.signed, self.device = metric == "euclidean" and d == 1, weights[0].device
        self.listed, self.plan, self.tensors = native.listed(weights, d, layout, lists.row_plan)
        (self.table,) = native.tables(self.tensors)
        self.metric = getattr(native.structs.Metric, metric)
        self.tau = None if tau is None else tau.contiguous()
        self.sizes = lists.resident(tuple(clusters), torch.int32, self.device)
        self.counts, self.kept = counts, None  # kept: what `upstream` leaves for `recur`
        self.given = None  # gradients of W_hat

    def _run(
        self,
        name,
        old,
        fresh=None,
        upstream=None,
        moments=None,
        steps=1,
        grads=NO_TABLE,
        out=None,
        out_moments=None,
        target=NO_TABLE,
        scratch=False,
    ):
        native, most, room = self.native, old.shape[-2], None
        if scratch:
            size = native.library.dkm_scratch(
                chunks=self.plan.chunks,
                tensors=self.plan.count * steps,
                most=most,
                d=self.geometry[0],
                metric=self.metric,
            )
            room = torch.empty(size, dtype=torch.uint8, device=self.device)
        old, fresh, upstream, moments = [None if t is None else t.contiguous() for t in (old, fresh, upstream, moments)]
        clusters = native.structs.Clusters(
            size=self.sizes.data_ptr(), tau=pointer(self.tau), most=most, metric=self.metric
        )
        device, queue = native.queue(self.device)
        native.passes[name](
            self.listed,
            self.table.address,
            device,
            queue,
            clusters=clusters,
            old=pointer(old),
            fresh=pointer(fresh),
            upstream=pointer(upstream),
            moments=pointer(moments),
            steps=steps,
            grads=grads.address,
            scratch=pointer(room),
            kept=pointer(self.kept),
            out=pointer(out),
            out_moments=pointer(out_moments),
            target=target.address,
            counts=self.counts.address,
        )

    def _incoming(self, grads):
        """The Table of gradients, laid out as the weights: once for the passes that are given the same list."""
        if grads is None:
            return NO_TABLE
        if self.given is not grads:
            self.given, self.lying = grads, lists.like_weights(grads, self.tensors)
            (self.incoming,) = self.native.tables(self.lying)
        return self.incoming

    def _map(self, name, *args, **options):
        made = lists.empty_gradients(self.weights, *self.geometry)
        (target,) = self.native.tables(made)
        self._run(name, *args, **options, target=target, scratch=self.native.on_gpu)
        return made

    def update(self, c, new=None, moments=None):
        """(new centroids, moments), contiguous tensors that may be given."""
        if new is None:
            new, moments = c.new_empty(c.shape), c.new_empty(*c.shape[:2], 3 if self.signed else 1)
        self._run("update", c, out=new, out_moments=moments, scratch=True)
        return new, moments

    def output(self, c, new):
        return self._map("output", c, new)

    def upstream(self, c, grads):
        u = c.new_empty(c.shape)
        self.kept = torch.empty(c.shape[0], c.shape[1] + 1, 4, dtype=torch.float64, device=self.device)
        self._run("upstream", c, grads=self._incoming(grads), out=u, scratch=True)
        return u

    def recur(self, c, new, u, moments, grads=None):
        out = c.new_empty(c.shape)
        self._run("recur", c, new, u, moments, grads=self._incoming(grads), out=out, scratch=True)
        return out

    def gradient(self, steps, grads):
        """`grads` None: as if they were 0."""
        return self._map("gradient", *lists.stacked(steps), steps=len(steps), grads=self._incoming(grads))

    def jacobian(self, c, new, moments):
        J = torch.empty(c.shape[0], c.shape[1], c.shape[1], dtype=torch.float64, device=self.device)
        self._run("jacobian", c, new, None, moments, out=J, scratch=True)
        return J

    def assign(self, centroids):
        d, layout = self.geometry
        codes = [
            torch.empty(w.numel() // d, dtype=torch.uint8 if k <= 256 else torch.int32, device=self.device)
            for w, k in zip(self.weights, self.clusters, strict=True)
        ]
        (target,) = self.native.tables(codes)
        self._run("assign", centroids, target=target)
        return [lists.in_layout_order(code, w, d, layout) for code, w in zip(codes, self.weights, strict=True)]


class ValueDKM:
    """DKM for scalars of 16 bits on the CPU: the passes over the values that occur, each as often as it does, and
    look-ups for what every weight gets. Smaller tensors go through them as they are, in float32."""

    def __init__(self, native, weights, tau, clusters, metric):
        self.native, self.weights = native, weights
        self.tensors, _ = lists.dense(weights)
        least = TABLED[metric]
        self.tabled = [i for i, w in enumerate(weights) if w.numel() >= least]
        of = [self.tensors[i] for i in self.tabled]
        self.listed, self.plan, of = native.listed(of, 1, "output", lists.row_plan)
        (self.table,) = native.tables(of)
        self.most = native.contract["half_values"]
        self.slots = torch.empty(len(of), self.most, dtype=torch.uint16, device="cpu")
        values, self.counts = torch.empty(2, len(of), self.most, dtype=torch.float32, device="cpu")
        self.sizes = torch.empty(len(of), dtype=torch.int64, device="cpu")
        self._call(native.library.dkm_collect, values=values, counts=self.counts)
        self.values = [w if w.numel() >= least else w.float() for w in self.tensors]
        counts = [None] * len(weights)
        for row, (i, size) in enumerate(zip(self.tabled, self.sizes.tolist(), strict=True)):
            self.values[i], counts[i] = values[row, :size], self.counts[row]
        (counts,) = native.tables(counts)
        self.inner = NativeDKM(native, self.values, tau, clusters, metric, 1, "output", counts)
        self.signed, self.clusters = self.inner.signed, clusters
        self.update, self.jacobian = self.inner.update, self.inner.jacobian

    def _call(self, function, values=None, counts=None, grads=None, sums=None, shift=None, factor=None, targets=None):
        """`grads`, `shift`, `factor` and `targets` are lists of a tensor for each weight."""
        grads, shift, factor, targets = [
            NO_TABLE if ts is None else self.native.tables([ts[i] for i in self.tabled])[0]
            for ts in (grads, shift, factor, targets)
        ]
        device, queue = self.native.queue(self.weights[0].device)
        function(
            self.listed,
            self.table.address,
            device,
            queue,
            slots=self.slots.data_ptr(),
            values=pointer(values),
            counts=pointer(counts),
            sizes=self.sizes.data_ptr(),
            grads=grads.address,
            sums=pointer(sums),
            shift=shift.address,
            factor=factor.address,
            targets=targets.address,
        )

    def _spread(self, shift, factor=None, grads=None):
        made = lists.empty_gradients(self.weights)
        self._call(self.native.library.dkm_look_up, shift=shift, factor=factor, grads=grads, targets=made)
        for i in set(range(len(made))) - set(self.tabled):
            made[i].copy_(shift[i] if factor is None else shift[i] + factor[i] * grads[i])
        return made

    def output(self, c, new):
        return self._spread(self.inner.output(c, new))

    def upstream(self, c, grads):
        grads = lists.like_weights(grads, self.tensors)
        sums = torch.empty(len(self.tabled), self.most, dtype=torch.float32, device="cpu")
        self._call(self.native.library.dkm_sum_by_value, grads=grads, sums=sums)
        rows = {i: row for row, i in enumerate(self.tabled)}
        self.sums = [sums[rows[i], : self.values[i].numel()] if i in rows else g.float() for i, g in enumerate(grads)]
        return self.inner.upstream(c, self.sums)

    def recur(self, c, new, u, moments, grads=None):
        return self.inner.recur(c, new, u, moments, None if grads is None else self.sums)

    def gradient(self, steps, grads):
        """dL/dW is linear in the gradient of W_hat, which enters the last iteration alone."""
        c, new, u, moments, _ = steps[0]
        factor = self.inner.gradient(
            [(c, new, torch.zeros_like(u), moments, True)], [torch.ones_like(v) for v in self.values]
        )
        return self._spread(self.inner.gradient(steps, None), factor, lists.like_weights(grads, self.tensors))
