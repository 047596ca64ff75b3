"""Which of a model's parameters are its weights."""

import fnmatch
import warnings

from torch import nn

_KERNELS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def select_weights(model, include=None, exclude=None, embeddings=False):
    """(name, module, attribute) of every conv, linear and attention weight of the model.

    A shared weight is there once, and not if any of its names is excluded. `include` adds other parameters of two or
    more dimensions (embeddings, recurrent weights), `exclude` drops some: a pattern of the parameter's or its module's
    name ("*.head", "layer1.*"), a list of patterns, or a predicate (name, parameter) -> bool. `embeddings`: these too.
    ValueError where no weight is left, or `include` matches none.
    """
    included, excluded = _matcher("include", include), _matcher("exclude", exclude)
    found, dropped, added = {}, set(), 0
    for path, module in model.named_modules():
        for attribute, p in module._parameters.items():
            name = f"{path}.{attribute}" if path else attribute
            if p is None or not p.is_floating_point() or p.dim() < 2:
                continue
            if excluded(path, name, p):
                dropped.add(id(p))
            kinds = (*_KERNELS, nn.Embedding, nn.EmbeddingBag) if embeddings else _KERNELS
            usual = (attribute == "weight" and isinstance(module, kinds)) or (
                attribute in _ATTENTION and isinstance(module, nn.MultiheadAttention)
            )
            wanted = included(path, name, p)
            added += wanted
            if usual or wanted:
                found.setdefault(id(p), (name, module, attribute))
    if include is not None and not added:
        raise ValueError(f"include={include!r} matches no parameter of two or more dimensions")
    if exclude is not None and not dropped & found.keys():
        warnings.warn(f"exclude={exclude!r} matches none of the model's weights", stacklevel=3)
    kept = [place for key, place in found.items() if key not in dropped]
    if not kept:
        left = "" if exclude is None else f" left after exclude={exclude!r}"
        raise ValueError(f"{type(model).__name__} has no conv, linear or attention weight{left}; use include=")
    return kept


def _matcher(argument, rule):
    """The rule `include` or `exclude` as a function of (module's name, parameter's name, parameter)."""
    if rule is None:
        return lambda path, name, p: False
    if callable(rule):
        return lambda path, name, p: bool(rule(name, p))
    patterns = [rule] if isinstance(rule, str) else rule
    if not isinstance(patterns, (list, tuple, set, frozenset)) or not all(
        isinstance(pattern, str) for pattern in patterns
    ):
        raise TypeError(
            f"{argument} must be a name pattern, a list of them, or a predicate (name, parameter) -> bool, got {rule!r}"
        )
    return lambda path, name, p: any(
        fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(path, pattern) for pattern in patterns
    )
