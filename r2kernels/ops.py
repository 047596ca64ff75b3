"""The ops of the contract as functions: `ops.margin.fwd(weights, M, k, d, layout)`, `ops.margin.bwd(grad, weights,
...)`.

Each is an op of `torch.ops.r2kernels`, with the reference as default and fake kernel. Where nothing traces, the
kernel of the backend that serves the weights is called directly, which saves 3 us a call. DKM's ops run algorithms/
over the passes of a backend, its `DKM`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import contract, empty, reference, sharding
from .algorithms import fixed_point, iterations
from .backends import chosen, select, use_backend
from .contract import Op
from .lists import laid_out

_library = torch.library.Library("r2kernels", "DEF")
# name -> the kernel itself, without the dispatcher; takes `out=`: the gradients are added to these tensors, and
# `needed=`: of each weight whether its gradient has to be made
call = {}
op = {}  # name -> the op of torch's dispatcher


class Pair(NamedTuple):
    """An op's forward and backward."""

    row: Op
    fwd: Callable
    bwd: Callable | None


class PackedReference(reference.DKM):
    """The reference's passes, results where the other backends have them."""

    def update(self, c, *out):
        made = super().update(c)
        for to, result in zip(out, made, strict=False):
            to.copy_(result)
        return made

    def output(self, c, new):
        return laid_out(super().output(c, new), self.weights, *self.geometry)

    def gradient(self, steps, grads):
        return laid_out(super().gradient(steps, grads), self.weights, *self.geometry)


def is_recorded():
    """Whether torch.jit.trace, torch.export or torch.onnx.export records a graph, which may run without this package.

    It is made of the reference's operations; results that are like the weights are then a list.
    """
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def _dkm_fwd(DKM, weights, centroids, repeats, pinned, *problem):
    return iterations.forward(DKM(weights, *problem), centroids, repeats, pinned)


def _dkm_bwd(DKM, grad_centroids, weights, grads, history, moments, gradient, centroid_grad, pinned, *problem):
    passes = DKM(weights, *problem)
    return iterations.backward(passes, grad_centroids, grads, history, moments, gradient, centroid_grad, pinned)


def _dkm_solve(DKM, weights, centroids, tol, max_passes, accelerated, tau, clusters, *rest):
    def passes_of(some):
        return DKM([weights[i] for i in some], tau[some], tuple([clusters[i] for i in some]), *rest)

    return fixed_point.solve(passes_of, centroids, tol, max_passes, accelerated)


_OVER_PASSES = {"dkm_fwd": _dkm_fwd, "dkm_bwd": _dkm_bwd, "dkm_solve": _dkm_solve}


def _packed(function, at, columns):
    """A function of the reference whose first result is like the weights, its argument `at`: laid out as the other
    backends have it, or added to `out`. `columns`: its last arguments are d and layout."""

    def packed(*args, out=None, needed=None):
        result = function(*args)
        made, *others = result if isinstance(result, tuple) else (result,)
        if out is not None:
            made = [o.add_(g) for o, g in zip(out, made, strict=True)]
        else:
            d, layout = args[-2:] if columns else (1, "output")
            made = laid_out(made, args[at], d, layout)
        return (made, *others) if others else made

    return packed


def _of_reference(name, at, op):
    function = getattr(reference, name)
    return _packed(function, at, op.columns) if at == 1 or op.gives_tensors else function


def _kernels(name, at, row, schema):
    """(the op on the reference; on the backend that serves the weights, which are argument `at`; for DTensors)"""
    over_passes, scatters = _OVER_PASSES.get(name), row.scatters
    if over_passes:
        plain = functools.partial(over_passes, PackedReference)

        def passes(args):
            backend = select(args[at][0].device, scatters)
            return PackedReference if backend is None else backend.DKM

        def kernel(*args):
            return over_passes(passes(args), *args)

        def sharded(*args):
            return over_passes(sharding.dkm.over(passes(args)), *args)

        return plain, empty.apart(kernel, plain, row, schema, at), sharded

    plain = _of_reference(name, at, row)

    def kernel(*args, **options):
        backend = select(args[at][0].device, scatters)
        return (plain if backend is None else getattr(backend, name))(*args, **options)

    kernel = empty.apart(kernel, plain, row, schema, at)
    return plain, kernel, sharding.over(name, kernel, row, call)


@torch._disable_dynamo  # a message to other ranks is no part of a graph; imports torch._dynamo when a graph breaks here
def _merged_over_ranks_outside_of_graphs(sharded, *args, **options):
    return sharded(*args, **options)


def _function(name, schema, at, row):
    """The op `name` as a function of the same arguments; the weights are argument `at`."""
    plain, local, sharded = _kernels(name, at, row, schema)

    def kernel(*args, **options):
        return (sharded if sharding.is_sharded(args[at]) else local)(*args, **options)

    recorded = getattr(reference, name, plain)
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    if name != "dkm_solve":  # how often that goes round depends on values
        _library.impl(name, plain, "CompositeExplicitAutograd")
    for key in ("CPU", "CUDA"):
        _library.impl(name, local, key)
    dispatched = getattr(torch.ops.r2kernels, name).default
    call[name], op[name] = kernel, dispatched

    def run(*args, **options):
        if is_recorded():
            return recorded(*args)
        if sharding.is_sharded(args[at]):
            if torch.compiler.is_compiling():
                return _merged_over_ranks_outside_of_graphs(sharded, *args, **options)
            return sharded(*args, **options)
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return dispatched(*args)  # a schema has no room for options that only spare work
        return local(*args, **options)

    return run


def _pair(row):
    backward = row.backward and _function(f"{row.name}_bwd", row.backward, 1, row)
    return Pair(row, _function(f"{row.name}_fwd", row.forward, 0, row), backward)


l_inf = _pair(contract.L_INF)
margin = _pair(contract.MARGIN)
soft_min_max = _pair(contract.SOFT_MIN_MAX)
soft_extrema = _pair(contract.SOFT_EXTREMA)
kure = _pair(contract.KURE)
weight_stats = _pair(contract.WEIGHT_STATS)
sampled_std = _pair(contract.SAMPLED_STD)
bin_reg = _pair(contract.BIN_REG)
msqe = _pair(contract.MSQE)
partial_l2 = _pair(contract.PARTIAL_L2)
digits = _pair(contract.DIGITS)
terms = _pair(contract.WEIGHT_TERMS)
lsq = _pair(contract.LSQ)
ewgs = _pair(contract.EWGS)
pact = _pair(contract.PACT)
dorefa = _pair(contract.DOREFA)
rescale = _pair(contract.RESCALE)
dkm = _pair(contract.DKM)
dkm_solve = _function("dkm_solve", contract.DKM_SOLVE, 0, contract.DKM)
assign = _pair(contract.ASSIGN)


def settled(old, new, squared):
    """`reference.settled`, in one launch where the backend has one."""
    return getattr(select(old.device), "settled", reference.settled)(old, new, squared)


@torch.library.register_fake("r2kernels::dkm_solve", lib=_library)
def _solved(weights, centroids, *rest):
    return torch.empty_like(centroids), torch.empty((), dtype=torch.int64, device="cpu")


def backend_of_forward():
    """For `backward`: the backend that was chosen explicitly, if one was."""
    return None if torch.compiler.is_compiling() else chosen()


def backward(backend, bwd, *args, **options):
    """bwd(*args, **options) on the backend of the forward."""
    if backend is None:
        return bwd(*args, **options)
    with use_backend(backend):
        return bwd(*args, **options)
