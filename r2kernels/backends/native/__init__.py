"""Launchers onto the extension: the same lines for `_C.cpu` and `_C.cuda`. The only caller of `_C`."""

import importlib
from array import array

import torch

from ... import lists
from ...contract import accumulator
from .quantizers import Quantizers
from .regularizers import Regularizers

_DTYPE = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
STATE = 8  # numbers in a chunk's partial state
CODES = 65536  # of 16 bits
TABLED = {"euclidean": 2**16, "sqeuclidean": 2**13}  # weights of a 16-bit tensor from which on DKM works on its values
SAVED = {"l_inf": 2, "margin": 1, "soft_min_max": 8, "soft_extrema": 8, "kure": 4}


def load(name):
    try:
        extension = importlib.import_module("r2kernels._C")
    except ModuleNotFoundError as error:
        raise ImportError(
            "the extension was not built: at installation no C++ compiler was found, or the build was cut off"
        ) from error
    if name == "cpu":
        return Native(extension.cpu, "cpu")
    if not hasattr(extension, "cuda"):
        raise ImportError("the extension was built without CUDA: no nvcc was found then, or R2KERNELS_CUDA=0 was set")
    problem = extension.cuda.problem()
    if problem:
        raise RuntimeError(problem)
    return Native(extension.cuda, "cuda")


def partition(prefix, clusters):
    """`reference.kmeans.partition` in C++; `prefix` is a contiguous float64 tensor on the CPU."""
    starts = torch.empty(clusters, dtype=torch.int64)
    importlib.import_module("r2kernels._C").partition(
        prefix.data_ptr(), prefix.shape[1] - 1, clusters, starts.data_ptr()
    )
    return starts


def on_codes(name, *args):
    """A function of the extension on packed or coded codes on the CPU: tensors are given by their address, the number of threads is added."""
    addressed = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
    return getattr(importlib.import_module("r2kernels._C").codes, name)(*addressed, torch.get_num_threads())


class Native(Quantizers, Regularizers):
    """The ops of one half of the extension."""

    def __init__(self, library, kind):
        self.library, self.devices, self.on_gpu = library, (kind,), kind == "cuda"

    def _queue(self, device):
        """(device index, stream) on a GPU, (0, number of threads) on the CPU."""
        if self.on_gpu:
            index = device.index if device.index is not None else torch.cuda.current_device()
            return index, torch._C._cuda_getCurrentRawStream(index)
        return 0, torch.get_num_threads()

    @staticmethod
    def code_of(dtype):
        return _DTYPE[dtype]

    def _list(self, weights, d, layout, plan_of=lists.plan):
        """(arguments that describe the list to the extension, plan, what must stay alive during the call)."""
        device = weights[0].device
        tensors, runs = lists.dense(weights, d, layout)
        plan = plan_of(tensors, runs, d, device)
        table = lists.device_table(tensors, device) if self.on_gpu else lists.host_table(tensors)
        described = (
            _address(table),
            plan.tensors.data_ptr(),
            plan.owner.data_ptr(),
            plan.count,
            plan.chunks,
            plan.chunk,
            d,
            _DTYPE[weights[0].dtype],
        )
        return described, plan, (tensors, table)

    def _forward(self, op, weights, d, layout, out, saved, first=None, second=None, flag=False):
        described, plan, alive = self._list(weights, d, layout)
        partial = torch.empty(plan.chunks, STATE, dtype=out.dtype, device=out.device)
        getattr(self.library, op + "_fwd")(
            described,
            _pointer(first),
            _pointer(second),
            flag,
            partial.data_ptr(),
            out.data_ptr(),
            _pointer(saved),
            *self._queue(out.device),
        )
        del alive
        return out, saved

    def _backward(self, op, grad, weights, d, layout, saved, out, first=None, second=None, parameter_gradient=None):
        described, _, alive = self._list(weights, d, layout)
        gradients, target, table = self._target(weights, d, layout, out)
        if grad.dim() > 1:
            grad = grad.contiguous()
        getattr(self.library, op + "_bwd")(
            described,
            grad.data_ptr(),
            grad.stride(-1) if grad.dim() == 1 else 1,
            _pointer(first),
            _pointer(second),
            saved.data_ptr(),
            target,
            out is not None,
            _pointer(parameter_gradient),
            *self._queue(grad.device),
        )
        del alive, table
        return gradients

    def _target(self, weights, d, layout, out):
        """(gradients, the address that a kernel is given for them, what must stay alive during the call)"""
        gradients = lists.empty_gradients(weights, d, layout) if out is None else out
        if self.on_gpu and out is None:
            return gradients, gradients[0].data_ptr(), None
        table = lists.device_table(gradients, gradients[0].device) if self.on_gpu else lists.host_table(gradients)
        return gradients, _address(table), table

    def l_inf_fwd(self, weights, d, layout):
        return self._forward("l_inf", weights, d, layout, *lists.empty_state(weights, d, SAVED["l_inf"]))

    def l_inf_bwd(self, grad, weights, saved, d, layout, out=None):
        return self._backward("l_inf", grad, weights, d, layout, saved, out)

    def margin_fwd(self, weights, M, k, d, layout):
        return self._forward("margin", weights, d, layout, *lists.empty_state(weights, d, SAVED["margin"]), M, k)

    def margin_bwd(self, grad, weights, M, k, saved, d, layout, out=None):
        g_M = torch.empty_like(M)
        return self._backward("margin", grad, weights, d, layout, saved, out, M, k, g_M), g_M

    def soft_min_max_fwd(self, weights, alpha, alpha_grad, d, layout):
        return self._forward(
            "soft_min_max",
            weights,
            d,
            layout,
            *lists.empty_state(weights, d, SAVED["soft_min_max"]),
            alpha,
            None,
            alpha_grad,
        )

    def soft_min_max_bwd(self, grad, weights, alpha, saved, d, layout, out=None):
        g_alpha = torch.empty_like(alpha)
        return self._backward("soft_min_max", grad, weights, d, layout, saved, out, alpha, None, g_alpha), g_alpha

    def soft_extrema_fwd(self, weights, alpha, alpha_grad, d, layout):
        extrema = torch.empty(2, len(weights), d, dtype=alpha.dtype, device=alpha.device)
        return self._forward(
            "soft_extrema",
            weights,
            d,
            layout,
            extrema,
            lists.empty_state(weights, d, SAVED["soft_extrema"])[1],
            alpha,
            None,
            alpha_grad,
        )

    def soft_extrema_bwd(self, grad, weights, alpha, saved, d, layout, out=None):
        g_alpha = torch.empty_like(alpha)
        return self._backward("soft_extrema", grad, weights, d, layout, saved, out, alpha, None, g_alpha), g_alpha

    def kure_fwd(self, weights, target):
        return self._forward("kure", weights, 1, "output", *lists.empty_state(weights, 1, SAVED["kure"]), target)

    def kure_bwd(self, grad, weights, target, saved, out=None):
        return self._backward("kure", grad, weights, 1, "output", saved, out, target)

    def weight_stats_fwd(self, weights):
        out = torch.empty(len(weights), 6, dtype=accumulator(weights[0].dtype), device=weights[0].device)
        return self._forward("weight_stats", weights, 1, "output", out, None)[0]

    def DKM(self, weights, tau, clusters, metric, d, layout):
        if (
            d == 1
            and not self.on_gpu
            and weights[0].element_size() == 2
            and max([w.numel() for w in weights]) >= TABLED[metric]
        ):
            return ValueDKM(self, weights, tau, clusters, metric)
        return DKM(self, weights, tau, clusters, metric, d, layout)

    def assign_fwd(self, weights, centroids, clusters, d, layout):
        return DKM(self, weights, None, clusters, "euclidean", d, layout).assign(centroids)


class DKM:
    """The passes of `reference.DKM` over a list."""

    def __init__(self, native, weights, tau, clusters, metric, d, layout, counts=None):
        self.native, self.weights, self.clusters, self.geometry = native, weights, clusters, (d, layout)
        self.signed = metric == "euclidean" and d == 1
        self.device = weights[0].device
        self.described, self.plan, self.alive = native._list(weights, d, layout, lists.row_plan)
        self.tensors, self.squared = self.alive[0], int(metric == "sqeuclidean")
        self.tau = None if tau is None else tau.contiguous()
        self.sizes = lists.sizes(tuple(clusters), self.device)
        self.counts, self.kept = counts, None  # counts: addresses of how many weights there are of each value

    def _run(
        self,
        name,
        old,
        fresh=None,
        upstream=None,
        moments=None,
        steps=1,
        grads=None,
        out=None,
        out_moments=None,
        target=0,
        scratch=False,
    ):
        native, most = self.native, old.shape[-2]
        room = None
        if scratch:
            size = native.library.dkm_scratch(most, self.geometry[0], self.squared)
            room = torch.empty(self.plan.chunks * size, dtype=torch.uint8, device=self.device)
        inputs = [None if t is None else t.contiguous() for t in (old, fresh, upstream, moments)]
        passed = (
            *map(_pointer, inputs),
            steps,
            _address(grads),
            *map(_pointer, (room, self.kept, out, out_moments)),
            target,
            _address(self.counts),
        )
        clusters = self.sizes.data_ptr(), _pointer(self.tau), most, self.squared
        getattr(native.library, "dkm_" + name)(self.described, clusters, passed, *native._queue(self.device))

    def _table(self, tensors):
        return lists.device_table(tensors, self.device) if self.native.on_gpu else lists.host_table(tensors)

    def _incoming(self, grads):
        """(table of addresses, what must stay alive) of gradients laid out as the weights"""
        if grads is None:
            return None, None
        grads = lists.like_weights(grads, self.tensors)
        return self._table(grads), grads

    def _map(self, name, *args, **options):
        made = lists.empty_gradients(self.weights, *self.geometry)
        table = None if self.native.on_gpu else self._table(made)
        self._run(name, *args, **options, target=made[0].data_ptr() if table is None else _address(table))
        return made

    def update(self, c):
        new, moments = c.new_empty(c.shape), c.new_empty(*c.shape[:2], 3 if self.signed else 1)
        self._run("update", c, out=new, out_moments=moments, scratch=True)
        return new, moments

    def output(self, c, new):
        return self._map("output", c, new)

    def upstream(self, c, grads):
        u = c.new_empty(c.shape)
        self.kept = torch.empty(c.shape[0], c.shape[1] + 1, 4, dtype=torch.float64, device=self.device)
        table, alive = self._incoming(grads)
        self._run("upstream", c, grads=table, out=u, scratch=True)
        del alive
        return u

    def recur(self, c, new, u, moments, grads=None):
        out = c.new_empty(c.shape)
        table, alive = self._incoming(grads)
        self._run("recur", c, new, u, moments, grads=table, out=out, scratch=True)
        del alive
        return out

    def gradient(self, steps, grads):
        """`grads` None: as if they were 0."""
        table, alive = self._incoming(grads)
        made = self._map(
            "gradient",
            *[torch.stack(arrays) for arrays in zip(*[step[:4] for step in steps], strict=True)],
            steps=len(steps),
            grads=table,
        )
        del alive
        return made

    def jacobian(self, c, new, moments):
        J = torch.empty(c.shape[0], c.shape[1], c.shape[1], dtype=torch.float64, device=self.device)
        self._run("jacobian", c, new, None, moments, out=J, scratch=True)
        return J

    def assign(self, centroids):
        codes = [
            torch.empty(
                w.numel() // self.geometry[0], dtype=torch.uint8 if k <= 256 else torch.int32, device=self.device
            )
            for w, k in zip(self.weights, self.clusters, strict=True)
        ]
        table = self._table(codes)
        self._run("assign", centroids, target=_address(table))
        return [lists.in_layout_order(code, w, *self.geometry) for code, w in zip(codes, self.weights, strict=True)]


class ValueDKM:
    """DKM for scalars of 16 bits on the CPU: the passes over the values that occur, each as often as it does, and look-ups for what every weight gets.
    Smaller tensors go through them as they are, in float32."""

    def __init__(self, native, weights, tau, clusters, metric):
        self.native, self.weights = native, weights
        self.tensors, _ = lists.dense(weights)
        least = TABLED[metric]
        self.tabled = [i for i, w in enumerate(weights) if w.numel() >= least]
        of = [self.tensors[i] for i in self.tabled]
        self.described, self.plan, self.alive = native._list(of, 1, "output", lists.row_plan)
        self.slots = torch.empty(len(of), CODES, dtype=torch.uint16)
        values, counts = torch.empty(2, len(of), CODES)
        sizes = torch.empty(len(of), dtype=torch.int64)
        self._call("collect", values=values, counts=counts, sizes=sizes)
        self.sizes, found, table = (
            sizes,
            [w if w.numel() >= least else w.float() for w in self.tensors],
            array("q", [0] * len(weights)),
        )
        for row, (i, size) in enumerate(zip(self.tabled, sizes.tolist(), strict=True)):
            found[i], table[i] = values[row, :size], counts[row].data_ptr()
        self.counts, self.values = counts, found
        self.inner = DKM(native, found, tau, clusters, metric, 1, "output", table)
        self.signed, self.clusters, self.update, self.jacobian = (
            self.inner.signed,
            clusters,
            self.inner.update,
            self.inner.jacobian,
        )

    def _call(
        self, name, values=None, counts=None, sizes=None, grads=None, sums=None, shift=None, factor=None, targets=None
    ):
        tables = [
            None if t is None else lists.host_table([t[i] for i in self.tabled])
            for t in (grads, shift, factor, targets)
        ]
        addresses = [_pointer(t) for t in (self.slots, values, counts, self.sizes if sizes is None else sizes)]
        passed = *addresses, _address(tables[0]), _pointer(sums), *map(_address, tables[1:])
        getattr(self.native.library, "dkm_" + name)(self.described, passed, torch.get_num_threads())

    def _spread(self, shift, factor=None, grads=None):
        made = lists.empty_gradients(self.weights)
        self._call("look_up", shift=shift, factor=factor, grads=grads, targets=made)
        for i in set(range(len(made))) - set(self.tabled):
            made[i].copy_(shift[i] if factor is None else shift[i] + factor[i] * grads[i])
        return made

    def output(self, c, new):
        return self._spread(self.inner.output(c, new))

    def upstream(self, c, grads):
        grads = lists.like_weights(grads, self.tensors)
        sums = torch.empty(len(self.tabled), CODES)
        self._call("sum_by_value", grads=grads, sums=sums)
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


def _pointer(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _address(table):
    return 0 if table is None else table.data_ptr() if isinstance(table, torch.Tensor) else table.buffer_info()[0]
