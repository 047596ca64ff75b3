"""Steps and zero points for quantization after training, from one histogram of each tensor or channel.

"minmax" clips nothing; "mse" clips where the mean squared error is least.
"""

import torch

from ..files.uniform import Grid, Uniform
from ..reference.columns import accumulator
from ..reference.parameters import levels
from ..reference.quantizers import code
from .groups import group_qparams

METHODS = ("mse", "minmax")
BINS = 4096  # from -top to top
PART = 2**22  # elements that are counted at once
ROWS = 64  # channels that are searched at once


class Histogram:
    """Counts and sums of the numbers in equal bins from -top to top, of each row.

    A batch beyond the top doubles it, and joins neighbouring bins. All in float64.
    """

    def __init__(self, rows, device=None):
        self.count, self.sum = torch.zeros(2, rows, BINS, dtype=torch.float64, device=device).unbind()
        self.square, self.top, self.low, self.high = torch.zeros(4, rows, dtype=torch.float64, device=device).unbind()
        self.low, self.high = self.low + torch.inf, self.high - torch.inf

    def add(self, x):
        """x: (rows, N), finite."""
        for part in x.split(max(PART // len(x), 1), 1):
            part = part.double()
            self.low, self.high = torch.minimum(self.low, part.amin(1)), torch.maximum(self.high, part.amax(1))
            self._widen(part.abs().amax(1))
            scale = torch.where(self.top > 0, BINS / 2 / self.top, 0)[:, None]
            first = torch.arange(len(x), device=x.device)[:, None] * BINS
            place = (part * scale + BINS / 2).floor_().clamp_(0, BINS - 1).long() + first
            place, flat = place.reshape(-1), part.reshape(-1)
            self.count += torch.bincount(place, minlength=self.count.numel()).view_as(self.count)
            self.sum += torch.bincount(place, flat, minlength=self.count.numel()).view_as(self.count)
            self.square += part.square().sum(1)

    def _widen(self, top):
        doublings = torch.where(self.top > 0, (top / self.top).log2().ceil().clamp(min=0), 0)
        if (doublings > 0).any():
            half = BINS // 2
            place = torch.arange(BINS, device=top.device)[None] - half
            place = torch.div(place, (2**doublings)[:, None], rounding_mode="floor").long() + half
            self.count, self.sum = (torch.zeros_like(old).scatter_add_(1, place, old) for old in (self.count, self.sum))
        self.top = torch.where(self.top > 0, self.top * 2**doublings, top)

    def errors(self, step, first, gap, count):
        """(rows, candidates) sums of (x - nearest level)^2 for the levels step (first + gap j), j < count.

        step and first: (rows, candidates).
        """
        cuts = first[..., None] + gap * (torch.arange(count - 1, device=step.device) + 0.5)
        scale = torch.where(self.top > 0, BINS / 2 / self.top, 0)[:, None, None]
        place = (cuts * step[..., None] * scale + BINS / 2).round_().clamp_(0, BINS).long()
        # left of each edge of a bin
        below = [torch.nn.functional.pad(t.cumsum(1), (1, 0)) for t in (self.count, self.sum)]
        n, s = (t.gather(1, place.flatten(1)).view_as(cuts) for t in below)
        last = first + gap * (count - 1)
        total, sums = below[0][:, -1:], below[1][:, -1:]
        first_moment = last * sums - gap * s.sum(2)
        second_moment = last.square() * total - 2 * gap * (cuts * n).sum(2)
        return self.square[:, None] - 2 * step * first_moment + step.square() * second_moment


def step_of(histogram, bits, signed, method):
    """(rows,) steps of LSQ's levels, for symmetric quantization."""
    below, above = levels(bits, signed)
    widest = torch.maximum(histogram.high / above, -histogram.low / below if below else torch.zeros_like(histogram.low))
    widest = torch.where(widest > 0, widest, 1)
    if method == "minmax":
        return widest
    gap = 2 if bits == 1 and signed else 1
    count = (above + below) // gap + 1
    best = widest
    for span, points in ((12, 49), (0.25, 17), (0.03, 13)):
        octaves = torch.linspace(-span, 0 if span == 12 else span, points)
        steps = torch.minimum(best[:, None] * 2 ** octaves.to(best), widest[:, None])
        errors = histogram.errors(steps, torch.full_like(steps, -below), gap, count)
        best = steps.gather(1, errors.argmin(1, keepdim=True))[:, 0]
    return best


def affine_of(histogram, bits, method):
    """(rows,) steps and integer zero points of 2**bits levels step (j - zero)."""
    n = 2**bits - 1
    low, high = histogram.low.clamp(max=0), histogram.high.clamp(min=0)
    below, above = torch.zeros_like(low)[:, None], torch.zeros_like(low)[:, None]  # octaves that are cut off
    if method == "mse":
        for span, points in ((8, 17), (0.5, 5), (0.25, 5), (0.12, 5)):
            octaves = torch.linspace(0, span, points) if span == 8 else torch.linspace(-span, span, points)
            grid = torch.cartesian_prod(octaves, octaves).to(low)
            tried = [(cut + grid[:, i]).clamp(min=0) for i, cut in enumerate((below, above))]
            step, zero = _affine(low[:, None] * 2 ** -tried[0], high[:, None] * 2 ** -tried[1], n)
            best = histogram.errors(step, -zero, 1, n + 1).argmin(1, keepdim=True)
            below, above = (t.gather(1, best) for t in tried)
    step, zero = _affine(low[:, None] * 2**-below, high[:, None] * 2**-above, n)
    return step[:, 0], zero[:, 0]


def _affine(low, high, n):
    step = (high - low) / n
    step = torch.where(step > 0, step, 1)
    return step, (-low / step).round().clamp(0, n)


def weight_qparams(w, bits, axis, method, symmetric, group_size=None):
    """(step, zero point) of a weight: 0-dim, or (C,) for the channels along an axis, or one for each group of their
    numbers, in the accumulator's dtype.

    With `symmetric` the zero point is None. Instead of both None where the weight is not finite.
    """
    if group_size is not None:
        return group_qparams(w, Grid(bits, axis % w.dim(), group_size), method, symmetric)
    rows = w.detach().reshape(1, -1) if axis is None else w.detach().movedim(axis, 0).reshape(w.shape[axis], -1)
    found = []
    for some in rows.split(ROWS):
        if not some.isfinite().all():
            return None
        histogram = Histogram(len(some), w.device)
        histogram.add(some)
        found.append(histogram_qparams(histogram, bits, method, symmetric))
    step, zero = (None if parts[0] is None else torch.cat(parts) for parts in zip(*found, strict=True))
    step, zero = step.to(accumulator(w.dtype)), None if zero is None else zero.to(accumulator(w.dtype))
    return (step, zero) if axis is not None else (step[0], None if zero is None else zero[0])


def histogram_qparams(histogram, bits, method, symmetric, signed=True):
    """(step, zero point or None) of each row, (rows,) in float64."""
    return (step_of(histogram, bits, signed, method), None) if symmetric else affine_of(histogram, bits, method)


def coded(w, form, method, symmetric):
    """The `Uniform` of a weight with the step and zero point that `method` finds, or None where it is not finite."""
    found = weight_qparams(w, form.bits, form.axis, method, symmetric, form.group_size)
    return found and nearest(w, form, *found)


def nearest(w, form, step, zero, kind="lsq"):
    """The `Uniform` of the nearest levels: LSQ's of this step, of the kind that `lsq` calls `levels`, or with integer
    zero points step (code - zero)."""
    v = w.detach().to(step.dtype) / form.over(step, w.shape)
    if zero is not None:
        return Uniform.of(v.round() + form.over(zero, w.shape), w.dtype, form, step, 2 * zero)
    if form.bits == 1:
        return Uniform.of((v >= 0).to(v.dtype), w.dtype, form, 2 * step, 1)
    low, _ = levels(form.bits, True, kind)
    return Uniform.of(code(v, form.bits, True, kind) + low, w.dtype, form, step, 2 * low)
