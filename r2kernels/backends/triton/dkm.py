"""DKM's passes, and hard assignment: the number of launches does not depend on that of the tensors."""

import torch
import triton

from ... import lists
from . import dkm_rows_kernels as dkm_rows
from . import dkm_scalar_kernels as dkm_scalar
from . import dkm_sums_kernels as dkm_sums
from .dkm_settle_kernels import settle_groups
from .dkm_sums_kernels import JACOBIAN, RECUR, UPDATE, UPSTREAM
from .launch import OPTIONS, current, fields, launch, types

PARTIAL = 2**24  # partial sums at once; where there are more, one group of centroids follows the other
STATES = 2**25  # numbers of rows at once, where they are needed for several tiles of centroids; of more in windows
WINDOW = 1024  # rows: a window has a multiple of it
MERGED = 8  # centroids that a program merges


def unit_of(tau, squared):
    """A power of two for each tensor, as csrc/dkm.h has it: times that, squares of lengths are float32, whatever the
    scale of the weights."""
    exponent, least = torch.frexp(tau).exponent, -16 if squared else -40
    scale = exponent // 2 if squared else exponent
    power = torch.where(scale > 24, -scale, (least - scale).clamp(0, 58)).clamp(min=-100)
    return torch.ldexp(torch.ones_like(tau), torch.where((tau > 0) & tau.isfinite(), power, 0))


class TritonDKM:
    """The passes of `reference.DKM` over a list. W_hat and dL/dW of scalars in the Euclidean metric cost O(1) a weight;
    all else is O(K)."""

    def __init__(self, launcher, weights, tau, clusters, metric, d, layout):
        self.launcher, self.weights, self.clusters, self.geometry = launcher, weights, clusters, (d, layout)
        self.euclidean, self.signed = metric == "euclidean", metric == "euclidean" and d == 1
        self.device, self.types = weights[0].device, types(weights[0].dtype)
        self.tensors, self.runs = lists.dense(weights, d, layout)
        (self.table,) = launcher._tables(self.tensors)
        self.given = None  # gradients of W_hat
        self.count, self.sizes = len(clusters), lists.resident(tuple(clusters), torch.int32, self.device)
        self.scaled = not self.signed and tau.dtype == torch.float32
        if self.scaled:
            self.unit = unit_of(tau, not self.euclidean)
            tau = tau * self.unit * (1 if self.euclidean else self.unit)
        else:
            self.unit = lists.resident((1.0,) * self.count, tau.dtype, self.device)
        self.tau = tau.contiguous()

    def update(self, c, new=None, moments=None):
        """(new centroids, moments), contiguous tensors that may be given."""
        if new is None:
            new, moments = torch.empty_like(c), c.new_empty(*c.shape[:2], 3 if self.signed else 1)
        self._sum(UPDATE, c, out=new, out_moments=moments)
        if self.scaled:
            new /= self.unit[:, None, None]
        return new, moments

    def output(self, c, new):
        return self._map(1, c, new)

    def upstream(self, c, grads):
        u = torch.empty_like(c)
        self._sum(UPSTREAM, c, grads=grads, out=u)
        return u

    def recur(self, c, new, u, moments, grads=None):
        out = torch.empty_like(c)
        self._sum(RECUR, c, new, u, moments, grads, out)
        return out

    def gradient(self, steps, grads):
        return self._map(len(steps), *lists.stacked(steps), grads)

    def jacobian(self, c, new, moments):
        sums = torch.empty(self.count, c.shape[1], c.shape[1], dtype=torch.float64, device=self.device)
        self._sum(JACOBIAN, c, new, out=sums)
        S, diagonal = moments[..., :1].double(), torch.diag_embed(moments[..., 2].double())
        tau = torch.where(self.tau > 0, self.tau, torch.nan).double()
        return torch.where(S == 0, 0, (diagonal - sums) / torch.where(S == 0, 1, S) / tau[:, None, None])

    def assign(self, centroids):
        d = self.geometry[0]
        codes = [
            torch.empty(w.numel() // d, dtype=torch.uint8 if k <= 256 else torch.int32, device=self.device)
            for w, k in zip(self.weights, self.clusters, strict=True)
        ]
        (targets,), plan, most = self.launcher._tables(codes), self._rows(), centroids.shape[1]
        c = self._lengths(centroids, self.unit).contiguous()
        constants = {"ALIGNED": lists.is_aligned(self.tensors), **self._tile(most, False)}
        with current(self.device):
            nearest = launch(dkm_rows.nearest_centroids, **constants)
            given = self.unit, self.sizes, c, plan.chunk, most
            nearest((plan.chunks,), self.table, targets, fields(plan), plan.owner, *given)
        return codes

    def _lengths(self, c, unit):
        return c * unit[:, None, None] if self.scaled else c

    def _rows(self):
        return lists.row_plan(self.tensors, self.runs, self.geometry[0], self.device)

    def _tile(self, most, sums):
        """The constants of a kernel over tiles of centroids by rows"""
        J, R = dkm_rows.tile_of_centroids(most, self.geometry[0], sums, self.launcher.interpreted)
        return {**self.types, "D": self.geometry[0], "J": J, "R": R, **OPTIONS}

    def _given(self, c, new, *others):
        """Contiguous, lengths in the unit; what a pass has no use for is c."""
        c, new = [t if t is None else self._lengths(t, self.unit).contiguous() for t in (c, new)]
        return [c if t is None else t.contiguous() for t in (c, new, *others)]

    def _incoming(self, grads):
        """(table of addresses, gradients laid out as the weights), once for the passes that are given the same list;
        (None, ()) of None."""
        if grads is None:
            return None, ()
        if self.given is not grads:
            self.given, lying = grads, lists.like_weights(grads, self.tensors)
            self.incoming = self.launcher._tables(lying)[0], lying
        return self.incoming

    def _sum(self, mode, c, new=None, u=None, moments=None, grads=None, out=None, out_moments=None):
        most, n_moments = c.shape[-2], 1 if moments is None else moments.shape[-1]
        c, new, u, moments = self._given(c, new, u, moments)
        table, grads = self._incoming(grads)
        plan, sums, maps = self._rows(), self._tile(most, True), self._tile(most, False)
        each, J = dkm_sums.sums_of_mode(mode.value, self.geometry[0], self.signed), sums["J"]
        tiles, beside = -(-most // J), -(-most // each) if mode is JACOBIAN else 1
        group = min(max(PARTIAL // (plan.chunks * beside * each * J), 1), tiles)
        partial = torch.empty(plan.chunks * beside * each * group * J, dtype=c.dtype, device=self.device)
        about = {
            "WITH_G": table is not None,
            "EUCLIDEAN": self.euclidean,
            "ALIGNED": lists.is_aligned([*self.tensors, *grads]),
        }
        problem = self.table, table, fields(plan), plan.owner, self.tau, self.unit, self.sizes, c, new, u, moments
        planes, states, window = 0, None, plan.chunk
        if tiles > 1:
            planes = 2 if mode is not RECUR else 3 if table is None else 3 + self.geometry[0]
            window = min(max(STATES // (plan.chunks * planes * WINDOW), 1) * WINDOW, plan.chunk)
            states = torch.empty(plan.chunks * planes * window, dtype=c.dtype, device=self.device)
        with current(self.device):
            read = launch(dkm_sums.row_states, PLANES=planes, MEAN=mode is RECUR, **about, **maps)
            add = launch(dkm_sums.cluster_sums, MODE=mode, PLANES=planes, SUMS=each, **about, **sums)
            merge = launch(
                dkm_sums.merge_sums,
                MODE=mode,
                SIGNED=self.signed,
                SUMS=each,
                ACC=self.types["ACC"],
                D=self.geometry[0],
                J=J,
                COLUMNS=MERGED,
                LANES=128 if each <= 5 else 32,
                **OPTIONS,
            )
            for first in range(0, tiles, group):
                width = min(group, tiles - first) * J
                for row in range(0, plan.chunk, window):
                    if tiles > 1 and (first == 0 or window < plan.chunk):
                        read((plan.chunks,), *problem, states, plan.chunk, most, n_moments, row, window)
                    place = plan.chunk, most, n_moments, first, width, row, window
                    add((plan.chunks, width // J, beside), *problem, states, partial, *place)
                given = self.tau, self.sizes, c, out, out_moments, plan.chunk, most, first, width
                merge((self.count, -(-width // MERGED), beside), partial, fields(plan), *given)

    def _map(self, steps, c, new, u=None, moments=None, grads=None):
        """What is written like the weights: W_hat, or with `grads` dL/dW summed over the iterations."""
        most, n_moments = c.shape[-2], 1 if moments is None else moments.shape[-1]
        c, new, u, moments = self._given(c, new, u, moments)
        table, grads = self._incoming(grads)
        made = lists.empty_gradients(self.weights, *self.geometry)
        (targets,) = self.launcher._tables(made)
        about = {"GRADIENT": table is not None, "ALIGNED": lists.is_aligned([*self.tensors, *grads, *made])}
        with current(self.device):
            if self.signed:
                self._map_scalars(table, targets, steps, (c, new, u, moments), n_moments, about)
            else:
                plan = self._rows()
                rows = launch(dkm_rows.map_rows, EUCLIDEAN=self.euclidean, **about, **self._tile(most, False))
                problem = self.table, table, targets, fields(plan), plan.owner, self.tau, self.unit, self.sizes
                numbers = plan.chunk, most, n_moments, steps, self.count
                rows((plan.chunks,), *problem, c, new, u, moments, *numbers)
        return made

    def _map_scalars(self, table, targets, steps, arrays, n_moments, about):
        c, jobs, most = arrays[0], steps * self.count, arrays[0].shape[-2]
        bucket = dkm_scalar.bucket_of(most)
        size, cells = dkm_scalar.numbers_of_record(about["GRADIENT"], bucket), dkm_scalar.cells_of(bucket)
        records, headers = c.new_empty(jobs * size), c.new_empty(jobs, dkm_scalar.HEADER.value)
        counts = torch.uint8 if most <= 256 else torch.int16 if most < 2**15 else torch.int32
        before = torch.empty(jobs * cells, dtype=counts, device=self.device)
        constants = {
            "GRADIENT": about["GRADIENT"],
            "BUCKET": bucket,
            "CELLS": cells,
            "ACC": self.types["ACC"],
            **OPTIONS,
        }
        shape = {"INTERVALS": dkm_scalar.INTERVALS, "LANES": dkm_scalar.LANES}
        tables = records, before, headers
        given = self.tau, self.sizes, *tables, self.count, most, n_moments
        fill = launch(dkm_scalar.interval_tables, **shape, **constants)
        fill((jobs, bucket // dkm_scalar.INTERVALS), *arrays, *given)
        plan = lists.plan(self.tensors, None, 1, self.device)
        shape = {"BLOCK": dkm_scalar.BLOCK, "DT": self.types["DT"], "ALIGNED": about["ALIGNED"]}
        registers = dkm_scalar.most_registers(about["GRADIENT"], c.dtype == torch.float64)
        scalars = launch(dkm_scalar.map_scalars, maxnreg=registers, **shape, **constants)
        problem = self.table, table, targets, fields(plan), plan.owner
        scalars((plan.chunks,), *problem, *tables, plan.chunk, steps, self.count)


def assign_fwd(launcher, weights, centroids, clusters, d, layout):
    """Codes come in the order of the rows, not in that of the memory."""
    rows = [(w.transpose(0, -1) if d > 1 and layout == "output" and w.dim() > 1 else w).reshape(-1) for w in weights]
    size = centroids.abs().amax((1, 2))  # its scale is all that `assign` takes of a tau
    return TritonDKM(launcher, rows, size, clusters, "euclidean", d, "contiguous").assign(centroids)


def settled(old, new, squared):
    """`reference.settled` in one launch, a program for each group."""
    groups, clusters, d = old.shape
    old, new = old.contiguous(), new.contiguous()
    made, sound = torch.empty_like(old), torch.empty(groups, dtype=torch.bool, device=old.device)
    spacings = torch.empty(groups, dtype=torch.float64, device=old.device)
    settle = launch(settle_groups, D=d, SQUARED=squared, BLOCK=triton.next_power_of_2(clusters))
    with current(old.device):
        settle((groups,), old, new, made, spacings, sound, clusters)
    return made, spacings, sound
