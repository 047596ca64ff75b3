"""The op contract: schemas in `torch.ops.r2kernels`, the reference as default and fake kernel, device kernels found lazily.

`<op>_fwd(weights, parameters..., d, layout) -> (loss, saved)`; `<op>_bwd(grad, weights, parameters..., saved, d, layout)` gives the
gradients as `weights.empty_gradients` lays them out, and the gradient of the differentiable parameter. Parameters are (L, d).
"""
import torch

from . import reference
from .backends import select
from .weights import pack_gradients

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
"""

_library = torch.library.Library("r2kernels", "DEF")


def _reference(name):
    """The reference as a kernel: gradients packed as the other backends lay them out, or added to `out`."""
    op = getattr(reference, name)
    if not name.endswith("_bwd"):
        return op

    def backward(grad, weights, *args, out=None):
        result = op(grad, weights, *args)
        gradients = result[0] if isinstance(result, tuple) else result
        if out is not None:
            packed = [o.add_(g) for o, g in zip(out, gradients, strict=True)]
        else:
            packed = pack_gradients(gradients, weights, *args[-2:] if isinstance(args[-1], str) else ())
        return (packed, *result[1:]) if isinstance(result, tuple) else packed
    return backward


def _dispatch(name):
    """The kernel of the backend that serves the device of the weights."""
    fallback = _reference(name)
    at = 1 if name.endswith("_bwd") else 0

    def run(*args, **options):
        backend = select(args[at][0].device)
        return (fallback if backend is None else getattr(backend, name))(*args, **options)
    return run


call = {}       # name -> the kernel itself, without the dispatcher; takes `out=`: add the gradients to these tensors
op = {}         # name -> the op


def run(name, *args):
    """The op; where nothing traces, the kernel itself, which saves 3 us a call."""
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    return (op if traced else call)[name](*args)


for _schema in SCHEMAS.strip().splitlines():
    _name = _schema.split("(", 1)[0]
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    call[_name] = _dispatch(_name)
    _library.impl(_name, _reference(_name), "CompositeExplicitAutograd")
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, call[_name], _key)
    op[_name] = getattr(torch.ops.r2kernels, _name).default
