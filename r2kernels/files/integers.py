"""Weights and activations as other runtimes take them: integer codes, scales and integer zero points."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.columns import accumulator
from .clustered import assembled
from .uniform import Grid


class IntegerWeight(NamedTuple):
    """A weight is scale (codes - zero_point), in float32 and then rounded to the weight's dtype.

    codes: in the weight's shape. int8 with a zero point of 0 for levels around 0; uint8 where the zero point is another
        number. EWGS, DoReFa, SEQ and one bit have no level at 0: their codes are the odd numbers from 1 - 2^bits to
        2^bits - 1 and the scale is half a step, which is exact (int8; for 8 bits int16).
    scale: (1,); (C,) for the channels along `axis`; or one for every `group_size` numbers of a channel, those of the
    first channel first. zero_point: as many, in the dtype of the codes. bits: 2^bits levels, or 3 for 2.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None
    bits: int
    group_size: int | None = None

    def decoded(self, dtype=None):
        """The weight, in the scale's dtype or another one."""
        form = Grid(self.bits, self.axis, self.group_size)
        scale, zero = (form.over(values, self.codes.shape) for values in (self.scale, self.zero_point))
        return (scale * (self.codes.to(scale.dtype) - zero.to(scale.dtype))).to(dtype or scale.dtype)


class IntegerInput(NamedTuple):
    """An activation x becomes offset + scale (code - zero_point), in float32 and then rounded to the dtype of x.

    code = round((x - offset) / scale) + zero_point, half to even, clipped to -2^(bits-1)..2^(bits-1)-1 (signed) or
    0..2^bits-1; for one bit signed it is -1 below 0 and else 1. EWGS alone has an offset, its lower bound, which is no
    multiple of its scale.
    """

    bits: int
    scale: float
    zero_point: int
    signed: bool
    offset: float = 0.0

    def wrong(self):
        """(field, value) of what is not allowed, or None."""
        if type(self.bits) is not int or not 1 <= self.bits <= 8:
            return "bits", self.bits
        low, high = self.range()
        right = {
            "scale": isinstance(self.scale, float) and 0 < self.scale < math.inf,
            "zero_point": type(self.zero_point) is int and low <= self.zero_point <= high,
            "signed": isinstance(self.signed, bool),
            "offset": isinstance(self.offset, float) and math.isfinite(self.offset),
        }
        return next(((field, getattr(self, field)) for field, fine in right.items() if not fine), None)

    def range(self):
        """The least and the greatest code."""
        if self.signed:
            return (-1, 1) if self.bits == 1 else (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)
        return 0, 2**self.bits - 1

    def quantized(self, x):
        """x on its levels, by operations that every tracer and exporter knows."""
        wide = x.to(accumulator(x.dtype))
        scale = wide.new_full((), self.scale)  # on a GPU torch would multiply by the rounded 1 / scale of a number
        v = (wide - self.offset if self.offset else wide) / scale
        if self.signed and self.bits == 1:
            code = torch.where(v < 0, -1.0, 1.0).to(v.dtype)
        else:
            low, high = self.range()
            code = v.clamp(low - self.zero_point, high - self.zero_point).round()
        y = scale * code
        return (y + self.offset if self.offset else y).to(x.dtype)


class PaletteWeight(NamedTuple):
    """A weight is made of the entries of look-up tables, times `scale` of its output channel where there is one.

    codes: uint8; with cluster_dim = 1 in the weight's shape, else (rows,) in the order of the layout, one group after
        the other, of the weight with its output channels first.
    lut: (groups, 2^bits, cluster_dim), as stored: float32, float16, bfloat16, int8 times `lut_scale` (groups, 1, 1), or
        float8_e4m3fn times `lut_scale` (1, 1, 1).
    scale: (C,) or None. leftovers: the weights that no row holds, or empty.
    axis: the dimension of the output channels. group_size: how many of them share a table, or None.
    granularity: of tiles with a table each, their (rows, columns) in the matrix (output channels, all else), None for
        all; for experts (experts, rows, columns). Tables of full tiles come first, row of tiles by row of tiles, then
        those of the smaller tiles at the end of the columns, of the rows, and of both.
    """

    codes: Tensor
    lut: Tensor
    lut_scale: Tensor | None
    scale: Tensor | None
    leftovers: Tensor
    axis: int
    group_size: int | None
    granularity: tuple | None = None


class Integers(NamedTuple):
    """weights: parameter's name -> `IntegerWeight` or `PaletteWeight`. inputs: layer's name -> `IntegerInput`."""

    weights: dict
    inputs: dict


def integer_weight(uniform):
    """The `IntegerWeight` of a `Uniform`: the same numbers."""
    bits, axis, group_size = uniform.form
    codes = uniform.unpacked().codes.reshape(uniform.shape)
    scale, zero = uniform.scale, uniform.zero.long()
    if (zero % 2).any():
        codes = 2 * codes.long() - uniform.form.over(zero, uniform.shape)
        codes, scale, zero = codes.to(torch.int16 if bits == 8 else torch.int8), scale / 2, torch.zeros_like(zero)
    elif (zero == 2**bits).all() or (bits == 2 and (zero == 2).all()):  # the latter of three levels
        codes, zero = (codes.long() - zero[0] // 2).to(torch.int8), torch.zeros_like(zero)
    else:
        zero = zero // 2
    return IntegerWeight(codes, scale, zero.to(codes.dtype), axis, bits, group_size)


def palette_weight(clustered):
    """The `PaletteWeight` of a `Clustered`."""
    c, axis = clustered.unpacked(), clustered.form.axis
    codes = c.codes
    if c.form.cluster_dim == 1:
        codes = assembled(codes, c.leftovers, c.shape, c.form).transpose(0, axis).contiguous()
    beside = c.entries, c.lut_scales, c.scales, c.leftovers
    return PaletteWeight(codes, *beside, axis, c.form.group_size, c.form.granularity)
