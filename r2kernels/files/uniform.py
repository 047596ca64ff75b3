"""A weight on uniform levels as it is stored: codes, a scale and a zero point for the tensor, or for each channel or
group."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.columns import accumulator
from .clustered import Size, entropy, squares
from .packing import Groups, pack, unpack


class Grid(NamedTuple):
    """How a weight is quantized. axis: that of its channels, or None. group_size: how many of the numbers of a channel,
    one after the other, share a scale; None, or as many as there are or more, for all of them."""

    bits: int
    axis: int | None = None
    group_size: int | None = None

    def channels(self, shape):
        """How many scales there are: 1, or the channels, or the groups, those of the first channel first."""
        return 1 if self.axis is None else shape[self.axis] * self.each(shape)

    def each(self, shape):
        """How many groups a channel has."""
        return 1 if self.group_size is None else max(_inputs(shape, self.axis) // self.group_size, 1)

    def rows(self, w):
        """(scales, numbers of each): w by tensor, channel or group; a view where w is contiguous and the axis its
        first, else a copy."""
        return (w.movedim(self.axis, 0) if self.axis else w).reshape(self.channels(w.shape), -1)

    def from_rows(self, rows, shape):
        """A tensor of this shape of its `rows`, without a copy."""
        if not self.axis:
            return rows.reshape(shape)
        others = [n for i, n in enumerate(shape) if i != self.axis]
        return rows.reshape(shape[self.axis], *others).movedim(0, self.axis)

    def over(self, values, shape):
        """One number for each scale, as a factor of a tensor of this shape."""
        if self.axis is None or self.each(shape) == 1:
            return along(values, self.axis, len(shape))
        return self.from_rows(values[:, None].expand(-1, math.prod(shape) // len(values)), shape)

    def groups(self, shape, bits):
        """How the codes lie in `bits` bits each."""
        return Groups(math.prod(shape), math.prod(shape), bits)

    def parts(self, shape, dtype):
        """part -> (dtype, shape) of what is stored beside the codes."""
        each = (self.channels(shape),)
        return {"scale": (accumulator(dtype), each), "zero": (torch.int16, each)}

    def wrong(self, shape):
        """(field, value) of what is not allowed for a weight of this shape, or None."""
        if type(self.bits) is not int or not 1 <= self.bits <= 8:
            return "bits", self.bits
        if self.axis is not None and (type(self.axis) is not int or not 0 <= self.axis < len(shape)):
            return "axis", self.axis
        if self.group_size is not None and not self._has_groups(shape):
            return "group_size", self.group_size
        return None

    def _has_groups(self, shape):
        size = self.group_size
        if self.axis is None or type(size) is not int or size < 1:
            return False
        inputs = _inputs(shape, self.axis)
        return size >= inputs or inputs % size == 0

    def restored(self, shape, dtype, codes, width, parts):
        """The `Uniform` weight made of its parts as they are stored."""
        return Uniform(shape, dtype, self, codes, width, parts["scale"], parts["zero"])


class Uniform(NamedTuple):
    """A weight on uniform levels: `decoded()` is scale (code - zero / 2).

    The zero point is in half steps, because EWGS, DoReFa and one bit have no level at 0.
    """

    shape: tuple
    dtype: torch.dtype
    form: Grid
    codes: Tensor  # uint8, in the order of the weight, in `width` bits each
    width: int  # 8, or the bits of the form: packed
    scale: Tensor  # (scales,), one for the tensor or for each channel or group, in the accumulator's dtype
    zero: Tensor  # (scales,) int16: twice the code of 0

    @classmethod
    def of(cls, codes, dtype, form, scale, zero):
        """From codes shaped like the weight, as floating-point numbers.

        scale: a tensor, 0-dim or one for each channel or group; zero: a number or one for each, twice the code of 0.
        """
        shape = tuple(codes.shape)
        channels = form.channels(shape)
        top = 2**form.bits - 1
        flat = codes.nan_to_num(0).clamp(0, top).to(torch.uint8).reshape(-1)
        scale = scale.detach().to(accumulator(dtype)).reshape(-1).expand(channels).contiguous()
        zero = torch.as_tensor(zero, device=codes.device).to(torch.int16).reshape(-1).expand(channels).contiguous()
        return cls(shape, dtype, form, flat, 8, scale, zero)

    @property
    def groups(self):
        return self.form.groups(self.shape, self.width)

    def packed(self):
        """These with packed codes."""
        bits = self.form.bits
        if self.width == bits:
            return self
        return self._replace(codes=pack(self.codes, self.form.groups(self.shape, bits)), width=bits)

    def unpacked(self):
        """These with a byte for each code."""
        return self if self.width == 8 else self._replace(codes=unpack(self.codes, self.groups), width=8)

    def parts(self):
        return {"scale": self.scale, "zero": self.zero}

    def decoded(self):
        codes = self.unpacked().codes[: math.prod(self.shape)].reshape(self.shape)
        scale, zero = (self.form.over(values, self.shape) for values in (self.scale, self.zero))
        return (scale * (codes.to(scale.dtype) - zero.to(scale.dtype) / 2)).to(self.dtype)

    def errors(self, w):
        """((||w||^2, ||w - W_hat||^2), `counts`) of the weight w that is quantized."""
        return squares(w, self.decoded()), self.counts()

    def counts(self):
        """(2**bits,) how often each code occurs."""
        return torch.bincount(self.unpacked().codes, minlength=2**self.form.bits)

    def size(self, counts=None):
        """counts: those of `counts`, where they are known."""
        dense = math.prod(self.shape) * self.dtype.itemsize
        codes = self.form.groups(self.shape, self.form.bits).nbytes
        counts = self.counts() if counts is None else counts
        return Size(dense, codes, self.scale.nbytes + self.zero.nbytes, 0, entropy(counts))


def _inputs(shape, axis):
    """How many numbers a channel has."""
    return math.prod(shape) // shape[axis]


def along(values, axis, dims):
    """(C,) numbers as a factor of a tensor of so many dimensions, along its axis; (1,) ones of all of it."""
    return values.reshape([1] * dims if axis is None else [-1 if i == axis else 1 for i in range(dims)])
