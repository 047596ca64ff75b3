"""Steps and zero points for quantization after training, from one histogram of each tensor or channel.

"minmax" clips nothing; "mse" clips where the mean squared error is least; "percentile" clips what lies beyond a
percentile of |x|, or for levels with a zero point beyond that of either tail.
"""

import torch

from ..files.uniform import Grid, Uniform
from ..reference.columns import accumulator
from ..reference.parameters import levels
from ..reference.quantizers import code
from .groups import group_qparams

METHODS = ("mse", "minmax", "percentile")
PERCENTILE = 99.99
BINS = 2**12  # on either side of 0
PART = 2**22  # elements that are counted at once
ROWS = 64  # channels that are searched at once
TINY = 1e-30  # the step of a row of zeros for 1 bit, which has no level 0
LEAST = -960  # the exponent of a row of zeros: 2 to it is less than what float32 and float64 weights hold


class Histogram:
    """How many numbers of each row lie in equal bins from -2**exponent to 2**exponent.

    A batch beyond that doubles it as often as needed, and joins neighbouring bins. The ends are powers of two and the
    counts integers, so that batches in any order, on any number of ranks, give the same bits. The host reads nothing.
    """

    def __init__(self, rows, device=None):
        self.count = torch.zeros(rows, 2 * BINS, dtype=torch.int64, device=device)
        self.exponent = torch.full((rows,), LEAST, dtype=torch.int64, device=device)
        self.strange = torch.zeros(rows, dtype=torch.int64, device=device)  # NaN and infinities: how many
        self.low = torch.full((rows,), torch.inf, dtype=torch.float64, device=device)
        self.high = -self.low

    def add(self, x, masses=None):
        """x: (rows, N); masses: integers as which these count, by default 1."""
        size = max(PART // len(x), 1)
        for i, part in enumerate(x.split(size, 1)):
            finite = part.isfinite()
            self.strange += (~finite).sum(1)
            part = torch.where(finite, part, 0).double()
            low, high = part.amin(1), part.amax(1)
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
            top = torch.maximum(high, -low)
            self.widen(torch.where(top > 0, top.frexp().exponent, LEAST))
            place = (part / self._width()).floor_().short() + BINS
            if masses is None:
                self.count += counted(place, 2 * BINS, x.device.type == "cpu")
            else:
                self.count.scatter_add_(1, place.long(), masses[:, i * size : (i + 1) * size])

    def widen(self, exponent):
        """Has the bins reach to 2**exponent, (rows,), or as far as they do."""
        exponent = torch.maximum(self.exponent, exponent)
        doublings = (exponent - self.exponent).clamp(max=13)  # which leave two bins
        edges = (torch.arange(-BINS, BINS + 1, device=exponent.device) << doublings[:, None]).clamp_(-BINS, BINS)
        self.count = _below(self.count).gather(1, edges + BINS).diff(dim=1)
        self.exponent = exponent

    def _width(self):
        """(rows, 1), of the bins: 2**exponent / BINS, put together as float64 has it, since exp2 may round on CUDA."""
        return ((self.exponent + (1023 - 12)) << 52).view(torch.float64)[:, None]

    def errors(self):
        """A function of (step, first, gap, count): sums of (x - nearest level)^2, (rows, candidates).

        The levels are step (first + gap j), j < count, with step and first (rows, candidates). Each x counts as the
        middle of its bin. The sums are in squared widths of the row's bins, and without x^2, which no level changes.
        """
        width = self._width()
        twice_middles = 2 * torch.arange(-BINS, BINS, device=width.device) + 1
        # sums of integers: those of floats by cumsum differ from run to run on CUDA
        counts, moments = (_below(t).double() for t in (self.count, self.count * twice_middles))

        def of(step, first, gap, count):
            step = step / width
            cuts = first[..., None] + gap * (torch.arange(count - 1, dtype=torch.float32, device=step.device) + 0.5)
            place = (cuts * step[..., None]).round_().clamp_(-BINS, BINS).long().flatten(1) + BINS
            n, s = (t.gather(1, place).view_as(cuts) for t in (counts, moments))
            last = first + gap * (count - 1)
            twice_first_moment = last * moments[:, -1:] - gap * s.sum(2)
            second_moment = last.square() * counts[:, -1:] - 2 * gap * (cuts * n).sum(2)
            return step.square() * second_moment - step * twice_first_moment

        return of

    def percentile(self, percentile, tails):
        """(low, high) of each row without what |x| beyond its percentile, or with `tails` x beyond either's, has.

        By linear interpolation in a bin. Where less than a bin would be left, nothing is cut.
        """
        share, width = percentile / 100, self._width()[:, 0]
        if tails:
            low, high = ((_quantile(self.count, q) - BINS) * width for q in (1 - share, share))
        else:
            high = _quantile(self.count[:, BINS:] + self.count[:, :BINS].flip(1), share) * width
            low = -high
        low, high = torch.maximum(self.low, low), torch.minimum(self.high, high)
        narrow = torch.maximum(high, -low) < width
        return torch.where(narrow, self.low, low), torch.where(narrow, self.high, high)


def counted(codes, most, in_turn):
    """(rows, most) how often each code below `most` occurs in each row of codes: one after the other, or where that
    would read their largest (on a GPU) from their order."""
    codes, rows = codes.contiguous(), len(codes)
    if in_turn:
        codes = codes + torch.arange(0, rows * most, most, device=codes.device)[:, None]
        return torch.bincount(codes.view(-1), minlength=rows * most).view(rows, most)
    edges = torch.arange(most + 1, dtype=codes.dtype, device=codes.device).repeat(rows, 1)
    return torch.searchsorted(codes.sort(dim=1).values, edges).diff(dim=1)


def _below(count):
    """(rows, bins + 1) sums of what is left of each edge."""
    return torch.nn.functional.pad(count.cumsum(1), (1, 0))


def _quantile(count, share):
    """(rows,) where below which this share of the counts lies, in bins from the first edge."""
    below = _below(count).double()
    rank = share * below[:, -1:]
    bin = (torch.searchsorted(below, rank) - 1).clamp(min=0)
    left, right = below.gather(1, bin), below.gather(1, bin + 1)
    return (bin + (rank - left) / (right - left).clamp(min=1))[:, 0]


def _octaves(low, high, points):
    """On the CPU, whose bits they have for every device."""
    return torch.linspace(low, high, points, dtype=torch.float32, device="cpu")


def step_of(histogram, bits, signed, method, percentile=PERCENTILE):
    """(rows,) steps of LSQ's levels, for symmetric quantization."""
    below, above = levels(bits, signed)
    low, high = histogram.percentile(percentile, False) if method == "percentile" else (histogram.low, histogram.high)
    widest = torch.maximum(high / above, -low / below if below else torch.zeros_like(low))
    gap = 2 if bits == 1 and signed else 1
    widest = torch.where(widest > 0, widest, TINY if gap == 2 else 1)
    if method != "mse":
        return widest
    count = (above + below) // gap + 1
    best, errors = widest, histogram.errors()
    for span, points in ((12, 49), (0.25, 17), (0.03, 13)):
        octaves = _octaves(-span, 0 if span == 12 else span, points)
        steps = torch.minimum(best[:, None] * 2 ** octaves.to(best), widest[:, None])
        least = errors(steps, torch.full_like(steps, -below), gap, count).argmin(1, keepdim=True)
        best = steps.gather(1, least)[:, 0]
    return best


def affine_of(histogram, bits, method, percentile=PERCENTILE):
    """(rows,) steps and integer zero points of 2**bits levels step (j - zero)."""
    n = 2**bits - 1
    low, high = histogram.percentile(percentile, True) if method == "percentile" else (histogram.low, histogram.high)
    low, high = low.clamp(max=0), high.clamp(min=0)
    below, above = torch.zeros_like(low)[:, None], torch.zeros_like(low)[:, None]  # octaves that are cut off
    if method == "mse":
        errors = histogram.errors()
        for span, points in ((8, 17), (0.5, 5), (0.25, 5), (0.12, 5)):
            octaves = _octaves(0 if span == 8 else -span, span, points)
            grid = torch.cartesian_prod(octaves, octaves).to(low)
            tried = [(cut + grid[:, i]).clamp(min=0) for i, cut in enumerate((below, above))]
            step, zero = _affine(low[:, None] * 2 ** -tried[0], high[:, None] * 2 ** -tried[1], n)
            best = errors(step, -zero, 1, n + 1).argmin(1, keepdim=True)
            below, above = (t.gather(1, best) for t in tried)
    step, zero = _affine(low[:, None] * 2**-below, high[:, None] * 2**-above, n)
    return step[:, 0], zero[:, 0]


def _affine(low, high, n):
    step = (high - low) / n
    step = torch.where(step > 0, step, 1)
    return step, (-low / step).round().clamp(0, n)


def weight_qparams(w, bits, axis, method, symmetric, group_size=None, percentile=PERCENTILE, weight=None):
    """(step, zero point) of a weight: 0-dim, or (C,) for the channels along an axis, or one for each group of their
    numbers, in the accumulator's dtype.

    With `symmetric` the zero point is None. Instead of both None where the weight is not finite. weight: what the
    squared error of each number counts, for the method "mse".
    """
    weight = weight if method == "mse" else None
    if group_size is not None:
        return group_qparams(w, Grid(bits, axis % w.dim(), group_size), method, symmetric, weight=weight)

    def rows_of(t):
        return t.detach().reshape(1, -1) if axis is None else t.detach().movedim(axis, 0).reshape(t.shape[axis], -1)

    rows, masses = rows_of(w), None if weight is None else _masses(rows_of(weight))
    if not rows.isfinite().all():
        return None
    found = []
    for i, some in enumerate(rows.split(ROWS)):
        histogram = Histogram(len(some), w.device)
        histogram.add(some, None if masses is None else masses[i * ROWS : (i + 1) * ROWS])
        found.append(histogram_qparams(histogram, bits, method, symmetric, percentile=percentile))
    step, zero = (None if parts[0] is None else torch.cat(parts) for parts in zip(*found, strict=True))
    step, zero = step.to(accumulator(w.dtype)), None if zero is None else zero.to(accumulator(w.dtype))
    return (step, zero) if axis is not None else (step[0], None if zero is None else zero[0])


def _masses(rows):
    """Importances as integers in units of a row's greatest / 2**20, whose sums are the same in any order; 1 where all
    of a row are 0."""
    most = rows.amax(1, keepdim=True)
    return torch.where(most > 0, (rows.double() / most * 2**20).round(), 1).long()


def histogram_qparams(histogram, bits, method, symmetric, signed=True, percentile=PERCENTILE):
    """(step, zero point or None) of each row, (rows,) in float64."""
    if symmetric:
        return step_of(histogram, bits, signed, method, percentile), None
    return affine_of(histogram, bits, method, percentile)


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
