"""A clustered weight as it is stored: codes, look-up tables, scales, and the weights that no row holds."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional.dkm import assign
from ..reference.checks import LAYOUTS
from ..reference.columns import accumulator
from . import scalars
from .packing import look_up, pack, unpack
from .tables import LUT_DTYPES, restored_lut, scales_of_lut, stored_lut
from .tiles import Geometry, canonical

SUMMED = 2**15  # elements whose error is summed at once, on one thread
MOST_DIM = 64  # of a row that is stored; with the bytes of the codes it bounds the size of a weight


class Form(NamedTuple):
    """How a weight is clustered: those of a Palettizer's options that say what is stored.

    axis: the dimension of the output channels, 0 or 1. A weight of axis 1 is clustered as `w.transpose(0, 1)`.
    granularity: the tile of a weight that has a table, (rows, columns) of the matrix (output channels, all else); of
        three numbers of (first dimension, second, all else); None for the whole of a dimension. None: (group_size,
        None). `of` makes this of all that `Palettizer` takes.
    """

    bits: int
    cluster_dim: int = 1
    layout: str = "output"
    group_size: int | None = None
    per_channel_scale: bool = False
    lut_dtype: str = "fp32"
    axis: int = 0
    granularity: tuple | None = None

    @classmethod
    def of(cls, options):
        form = cls(*[getattr(options, field, cls._field_defaults.get(field)) for field in cls._fields])
        granularity, group_size = canonical(form.granularity, form.group_size)
        return form._replace(granularity=granularity, group_size=group_size)

    def channels_first(self, shape):
        """The shape of a weight of this shape as it is clustered."""
        return (shape[1], shape[0], *shape[2:]) if self.axis else shape

    def entry_dtype(self, dtype):
        """Of the tables of a weight of `dtype`; "fp32" is float64 for float64."""
        return accumulator(dtype) if self.lut_dtype == "fp32" else LUT_DTYPES[self.lut_dtype]

    def groups(self, shape, bits):
        """How the codes of a weight of this shape lie in `bits` bits each."""
        return Geometry(shape, self).runs(bits)

    def parts(self, shape, dtype):
        """part -> (dtype, shape) of what is stored beside the codes."""
        g = Geometry(shape, self)
        parts = {"lut": (self.entry_dtype(dtype), (g.groups, 2**self.bits, self.cluster_dim))}
        if scales := scales_of_lut(self.lut_dtype, g.groups):
            parts["lut_scale"] = accumulator(dtype), scales
        if self.per_channel_scale:
            parts["scale"] = dtype, (shape[self.axis],)
        if g.leftovers:
            parts["leftovers"] = dtype, (g.leftovers,)
        return parts

    def wrong(self, shape):
        """(field, value) of what is not allowed for a weight of this shape, or None."""
        right = {
            "bits": _is_int(self.bits, 8),
            "cluster_dim": _is_int(self.cluster_dim, MOST_DIM),
            "layout": self.layout in LAYOUTS,
            "group_size": self.group_size is None or _is_int(self.group_size, 2**62),
            "per_channel_scale": isinstance(self.per_channel_scale, bool),
            "lut_dtype": self.lut_dtype in tuple(LUT_DTYPES),
            "axis": type(self.axis) is int and 0 <= self.axis < min(len(shape), 2),
            "granularity": self.granularity is None or self._is_tile(shape),
        }
        if all(right.values()) and Geometry(shape, self).rows == 0:
            return "shape", shape
        return next(((field, getattr(self, field)) for field, fine in right.items() if not fine), None)

    def _is_tile(self, shape):
        tile = self.granularity
        if not isinstance(tile, tuple) or self.group_size is not None or not 2 <= len(tile) <= min(len(shape) + 1, 3):
            return False
        return canonical(tile, None) == (tile, None) and all(n is None or _is_int(n, 2**62) for n in tile)

    def restored(self, shape, dtype, codes, width, parts):
        """The `Clustered` weight made of its parts as they are stored."""
        leftovers, scales = parts.get("leftovers", codes.new_empty(0, dtype=dtype)), parts.get("scale")
        return Clustered(shape, dtype, self, codes, width, parts["lut"], parts.get("lut_scale"), scales, leftovers)


def _is_int(value, most):
    return type(value) is int and 1 <= value <= most


def channel_scales(w, axis=0):
    """(C,) mean |W| of each output channel, which few outliers hardly change; 0 for a channel of zeros alone. No
    gradient. Summed in one order whatever the axis."""
    means = w.detach().abs().movedim(axis, 0).flatten(1).contiguous().mean(1, dtype=accumulator(w.dtype))
    return torch.where(means == 0, means, means.clamp(min=torch.finfo(w.dtype).tiny)).to(w.dtype)


def along_channels(scales, dims, axis=0):
    """(C,) as a factor of a weight of so many dimensions."""
    return scales.reshape([-1 if i == axis else 1 for i in range(dims)])


def is_turned(shape, d, layout):
    """Whether rows lie along the output channels."""
    return layout == "output" and len(shape) > 1 and d > 1


def rows_of(stack, form):
    """(groups, rows, d) of groups of one size, (groups, *shape)."""
    d = form.cluster_dim
    flat = (stack.transpose(1, -1) if is_turned(stack.shape[1:], d, form.layout) else stack).reshape(len(stack), -1)
    return flat[:, : flat.shape[1] // d * d].reshape(len(stack), -1, d)


def leftovers_of(w, form):
    """What the rows of a group leave over."""
    d = form.cluster_dim
    if w.numel() % d == 0:
        return w.new_empty(0)
    return (w.transpose(0, -1) if is_turned(w.shape, d, form.layout) else w).reshape(-1)[w.numel() // d * d :]


def assembled(rows, leftovers, shape, form):
    """A weight, as it is clustered, made of the rows (N, d) of its groups, one after the other, and of what those leave
    over."""
    geometry, flat, stacks, done, over = Geometry(shape, form), rows.reshape(-1), [], 0, 0
    for b in geometry.blocks:
        count, size = b.count, b.each * form.cluster_dim
        part = flat[done : done + count * size]
        if b.left:
            part = torch.cat([part.view(count, size), leftovers[over : over + count * b.left].view(count, b.left)], 1)
        if is_turned(b.shape, form.cluster_dim, form.layout):
            part = part.reshape(count, b.shape[-1], *b.shape[1:-1], b.shape[0]).transpose(1, -1).contiguous()
        stacks.append(part)
        done, over = done + count * size, over + count * b.left
    return geometry.together(stacks)


class Size(NamedTuple):
    """Bytes of a layer, dense and as it is stored."""

    dense: int  # in the dtype that it trains in
    codes: int  # packed, bits / cluster_dim bits per weight
    luts: int  # tables, and the scales of channels and of int8 tables
    leftovers: int  # weights that no row holds
    entropy: float  # of the codes, were each as long as its own entropy

    @property
    def packed(self):
        return self.codes + self.luts + self.leftovers

    @property
    def coded(self):
        """With an ideal entropy code in place of packed bits."""
        return math.ceil(self.entropy) + self.luts + self.leftovers


def squares(w, hat):
    """||w||^2 and ||w - hat||^2 in float64, of parts of which a copy stays in the cache."""
    energy = noise = 0.0
    for a, b in zip(w.reshape(-1).split(SUMMED), hat.reshape(-1).split(SUMMED), strict=True):
        a = a.double()
        energy, noise = energy + a.square().sum().item(), noise + (a - b).square().sum().item()
    return energy, noise


def entropy(counts):
    """Bytes of all symbols that occur so often, were each as long as its own entropy."""
    p = counts[counts > 0].double() / counts.sum()
    return (counts.sum() * -(p * p.log2()).sum()).item() / 8


def nearest_codes(first, geometry, tables, form, wide=False):
    """(rows,) codes of the nearest entry of its group's table, of a weight as `scaled` gives it; wide: in float64, for
    numbers whose squares float32 does not hold."""
    if form.cluster_dim == 1 and not wide:
        codes = scalars.nearest(first, geometry, tables)
        if codes is not None:
            return codes
    pieces = geometry.pieces(first)
    if wide:
        pieces, tables = [piece.double() for piece in pieces], tables.double()
    luts = tables[:, :, 0].contiguous() if form.cluster_dim == 1 else tables
    return torch.cat(assign(pieces, luts.unbind(), cluster_dim=form.cluster_dim, layout=form.layout))


class Clustered(NamedTuple):
    """A clustered weight as it is stored: `decoded()` is W_hat."""

    shape: tuple
    dtype: torch.dtype
    form: Form
    codes: Tensor  # uint8, those of all groups one after the other, in `width` bits each (`Geometry.blocks`)
    width: int  # 8, or the bits of the form: packed, each group from a byte on
    entries: Tensor  # (groups, K, d): the tables, as stored
    lut_scales: Tensor | None  # (groups, 1, 1) of int8 tables, (1, 1, 1) of fp8
    scales: Tensor | None  # (C,): what each output channel was divided by; 0 for a channel of zeros
    leftovers: Tensor  # of all groups, one after the other, divided too

    @classmethod
    def of(cls, w, centroids, options, scales=None, wide=False):
        """The codes of the nearest of `centroids` (groups, K, d), rounded as they are stored.

        scales: of the channels, by default `channel_scales`. wide: as for `nearest_codes`.
        """
        form = Form.of(options)
        first, scales = scaled(w, form, scales)
        entries, lut_scales = stored_lut(centroids, form.lut_dtype)
        geometry, luts = Geometry(w.shape, form), restored_lut(entries, lut_scales, centroids.dtype)
        codes, leftovers = nearest_codes(first, geometry, luts, form, wide), first.new_empty(0)
        if geometry.leftovers:
            leftovers = torch.cat([leftovers_of(piece, form) for piece in geometry.pieces(first)])
        return cls(tuple(w.shape), w.dtype, form, codes, 8, entries, lut_scales, scales, leftovers)

    @property
    def geometry(self):
        return Geometry(self.shape, self.form)

    def packed(self):
        """These with packed codes."""
        bits = self.form.bits
        return self if self.width == bits else self._replace(codes=torch.cat(self._runs(pack, bits)), width=bits)

    def unpacked(self):
        """These with a byte for each code."""
        return self if self.width == 8 else self._replace(codes=torch.cat(self._runs(unpack, self.width)), width=8)

    def _runs(self, work, bits):
        """[work(codes, `Groups` of `bits`)] of the blocks."""
        runs = self.geometry.runs(self.width).parts
        codes = self.codes[: sum(run.nbytes for run in runs)].split([run.nbytes for run in runs])
        return [work(part, run._replace(bits=bits)) for part, run in zip(codes, runs, strict=True)]

    def parts(self):
        """part -> tensor stored beside the codes."""
        parts = {
            "lut": self.entries,
            "lut_scale": self.lut_scales,
            "scale": self.scales,
            "leftovers": self.leftovers if len(self.leftovers) else None,
        }
        return {part: tensor for part, tensor in parts.items() if tensor is not None}

    def luts(self):
        """(groups, K, d) tables of the numbers that rows are made of."""
        return restored_lut(self.entries, self.lut_scales, accumulator(self.dtype))

    def decoded(self):
        geometry, luts = self.geometry, self.luts().to(self.dtype)
        tables = iter([lut for b, lut in zip(geometry.blocks, geometry.split(luts), strict=True) if b.each])
        rows = self._runs(lambda codes, run: look_up(codes, run, next(tables)), self.width)
        rows = rows[0] if len(rows) == 1 else torch.cat(rows)
        out = assembled(rows, self.leftovers, self.shape, self.form)
        out = out if self.scales is None else out * along_channels(self.scales, len(self.shape))
        return out.transpose(0, 1).contiguous() if self.form.axis else out

    def errors(self, w):
        """((||w||^2, ||w - W_hat||^2), `counts`) of the weight w that is clustered."""
        if self.form.cluster_dim == 1 and self.scales is None and self.width == 8:
            first = w.transpose(0, 1) if self.form.axis else w
            found = scalars.errors(first, self.geometry, self.codes, self.luts().to(self.dtype))
            if found is not None:
                return found
        return squares(w, self.decoded()), self.counts()

    def counts(self):
        """(K,) how often each code occurs."""
        return torch.bincount(self.unpacked().codes, minlength=2**self.form.bits)

    def size(self, counts=None):
        """counts: those of `counts`, where they are known."""
        codes = self.geometry.runs(self.form.bits).nbytes
        luts = sum(t.nbytes for t in (self.entries, self.lut_scales, self.scales) if t is not None)
        dense = math.prod(self.shape) * self.dtype.itemsize
        counts = self.counts() if counts is None else counts
        return Size(dense, codes, luts, self.leftovers.nbytes, entropy(counts))


def scaled(w, form, scales=None):
    """(a weight as it is clustered: divided by the scales of its channels, and these first; the scales or None)"""
    if form.per_channel_scale:
        scales = channel_scales(w, form.axis) if scales is None else scales
        # by inf in a channel of zeros: they stay, without a gradient
        w = w / along_channels(torch.where(scales == 0, torch.inf, scales), w.dim(), form.axis)
    return w.transpose(0, 1) if form.axis else w, scales


def divided(w, form, scales=None):
    """(the groups of a weight, divided by the scales of their channels, as they are clustered; the scales or None)"""
    first, scales = scaled(w, form, scales)
    return Geometry(w.shape, form).pieces(first), scales


def joined(pieces, w, form, scales, error=None):
    """A weight like w made of the numbers of its groups, as `divided` gives those of w, plus an error. In a channel of
    zeros it is w itself, so that its gradient passes."""
    out = Geometry(w.shape, form).whole(pieces)
    out = out.transpose(0, 1) if form.axis else out
    out = out if error is None else out + error
    if scales is None:
        return out
    scales = along_channels(scales, w.dim(), form.axis)
    return torch.where(scales == 0, w, out * scales)
