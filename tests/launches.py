"""What a call would launch on a GPU beside the kernels of this package, counted on the CPU."""

import contextlib
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# that make memory, or look at it in another way, and launch nothing
_NOTHING = {
    "aten::_unsafe_view",
    "aten::alias",
    "aten::as_strided",
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::is_same_size",
    "aten::lift_fresh",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::promote_types",
    "aten::resize_",
    "aten::set_",
    "aten::sym_size",
}
# that wait for the device: values are read on the host, or the shape of a result depends on them
READS = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::equal",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
# tensors made of Python's numbers: on a GPU a copy from the host
MADE = {"aten::lift_fresh", "aten::lift"}


def _is_view(func):
    returned = func._schema.returns
    return bool(returned) and all(r.alias_info is not None and not r.alias_info.is_write for r in returned)


class Launches(TorchDispatchMode):
    """`counts`: name of an operator -> how often it was called that launches a kernel or a copy; `found`: those of
    the `forbidden` names that were called. A tensor of one number on the CPU that others are combined with, as Python's
    numbers become, is none."""

    def __init__(self, forbidden=()):
        super().__init__()
        self.counts, self.forbidden = Counter(), forbidden

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in self.forbidden:
            raise AssertionError(f"{name} of {[tuple(t.shape) for t in tree_leaves(args) if hasattr(t, 'shape')]}")
        if name not in _NOTHING and not _is_view(func):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def launches(monkeypatch, forbidden=()):
    """Launches of the block; the ops of this package run as they do where nothing traces, so that what they call is
    counted too."""
    with monkeypatch.context() as patch, Launches(forbidden) as mode:
        patch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
        yield mode.counts
