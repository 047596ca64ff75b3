"""What a call would launch on a GPU beside the kernels of this package, and whether it would wait for one: told on the
CPU by the operators of torch that it calls."""

import contextlib
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# make memory, or look at it in another way
FREE = {
    "aten::_unsafe_view",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::promote_types",
}
# wait for the device: the host reads values, or the shape of a result depends on them (`tolist` reads unseen)
READS = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
MADE = {"aten::lift_fresh"}  # a tensor of Python's numbers, which the device would wait for
# on CUDA they add in any order, or raise under deterministic algorithms
UNORDERED = {
    "aten::histc",
    "aten::scatter_add",
    "aten::scatter_add_",
    "aten::scatter_reduce",
    "aten::scatter_reduce_",
    "aten::put_",
}


class Watch(TorchDispatchMode):
    """`counts`: operator -> how often it was called that launches something; AssertionError for one of `forbidden`."""

    def __init__(self, forbidden):
        super().__init__()
        self.counts, self.forbidden = Counter(), forbidden

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name, kwargs or {}
        assert name not in self.forbidden, f"{name} of {[getattr(a, 'shape', a) for a in args]}"
        if READS & self.forbidden and name in ("aten::index", "aten::index_put_"):
            assert not any(i is not None and i.dtype is torch.bool for i in args[1]), f"{name} by a mask"
        if UNORDERED & self.forbidden:
            assert not _adds_in_any_order(name, args, kwargs), f"{name} of floats"
        if name not in FREE and not _is_view(func):
            self.counts[name] += 1
        return func(*args, **kwargs)


def _adds_in_any_order(name, args, kwargs):
    """Whether it does so with these floating-point numbers."""
    if name == "aten::bincount":
        weights = kwargs.get("weights", args[1] if len(args) > 1 else None)
        return weights is not None and weights.is_floating_point()
    if name in ("aten::index_add", "aten::index_add_"):
        return args[0].is_floating_point() and args[2].unique().numel() < args[2].numel()
    return name in ("aten::cumsum", "aten::cumsum_") and args[0].is_floating_point()


def _is_view(func):
    aliases = [r.alias_info for r in func._schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


@contextlib.contextmanager
def watched(monkeypatch, forbidden=frozenset()):
    """The `counts` of the block. The ops of this package run in it as they do where nothing traces, so that what they
    call is seen too."""

    def tolist(tensor):
        raise AssertionError(f"tolist of {tuple(tensor.shape)}")

    with monkeypatch.context() as patch, Watch(forbidden) as watch:
        patch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
        if READS & forbidden:
            patch.setattr(torch.Tensor, "tolist", tolist)
        yield watch.counts
