"""Weights that have a table of scalars for each group, in one pass of the extension over all groups.

A weight has its output channels first, and `Geometry` says how it is cut. Both give None where the extension does not
do it: without one, on a GPU, in a compiled graph, for a tensor of another kind or tables of another dtype.
"""

import torch

from ..reference.columns import accumulator
from .packing import launchers


def nearest(w, geometry, tables):
    """The codes of all groups, uint8: the entry of (groups, K, 1) `tables` that `assign` finds."""
    native = _usable(w, tables, accumulator(w.dtype))
    if native is None:
        return None
    return torch.cat([native.nearest(rows, some).view(-1) for rows, some in _blocks(w, geometry, tables)])


def errors(w, geometry, codes, tables):
    """((||W||^2, ||W - W_hat||^2), (K,) how often each code occurs), where W_hat is made of (groups, K, 1) tables."""
    native = _usable(w, tables, w.dtype)
    if native is None:
        return None
    energies, counts, done = torch.zeros(2, dtype=torch.float64, device="cpu"), 0, 0
    for rows, some in _blocks(w, geometry, tables):
        sums, seen = native.errors(rows, codes[done : done + rows.numel()], some)
        energies, counts, done = energies + sums.sum(0), counts + seen, done + rows.numel()
    return tuple(energies.tolist()), counts


def _usable(w, tables, dtype):
    if torch.compiler.is_compiling():
        return None
    plain = type(w) in (torch.Tensor, torch.nn.Parameter) and w.device.type == "cpu" and tables.dtype == dtype
    return launchers() if plain and tables.shape[1] <= 256 else None


def _blocks(w, geometry, tables):
    """(rows, their tables) of the blocks of groups of one size, contiguous."""
    for block, stack, some in zip(geometry.blocks, geometry.cut(w.detach()), geometry.split(tables), strict=True):
        yield stack.reshape(block.count, -1).resolve_neg().contiguous(), some[..., 0].contiguous()
