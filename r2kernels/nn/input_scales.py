"""The parameters of one quantizer of a layer's input, learned (LSQ, EWGS, PACT) or frozen.

It is called with x. Its range starts from what it has `seen`; `affine()` are its scale, zero point and whether it is
signed, and for EWGS the offset.
"""

import math

import torch
from torch import nn

from ..files.integers import IntegerInput
from ..functional import quantizers
from ..reference import parameters
from ..sharding.shards import beside
from .scales import bounds, initial_delta, learned, other_form, positive, refuse_start, wide

HALF_NORMAL = math.sqrt(1 - 2 / math.pi)  # std of |x| for a standard normal x


class Seen:
    """Moments and extremes of all numbers of some tensors, in float64."""

    def __init__(self):
        self.count = 0

    def add(self, x):
        x = wide(x)
        n, mean, size = x.numel(), x.mean(dtype=torch.float64), x.abs().mean(dtype=torch.float64)
        low, high = (v.double() for v in x.aminmax())
        m2 = x.to(torch.float64, copy=True).sub_(mean).square_().sum()
        if self.count:  # Chan's merge
            part, apart = n / (self.count + n), mean - self.mean
            m2 = self.m2 + m2 + apart.square() * self.count * part
            mean, size = self.mean + apart * part, self.size + (size - self.size) * part
            low, high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.count += n
        self.mean, self.size, self.m2, self.low, self.high = mean, size, m2, low, high

    @property
    def top(self):
        return torch.maximum(self.high, -self.low)

    @property
    def std(self):
        return (self.m2 / self.count).sqrt()


class Input(nn.Module):
    """What inputs share: whether they have started, and whether the first batch had negative values."""

    def __init__(self, w, options):
        super().__init__()
        self.bits, self.seen, self.calls = options.activation_bits, Seen(), 0
        for name in ("started", "signed"):
            self.register_buffer(name, torch.zeros((), dtype=torch.bool, device=w.device))
        self.read()

    def read(self):
        """The flags, where Python can branch on them."""
        self.is_started, self.is_signed = bool(self.started), bool(self.signed)

    def start(self, name):
        """Takes the range from what was seen; from zeros alone it does not start. ValueError names the layer."""
        top = self.seen.top.item()
        if not math.isfinite(top):
            raise ValueError(
                f"the input of {name} has a NaN or an infinity in the batch that its range starts from; start from "
                "another batch"
            )
        if top == 0:
            self.seen = Seen()
            return
        self.signed.copy_(self.seen.low < 0)
        self.started.fill_(True)
        self.read()
        self.from_seen(self.seen)

    def integers(self):
        """The `IntegerInput` of these levels."""
        return IntegerInput(self.bits, *self.affine())

    @property
    def clips_negative(self):
        """Whether it has no levels for negative values, because there were none when it started."""
        return not self.is_signed

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.read()

    def __getstate__(self):
        return {**self.__dict__, "seen": Seen()}


class _GradientTimes(torch.autograd.Function):
    """p; its gradient is multiplied by `factor`."""

    @staticmethod
    def forward(ctx, p, factor):
        ctx.factor = factor
        return p.view_as(p)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None


def by_sample(step, x):
    """The step for the batch x (samples first): `lsq` scales its gradient by 1 / sqrt(N QP) with N the numbers of the
    batch; LSQ counts those of a sample, so that the gradient does not depend on how a batch is divided."""
    return _GradientTimes.apply(step, len(x) ** 0.5) if x.dim() > 1 else step


class LSQInput(Input):
    """A learned step."""

    def __init__(self, w, options):
        super().__init__(w, options)
        self.step = learned(w)

    def from_seen(self, seen):
        self.step.copy_(2 * seen.size / math.sqrt(parameters.levels(self.bits, self.is_signed)[1]))

    def affine(self):
        return positive(self.step).item(), 0, self.is_signed

    def forward(self, x):
        return quantizers.sized_lsq(x, by_sample(self.step, x), self.bits, signed=self.is_signed)


class EWGSInput(Input):
    """Learned bounds; the output comes back on the scale of the input."""

    clips_negative = False

    def __init__(self, w, options):
        super().__init__(w, options)
        self.lower, self.upper = learned(w), learned(w)
        self.register_buffer("delta", initial_delta(w, options))

    def from_seen(self, seen):
        self.lower.copy_(seen.low)
        self.upper.copy_(3 * seen.std / HALF_NORMAL)

    def span(self):
        return positive(self.upper - self.lower)

    def affine(self):
        return (self.span() / (2**self.bits - 1)).item(), 0, False, self.lower.item()

    def forward(self, x):
        q = quantizers.sized_ewgs(x, self.lower, self.upper, self.bits, delta=self.delta, signed=False)
        lower, upper = bounds(self.lower.detach(), self.upper.detach())
        return beside(lower, q) + beside(upper - lower, q) * q


class PACTInput(Input):
    """Inputs with negative values: signed LSQ with the step alpha / QP, because PACT has no negative levels."""

    def __init__(self, w, options):
        super().__init__(w, options)
        self.alpha, self.plus = learned(w), options.plus

    def from_seen(self, seen):
        spread = 3 * seen.std / (1 if self.is_signed else HALF_NORMAL)
        self.alpha.copy_(torch.where(spread > 0, torch.minimum(seen.top, spread), seen.top))

    def affine(self):
        top = parameters.levels(self.bits, self.is_signed)[1]
        return (positive(self.alpha) / top).item(), 0, self.is_signed

    def forward(self, x):
        if self.is_signed:
            step = by_sample(positive(self.alpha) / parameters.levels(self.bits, True)[1], x)
            return quantizers.lsq(x, step, self.bits)
        return quantizers.sized_pact(x, self.alpha, self.bits, plus=self.plus)


class FrozenInput(Input):
    """A step and, unless it is None, an integer zero point, found by `calibrate`."""

    def __init__(self, w, options, step, zero, signed):
        super().__init__(w, options)
        self.register_buffer("form", torch.tensor([self.bits], device=w.device))
        self.register_buffer("step", step)
        self.register_buffer("zero", zero)
        self.signed.fill_(signed)
        self.started.fill_(True)
        self.read()

    def start(self, name):
        refuse_start()

    @property
    def clips_negative(self):
        return self.zero is None and not self.is_signed

    def affine(self):
        if self.zero is None:
            return self.step.item(), 0, self.is_signed
        return self.step.item(), int(self.zero.item()), False

    def forward(self, x):
        if self.zero is None:
            return quantizers.lsq(x, self.step, self.bits, signed=self.is_signed)
        shift = beside(self.step * self.zero, x)
        return (quantizers.lsq(x.to(shift.dtype) + shift, self.step, self.bits, signed=False) - shift).to(x.dtype)

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        other_form(self, state, prefix, errors)
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
