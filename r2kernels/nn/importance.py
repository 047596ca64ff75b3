"""What an error of each number of a weight counts: the argument `weight` of what clusters and quantizes weights."""

from collections.abc import Mapping

import torch

from ..sharding.shards import whole


def importances_of(shapes, weight):
    """Name -> importances, of those of the weights (name -> shape) for which the mapping `weight` has some.

    TypeError or ValueError for what is no mapping of real tensors, or names none of the weights; for another shape; for
    a number that is negative or not finite. Importances that are all 0 count as none.
    """
    if weight is None:
        return {}
    if not isinstance(weight, Mapping):
        raise TypeError(f"weight must be a mapping of a weight's name -> its importances, got {type(weight).__name__}")
    found = {name: checked_importance(name, weight[name], shape) for name, shape in shapes.items() if name in weight}
    if not found:
        raise ValueError(f"weight has importances of none of the weights, such as {next(iter(shapes))}")
    return {name: h for name, h in found.items() if h.any()}


def checked_importance(name, h, shape):
    """The importances of a weight of this shape, float32 or float64, whole."""
    if not isinstance(h, torch.Tensor) or not h.is_floating_point():
        kind = str(h.dtype) if isinstance(h, torch.Tensor) else type(h).__name__
        raise TypeError(f"weight of {name} must be a floating-point tensor, got {kind}")
    if tuple(h.shape) != tuple(shape):
        raise ValueError(f"weight of {name} must be shaped like it, {tuple(shape)}, got {tuple(h.shape)}")
    h = whole(h.detach())
    if not (h >= 0).all() or h.isinf().any():
        raise ValueError(f"weight of {name} must be finite numbers >= 0; it has a NaN, an infinity or less than 0")
    return h.to(torch.promote_types(h.dtype, torch.float32))
