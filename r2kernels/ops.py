"""The op contract: schemas in `torch.ops.r2kernels`, the reference as default and fake kernel, device kernels found lazily.

`<op>_fwd(weights, parameters..., d, layout) -> (loss, saved)`; `<op>_bwd(grad, weights, parameters..., saved, d, layout)` gives the
gradients as `weights.empty_gradients` lays them out, and the gradient of the differentiable parameter. Parameters are (L, d).

The quantizers' `<op>_fwd(xs, ...) -> ys` and `<op>_bwd(gs, xs, ...)`, and what else they take, are told in reference/quantizers.py; gs are shaped like xs,
ys and the gradients are laid out as `weights.empty_gradients` has them.

DKM's ops run `iterations` and `fixed_point` over the passes of a backend, its `DKM`; W_hat is laid out as the gradients are. Centroids are (L, K, d), filled up
with zeros where tensor t has fewer, clusters[t], than K; for d = 1 sorted, except for `assign_fwd`.
"""

import functools

import torch

from . import reference
from .algorithms import fixed_point, iterations
from .backends import select, use_backend
from .lists import pack_gradients

SCHEMAS = """
l_inf_fwd(Tensor[] weights, int d, str layout) -> (Tensor, Tensor)
l_inf_bwd(Tensor grad, Tensor[] weights, Tensor saved, int d, str layout) -> Tensor[]
margin_fwd(Tensor[] weights, Tensor M, Tensor k, int d, str layout) -> (Tensor, Tensor)
margin_bwd(Tensor grad, Tensor[] weights, Tensor M, Tensor k, Tensor saved, int d, str layout) -> (Tensor[], Tensor)
soft_min_max_fwd(Tensor[] weights, Tensor alpha, bool alpha_grad, int d, str layout) -> (Tensor, Tensor)
soft_min_max_bwd(Tensor grad, Tensor[] weights, Tensor alpha, Tensor saved, int d, str layout) -> (Tensor[], Tensor)
soft_extrema_fwd(Tensor[] weights, Tensor alpha, bool alpha_grad, int d, str layout) -> (Tensor, Tensor)
soft_extrema_bwd(Tensor grad, Tensor[] weights, Tensor alpha, Tensor saved, int d, str layout) -> (Tensor[], Tensor)
kure_fwd(Tensor[] weights, Tensor target) -> (Tensor, Tensor)
kure_bwd(Tensor grad, Tensor[] weights, Tensor target, Tensor saved) -> Tensor[]
weight_stats_fwd(Tensor[] weights) -> Tensor
bin_reg_fwd(Tensor[] weights, Tensor step, int bits) -> (Tensor, Tensor)
bin_reg_bwd(Tensor grad, Tensor[] weights, Tensor step, Tensor saved, int bits) -> Tensor[]
msqe_fwd(Tensor[] weights, Tensor step, int bits) -> (Tensor, Tensor)
msqe_bwd(Tensor grad, Tensor[] weights, Tensor step, Tensor saved, int bits) -> (Tensor[], Tensor)
partial_l2_fwd(Tensor[] weights, Tensor rank) -> (Tensor, Tensor)
partial_l2_bwd(Tensor grad, Tensor[] weights, Tensor rank, Tensor saved) -> Tensor[]
terms_fwd(Tensor[] weights, str[] names, Tensor[] parameters, int[] bits, bool[] flags) -> (Tensor[], Tensor[])
terms_bwd(Tensor[] grads, Tensor[] weights, str[] names, Tensor[] parameters, int[] bits, bool[] flags, Tensor[] saved) -> (Tensor[], Tensor[])
lsq_fwd(Tensor[] xs, Tensor step, int bits, bool signed, int? axis) -> Tensor[]
lsq_bwd(Tensor[] gs, Tensor[] xs, Tensor step, int bits, bool signed, int? axis) -> (Tensor[], Tensor)
ewgs_fwd(Tensor[] xs, Tensor lower, Tensor upper, Tensor delta, int bits, bool signed) -> Tensor[]
ewgs_bwd(Tensor[] gs, Tensor[] xs, Tensor lower, Tensor upper, Tensor delta, int bits, bool signed) -> (Tensor[], Tensor, Tensor)
pact_fwd(Tensor[] xs, Tensor alpha, int bits, bool plus) -> Tensor[]
pact_bwd(Tensor[] gs, Tensor[] xs, Tensor alpha, int bits, bool plus) -> (Tensor[], Tensor)
dorefa_fwd(Tensor[] xs, Tensor scale, int bits, bool detach_max) -> Tensor[]
dorefa_bwd(Tensor[] gs, Tensor[] xs, Tensor scale, int bits, bool detach_max) -> Tensor[]
assign_fwd(Tensor[] weights, Tensor centroids, int[] clusters, int d, str layout) -> Tensor[]
dkm_fwd(Tensor[] weights, Tensor centroids, int iterations, Tensor tau, int[] clusters, str metric, int d, str layout) -> (Tensor[], Tensor, Tensor)
dkm_bwd(Tensor grad_centroids, Tensor[] weights, Tensor[] grads, Tensor history, Tensor moments, str gradient, bool centroid_grad, \
Tensor tau, int[] clusters, str metric, int d, str layout) -> (Tensor[], Tensor)
dkm_solve(Tensor[] weights, Tensor centroids, Tensor tol, int max_passes, bool accelerated, \
Tensor tau, int[] clusters, str metric, int d, str layout) -> (Tensor, Tensor)
"""

QUANTIZERS = ("lsq", "ewgs", "pact", "dorefa")

_library = torch.library.Library("r2kernels", "DEF")


def _reference(name):
    """The reference as a kernel: results packed as the other backends lay them out, or added to `out`."""
    op = getattr(reference, name)
    if name.endswith("_fwd") and name[:-4] not in QUANTIZERS:
        return op
    at = 1 if name.endswith("_bwd") else 0

    def packed(*args, out=None):
        result = op(*args)
        made = result[0] if isinstance(result, tuple) else result
        if out is not None:
            made = [o.add_(g) for o, g in zip(out, made, strict=True)]
        else:
            made = pack_gradients(made, args[at], *args[-2:] if isinstance(args[-1], str) else ())
        return (made, *result[1:]) if isinstance(result, tuple) else made

    return packed


class _DKM(reference.DKM):
    """The reference's passes, W_hat and gradients laid out as the other backends have them."""

    def output(self, c, new):
        return pack_gradients(super().output(c, new), self.weights, *self.geometry)

    def gradient(self, steps, grads):
        return pack_gradients(super().gradient(steps, grads), self.weights, *self.geometry)


def _dkm_fwd(DKM, weights, centroids, repeats, *problem):
    return iterations.forward(DKM(weights, *problem), centroids, repeats)


def _dkm_bwd(DKM, grad_centroids, weights, grads, history, moments, gradient, centroid_grad, *problem):
    return iterations.backward(DKM(weights, *problem), grad_centroids, grads, history, moments, gradient, centroid_grad)


def _dkm_solve(DKM, weights, centroids, tol, max_passes, accelerated, tau, clusters, *rest):
    def passes_of(some):
        return DKM([weights[i] for i in some], tau[some], tuple([clusters[i] for i in some]), *rest)

    return fixed_point.solve(passes_of, centroids, tol, max_passes, accelerated)


_ITERATED = {"dkm_fwd": _dkm_fwd, "dkm_bwd": _dkm_bwd, "dkm_solve": _dkm_solve}


def _kernel(name, backend):
    """The op of a backend; None is the reference."""
    if name in _ITERATED:
        return functools.partial(_ITERATED[name], _DKM if backend is None else backend.DKM)
    return _reference(name) if backend is None else getattr(backend, name)


# Ops that sum or count by cluster, code or digit.
_SCATTERS = (*_ITERATED, "assign_fwd", *(f"{op}_{part}" for op in ("bin_reg", "partial_l2") for part in ("fwd", "bwd")))


def _dispatch(name):
    """The kernel of the backend that serves the device of the weights."""
    fallback = _kernel(name, None)
    at = 1 if name.endswith("_bwd") else 0
    scatters = name in _SCATTERS

    def run(*args, **options):
        backend = select(args[at][0].device, scatters)
        return (fallback if backend is None else _kernel(name, backend))(*args, **options)

    return run


call = {}  # name -> the kernel itself, without the dispatcher; takes `out=`: add the gradients to these tensors
op = {}  # name -> the op


def run(name, *args):
    """The op; where nothing traces, the kernel itself, which saves 3 us a call."""
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    return (op if traced else call)[name](*args)


def run_backward(backend, name, *args):
    """`run` on the backend that was chosen explicitly for the forward, if one was; RuntimeError where a second derivative is asked for."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "r2kernels: second derivatives (create_graph=True, or backward within enabled grad) are not implemented"
        )
    if backend is None:
        return run(name, *args)
    with use_backend(backend):
        return run(name, *args)


for _schema in SCHEMAS.replace("\\\n", "").strip().splitlines():
    _name = _schema.split("(", 1)[0]
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    call[_name] = _dispatch(_name)
    if _name != "dkm_solve":  # how often that goes round depends on values
        _library.impl(_name, _kernel(_name, None), "CompositeExplicitAutograd")
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, call[_name], _key)
    op[_name] = getattr(torch.ops.r2kernels, _name).default


@torch.library.register_fake("r2kernels::dkm_solve", lib=_library)
def _solved(weights, centroids, *rest):
    return torch.empty_like(centroids), torch.empty((), dtype=torch.int64, device="cpu")
