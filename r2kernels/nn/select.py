"""Which of a model's parameters are its weights."""

import fnmatch
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .places import makers
from .sharded import FLAT, refuse_flattened

_KERNELS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
LISTED = 8  # names of weights in a warning


class Found(NamedTuple):
    """A weight that a module reads: a parameter, or what it computes from parameters."""

    name: str
    module: nn.Module
    attribute: str
    tensor: Tensor


def is_conv1d(module):
    """Whether this is transformers' `Conv1D`: a linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_experts(module, p):
    """Whether a parameter holds the matrices of the experts of a mixture, (experts, ., .)."""
    return p.dim() == 3 and "expert" in type(module).__name__.lower()


def is_weight(module, attribute, p, embeddings=False, recurrent=False):
    """Whether a parameter of a module is a weight as it stands, without `include`."""
    if attribute == "weight" and (isinstance(module, _KERNELS) or is_conv1d(module)):
        return True
    if attribute in _ATTENTION and isinstance(module, nn.MultiheadAttention):
        return True
    if embeddings and attribute == "weight" and isinstance(module, _EMBEDDINGS):
        return True
    if recurrent and attribute.startswith("weight_") and isinstance(module, nn.RNNBase):
        return True
    return is_experts(module, p)


def select_weights(model, include=None, exclude=None, embeddings=False):
    """(name, module, attribute) of every conv, linear and attention weight of the model.

    transformers' `Conv1D` and the 3-D parameters of its experts are there too. A shared weight is there once, and not
    if any of its names is excluded. `include` adds other parameters of two or more dimensions (embeddings, recurrent
    weights), `exclude` drops some: a pattern of the parameter's or its module's name ("*.head", "layer1.*"), a list of
    patterns, or a predicate (name, parameter) -> bool. `embeddings`: these too. ValueError where no weight is left, or
    `include` matches none.
    """
    kept, _ = selected(matrices(model), include, exclude, lambda *place: is_weight(*place, embeddings))
    if not kept:
        raise ValueError(none_left(model, exclude))
    return [found[:3] for found in kept]


def none_left(model, exclude=None):
    left = "" if exclude is None else f" left after exclude={exclude!r}"
    return f"{type(model).__name__} has no conv, linear or attention weight{left}; use include="


def matrices(model, computed=False):
    """The floating-point parameters of two or more dimensions, under every name; with `computed` what modules compute
    in place of one."""
    for path, module in model.named_modules():
        if computed:
            yield from _computed(path, module)
        if isinstance(module, parametrize.ParametrizationList):
            continue
        made = _computed_names(module)
        for attribute, p in module._parameters.items():
            if attribute == FLAT or (p is not None and "_fsdp_flattened" in p.__dict__):
                refuse_flattened(_joined(path, attribute), p)
            if p is None or not p.is_floating_point() or p.dim() < 2:
                continue
            if not any(attribute.startswith(f"{name}_") for name in made):
                yield Found(_joined(path, attribute), module, attribute, p)


def _joined(path, attribute):
    return f"{path}.{attribute}" if path else attribute


def _computed_names(module):
    names = {getattr(hook, "_tensor_name", getattr(hook, "name", None)) for hook in module._forward_pre_hooks.values()}
    return [name for name in names if isinstance(name, str) and makers(module, name)]


def _computed(path, module):
    names = _computed_names(module)
    if parametrize.is_parametrized(module):
        names += list(module.parametrizations)
    for attribute in names:
        with torch.no_grad():
            value = getattr(module, attribute, None)
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
            yield Found(_joined(path, attribute), module, attribute, value)


def selected(candidates, include, exclude, usual):
    """(the weights, the other candidates that `exclude` does not name), each parameter once.

    usual(module, attribute, tensor): whether it is a weight without `include`.
    """
    included, excluded = _matcher("include", include), _matcher("exclude", exclude)
    found, others, dropped, added, alive = {}, {}, set(), 0, []
    for candidate in candidates:
        name, module, attribute, p = candidate
        alive.append(p)  # what is computed would else leave its id to another
        if excluded(name, p):
            dropped.add(id(p))
        wanted = included(name, p)
        added += wanted
        (found if wanted or usual(module, attribute, p) else others).setdefault(id(p), candidate)
    if include is not None and not added:
        raise ValueError(f"include={include!r} matches no parameter of two or more dimensions")
    if exclude is not None and not dropped & found.keys():
        warnings.warn(f"exclude={exclude!r} matches none of the model's weights", stacklevel=4)
    kept = [candidate for key, candidate in found.items() if key not in dropped]
    left = [candidate for key, candidate in others.items() if key not in dropped and key not in found]
    return kept, left


def warn_of_coverage(kept, left, stacklevel):
    """Warns where less than 90 % of the numbers in matrices are in the weights that were chosen."""
    taken, rest = (sum(found.tensor.numel() for found in some) for some in (kept, left))
    if taken >= 0.9 * (taken + rest):
        return
    left = sorted(left, key=lambda found: -found.tensor.numel())
    names = ", ".join(found.name for found in left[:LISTED]) + (", ..." if len(left) > LISTED else "")
    warnings.warn(
        f"{100 * taken / (taken + rest):.0f} % of the numbers in the model's matrices are in the weights that were "
        f"chosen; left out: {names}. include= adds them (include=[{left[0].name!r}]), exclude= says that they stay",
        stacklevel=stacklevel,
    )


def _matcher(argument, rule):
    """The rule `include` or `exclude` as a function of (parameter's name, parameter)."""
    if rule is None:
        return lambda name, p: False
    if callable(rule):
        return lambda name, p: bool(rule(name, p))
    patterns = [rule] if isinstance(rule, str) else rule
    if not isinstance(patterns, (list, tuple, set, frozenset)) or not all(
        isinstance(pattern, str) for pattern in patterns
    ):
        raise TypeError(
            f"{argument} must be a name pattern, a list of them, or a predicate (name, parameter) -> bool, got {rule!r}"
        )
    return lambda name, p: any(matches(name, pattern) for pattern in patterns)


def matches(name, pattern):
    """Whether a pattern is of this parameter's name, or of its module's."""
    return any(fnmatch.fnmatchcase(n, pattern) for n in (name, name.rpartition(".")[0]))
