"""Steps and zero points of the groups of a weight, for quantization after training: found by trying, since a group has
too few numbers for a histogram."""

import math

import torch

from ..functional.quantizers import lsq
from ..reference import parameters
from ..reference.columns import accumulator

PART = 2**18  # numbers that are searched at once: a core's cache holds them for all tries
TINY = 1e-30  # the step of a group of zeros, for levels without 0
COARSE = [i / 4 for i in range(-24, 1)]  # octaves, below the step that clips nothing
FINE = [octave * scale for scale in (0.06, 0.02) for octave in (-3, -2, -1, 1, 2, 3)]
CUTS = (0, 0.5, 1, 2)  # octaves that are cut off either end of a range
STEPS = (0.25, 0.12, 0.06, 0.03)  # by which the best cuts then move


def group_qparams(w, form, method, symmetric, levels="lsq", weight=None):
    """(step, zero point) of each tensor, channel or group of a weight, (scales,) in the accumulator's dtype.

    form: the `Grid`. method: "minmax" clips nothing, "mse" where the mean squared error is least. symmetric: the
    levels of `lsq`, and None for the zero point; else 2**bits levels step (code - zero) with an integer zero. weight:
    what the squared error of each number counts, for "mse"; alike in groups where all are 0. Instead of both None
    where the weight is not finite. 4096 x 4096 numbers in groups of 128 take seconds on a core.
    """
    if method not in ("mse", "minmax"):
        raise ValueError(f'method must be "mse" or "minmax" with group_size, got {method!r}')
    w = w.detach()
    if not w.isfinite().all():
        return None
    rows = form.rows(w.to(accumulator(w.dtype)))
    parts = [[part] for part in rows.split(max(PART // rows.shape[1], 1))]
    if weight is not None:
        roots = form.rows(weight.to(rows.dtype)).sqrt()
        roots = torch.where(roots.any(1, keepdim=True), roots, 1)
        parts = list(zip(rows.split(len(parts[0][0])), roots.split(len(parts[0][0])), strict=True))
    if symmetric:
        return torch.cat([_step(form.bits, method, levels, *part) for part in parts]), None
    step, zero = zip(*[_affine(form.bits, method, *part) for part in parts], strict=True)
    return torch.cat(step), torch.cat(zero)


class _Best:
    """Of what was tried for each row that of the least error."""

    def __init__(self, rows):
        self.error, self.values = rows.new_full(rows.shape[:1], math.inf), None

    def add(self, error, *values):
        better = error < self.error
        old = values if self.values is None else self.values
        self.error = torch.where(better, error, self.error)
        self.values = [torch.where(better, new, kept) for new, kept in zip(values, old, strict=True)]


def _step(bits, method, levels, rows, roots=None):
    low, high = parameters.levels(bits, True, levels)
    widest = torch.maximum(rows.amax(1) / high, -rows.amin(1) / low)
    has_zero = levels != "seq" and bits > 1
    widest = torch.where(widest > 0, widest, 1 if has_zero else TINY)
    if method == "minmax":
        return widest
    best = _Best(rows)
    for octaves in (COARSE, FINE):
        centre = widest if octaves is COARSE else best.values[0]
        for octave in octaves:
            step = torch.minimum(centre * 2**octave, widest)
            best.add(_error(rows, step, bits, roots, levels=levels), step)
    return best.values[0]


def _error(rows, step, bits, roots, **options):
    error = lsq(rows, step, bits, axis=0, **options).sub_(rows)
    return torch.linalg.vector_norm(error if roots is None else error.mul_(roots), dim=1)


def _affine(bits, method, rows, roots=None):
    n = 2**bits - 1
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)

    def levels_of(below, above):
        step = (high * 2**-above - low * 2**-below) / n
        step = torch.where(step > 0, step, 1)
        return step, (-low * 2**-below / step).round().clamp(0, n)

    nothing = torch.zeros_like(low)
    if method == "minmax":
        return levels_of(nothing, nothing)
    best = _Best(rows)

    def attempt(below, above):
        below, above = below.clamp(min=0), above.clamp(min=0)
        step, zero = levels_of(below, above)
        best.add(_error(rows + (step * zero)[:, None], step, bits, roots, signed=False), below, above)

    for below in CUTS:
        for above in CUTS:
            attempt(nothing + below, nothing + above)
    for by in STEPS:
        below, above = best.values
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                if i or j:
                    attempt(below + i * by, above + j * by)
    return levels_of(*best.values)
