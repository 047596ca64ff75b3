"""A clustered weight as it is stored: codes, look-up tables, scales, and the weights that no row holds."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional.dkm import assign
from ..reference.checks import LAYOUTS
from ..reference.columns import accumulator
from .packing import Groups, look_up, pack, unpack

MOST_DIM = 64  # of a row that is stored; with the bytes of the codes it bounds the size of a weight
LUT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}


class Form(NamedTuple):
    """How a weight is clustered: those of a Palettizer's options that say what is stored.

    axis: the dimension of the output channels, 0 or 1. A weight of axis 1 is clustered as `w.transpose(0, 1)`.
    """

    bits: int
    cluster_dim: int = 1
    layout: str = "output"
    group_size: int | None = None
    per_channel_scale: bool = False
    lut_dtype: str = "fp32"
    axis: int = 0

    @classmethod
    def of(cls, options):
        return cls(*[getattr(options, field, cls._field_defaults.get(field)) for field in cls._fields])

    def channels_first(self, shape):
        """The shape of a weight of this shape as it is clustered."""
        return (shape[1], shape[0], *shape[2:]) if self.axis else shape

    def entry_dtype(self, dtype):
        """Of the tables of a weight of `dtype`; "fp32" is float64 for float64."""
        return accumulator(dtype) if self.lut_dtype == "fp32" else LUT_DTYPES[self.lut_dtype]

    def groups(self, shape, bits):
        """How the codes of a weight of this shape lie in `bits` bits each."""
        return Geometry(shape, self).groups_of(bits)

    def parts(self, shape, dtype):
        """part -> (dtype, shape) of what is stored beside the codes."""
        g = Geometry(shape, self)
        parts = {"lut": (self.entry_dtype(dtype), (g.groups, 2**self.bits, self.cluster_dim))}
        if self.lut_dtype == "int8":
            parts["lut_scale"] = accumulator(dtype), (g.groups, 1, 1)
        if self.per_channel_scale:
            parts["scale"] = dtype, (shape[self.axis],)
        if g.leftovers:
            parts["leftovers"] = dtype, (g.leftovers,)
        return parts

    def wrong(self, shape):
        """(field, value) of what is not allowed for a weight of this shape, or None."""

        def is_int(value, most):
            return type(value) is int and 1 <= value <= most

        right = {
            "bits": is_int(self.bits, 8),
            "cluster_dim": is_int(self.cluster_dim, MOST_DIM),
            "layout": self.layout in LAYOUTS,
            "group_size": self.group_size is None or is_int(self.group_size, 2**62),
            "per_channel_scale": isinstance(self.per_channel_scale, bool),
            "lut_dtype": self.lut_dtype in tuple(LUT_DTYPES),
            "axis": type(self.axis) is int and 0 <= self.axis < min(len(shape), 2),
        }
        if all(right.values()) and Geometry(shape, self).rows == 0:
            return "shape", shape
        return next(((field, getattr(self, field)) for field, fine in right.items() if not fine), None)

    def restored(self, shape, dtype, codes, width, parts):
        """The `Clustered` weight made of its parts as they are stored."""
        leftovers, scales = parts.get("leftovers", codes.new_empty(0, dtype=dtype)), parts.get("scale")
        return Clustered(shape, dtype, self, codes, width, parts["lut"], parts.get("lut_scale"), scales, leftovers)


class Geometry:
    """How many rows of d, and weights left over, the groups of a weight of this shape have.

    There are `full` groups of `size` channels, and one of the `last` channels unless these are 0.
    """

    def __init__(self, shape, form):
        channels, d = shape[form.axis], form.cluster_dim
        inner = math.prod(shape) // channels
        self.size = min(form.group_size or channels, channels)  # channels of a full group
        self.full, self.last = divmod(channels, self.size)
        self.each, self.left = divmod(self.size * inner, d)
        self.each_of_last, self.left_of_last = divmod(self.last * inner, d)
        self.groups = self.full + (self.last > 0)
        self.rows = self.full * self.each + self.each_of_last
        self.leftovers = self.full * self.left + self.left_of_last

    def groups_of(self, bits):
        """How the codes lie in `bits` bits each."""
        return Groups(self.rows, max(self.each, 1), bits)

    def blocks(self):
        """(groups, channels, rows of each, leftovers of each) of the full groups, and of the last if it is not."""
        full = (self.full, self.size, self.each, self.left)
        return [full, (1, self.last, self.each_of_last, self.left_of_last)] if self.last else [full]


def quantized_lut(lut, dtype):
    """The table as it comes back from storage in `dtype` ("fp32", "fp16", or "int8" with one scale, max|lut| / 127)."""
    return restored_lut(*stored_lut(lut, dtype), lut.dtype)


def stored_lut(lut, dtype):
    """(entries, scale or None) of (..., K, d): of int8 one scale (..., 1, 1) for each table."""
    if dtype == "fp32":
        return lut, None
    if dtype == "fp16":
        most = torch.finfo(torch.float16).max
        return lut.clamp(-most, most).half(), None
    scale = lut.abs().amax((-2, -1), keepdim=True) / 127
    return (lut / torch.where(scale == 0, 1, scale)).round().to(torch.int8), scale


def restored_lut(entries, scale, dtype):
    """The table of numbers of `dtype` that `stored_lut` stored."""
    return entries.to(dtype) if scale is None else entries.to(dtype) * scale


def values_lost(lut, dtype):
    """What (groups, K, d) tables lose in `dtype` that is worth a warning, or None."""
    if dtype == "fp32":
        return None
    before, left = different(lut), different(quantized_lut(lut, dtype))
    worst = (left / before).argmin()
    cut = int((lut.abs() > torch.finfo(torch.float16).max).sum()) if dtype == "fp16" else 0
    lost = [f"leaves {left[worst]} of {before[worst]} different values"] * bool(4 * left[worst] <= 3 * before[worst])
    lost += [f"cuts off {cut} numbers above 65504"] * bool(cut)
    return f"lut_dtype={dtype!r} {' and '.join(lost)}" if lost else None


def different(lut):
    """(groups,) how many different entries each table has."""
    groups, entries, _ = lut.shape
    index = torch.arange(groups, device=lut.device).double()[:, None, None].expand(-1, entries, 1)
    rows = torch.cat([index, lut.double()], -1).flatten(0, 1).unique(dim=0)
    return torch.bincount(rows[:, 0].long(), minlength=groups)


def channel_scales(w, axis=0):
    """(C,) max|W| of each output channel; no gradient."""
    return w.detach().abs().movedim(axis, 0).flatten(1).amax(1)


def along_channels(scales, dims, axis=0):
    """(C,) as a factor of a weight of so many dimensions."""
    return scales.reshape([-1 if i == axis else 1 for i in range(dims)])


def is_turned(shape, d, layout):
    """Whether rows lie along the output channels."""
    return layout == "output" and len(shape) > 1 and d > 1


def leftovers_of(w, form):
    """What the rows of a group leave over."""
    d = form.cluster_dim
    if w.numel() % d == 0:
        return w.new_empty(0)
    return (w.transpose(0, -1) if is_turned(w.shape, d, form.layout) else w).reshape(-1)[w.numel() // d * d :]


def assembled(rows, leftovers, shape, form):
    """A weight, as it is clustered, made of the rows (N, d) of its groups, one after the other, and of what those leave
    over."""
    shape, form = form.channels_first(shape), form._replace(axis=0)
    flat, parts, done, over = rows.reshape(-1), [], 0, 0
    for count, channels, each, left in Geometry(shape, form).blocks():
        size, part = each * form.cluster_dim, flat[done : done + count * each * form.cluster_dim]
        if left:
            part = torch.cat([part.view(count, size), leftovers[over : over + count * left].view(count, left)], 1)
        if is_turned(shape, form.cluster_dim, form.layout):
            part = part.reshape(count, shape[-1], *shape[1:-1], channels).transpose(1, -1).contiguous()
        parts.append(part.reshape(count * channels, *shape[1:]))
        done, over = done + count * size, over + count * left
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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


def entropy(counts):
    """Bytes of all symbols that occur so often, were each as long as its own entropy."""
    p = counts[counts > 0].double() / counts.sum()
    return (counts.sum() * -(p * p.log2()).sum()).item() / 8


def nearest_codes(pieces, tables, form, wide=False):
    """[(rows,)] codes of the nearest entry of each group's table; wide: in float64, for numbers whose squares float32
    does not hold."""
    if wide:
        pieces, tables = [piece.double() for piece in pieces], tables.double()
    luts = [lut[:, 0].contiguous() if form.cluster_dim == 1 else lut for lut in tables.unbind()]
    return assign(pieces, luts, cluster_dim=form.cluster_dim, layout=form.layout)


class Clustered(NamedTuple):
    """A clustered weight as it is stored: `decoded()` is W_hat."""

    shape: tuple
    dtype: torch.dtype
    form: Form
    codes: Tensor  # uint8, those of all groups one after the other, in `width` bits each
    width: int  # 8, or the bits of the form: packed, each group from a byte on
    entries: Tensor  # (groups, K, d): the tables, as stored
    lut_scales: Tensor | None  # (groups, 1, 1) of int8 tables
    scales: Tensor | None  # (C,): what each output channel was divided by; 0 for a channel of zeros
    leftovers: Tensor  # of all groups, one after the other, divided too

    @classmethod
    def of(cls, w, centroids, options, scales=None, wide=False):
        """The codes of the nearest of `centroids` (groups, K, d), rounded as they are stored.

        scales: of the channels, by default their max|W|. wide: as for `nearest_codes`.
        """
        form = Form.of(options)
        pieces, scales = divided(w, form, scales)
        entries, lut_scales = stored_lut(centroids, form.lut_dtype)
        luts = restored_lut(entries, lut_scales, centroids.dtype)
        codes = torch.cat(nearest_codes(pieces, luts, form, wide))
        leftovers = torch.cat([leftovers_of(piece, form) for piece in pieces])
        return cls(tuple(w.shape), w.dtype, form, codes, 8, entries, lut_scales, scales, leftovers)

    @property
    def groups(self):
        return self.geometry.groups_of(self.width)

    @property
    def geometry(self):
        return Geometry(self.shape, self.form)

    def packed(self):
        """These with packed codes."""
        bits = self.form.bits
        if self.width == bits:
            return self
        return self._replace(codes=pack(self.codes, self.geometry.groups_of(bits)), width=bits)

    def unpacked(self):
        """These with a byte for each code."""
        return self if self.width == 8 else self._replace(codes=unpack(self.codes, self.groups), width=8)

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
        rows = look_up(self.codes, self.groups, self.luts().to(self.dtype))
        out = assembled(rows, self.leftovers, self.shape, self.form)
        out = out if self.scales is None else out * along_channels(self.scales, len(self.shape))
        return out.transpose(0, 1).contiguous() if self.form.axis else out

    def counts(self):
        """(K,) how often each code occurs."""
        return torch.bincount(self.unpacked().codes, minlength=2**self.form.bits)

    def size(self, counts=None):
        """counts: those of `counts`, where they are known."""
        codes = self.geometry.groups_of(self.form.bits).nbytes
        luts = sum(t.nbytes for t in (self.entries, self.lut_scales, self.scales) if t is not None)
        dense = math.prod(self.shape) * self.dtype.itemsize
        counts = self.counts() if counts is None else counts
        return Size(dense, codes, luts, self.leftovers.nbytes, entropy(counts))


def divided(w, form, scales=None):
    """(the groups of a weight, divided by the scales of their channels, as they are clustered; the scales or None)"""
    if form.per_channel_scale:
        scales = channel_scales(w, form.axis) if scales is None else scales
        # by inf in a channel of zeros: they stay, without a gradient
        w = w / along_channels(torch.where(scales == 0, torch.inf, scales), w.dim(), form.axis)
    w = w.transpose(0, 1) if form.axis else w
    return [w] if form.group_size is None else list(w.split(form.group_size)), scales


def joined(pieces, w, form, scales):
    """A weight like w made of the numbers of its groups, as `divided` gives those of w. In a channel of zeros it is w
    itself, so that its gradient passes."""
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    out = out.transpose(0, 1) if form.axis else out
    if scales is None:
        return out
    scales = along_channels(scales, w.dim(), form.axis)
    return torch.where(scales == 0, w, out * scales)
