"""The rows of `cluster_dim` numbers that DKM reads from a weight, and the way back."""

import torch


def accumulator(dtype):
    """The dtype of sums, losses and parameters beside weights of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def columns(w, d=1, layout="output"):
    """(d, N): the d columns of the N rows that DKM's layout reads from w, in the accumulator's dtype."""
    if d == 1:
        return w.reshape(1, -1).to(accumulator(w.dtype))
    flat = (w.transpose(0, -1) if layout == "output" and w.dim() > 1 else w).reshape(-1)
    n = w.numel() // d
    return flat[: n * d].reshape(n, d).t().to(accumulator(w.dtype))


def from_columns(x, w, d=1, layout="output"):
    """The inverse of `columns`: a tensor like w, zero where w had leftovers."""
    x = x.to(w.dtype)
    if d == 1:
        return x.reshape(w.shape)
    flat = torch.cat([x.t().reshape(-1), x.new_zeros(w.numel() % d)])
    if layout == "output" and w.dim() > 1:
        return flat.reshape(w.transpose(0, -1).shape).transpose(0, -1)
    return flat.reshape(w.shape)
