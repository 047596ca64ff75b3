"""The losses and statistics of sharded weights: how the states of shards are merged, and what the kernels are given so
that the gradients of a shard are those of the whole weight.

Forward: the kernel on the shards, one message, a merge. Backward: the kernel on the shards with what the merge saved;
no message. The gradient of a learned parameter is made of what was saved alone, so it has the same bits on all ranks.
"""

import torch

from ..algorithms.rank import select
from ..reference import range_losses as losses
from ..reference import regularizers
from ..reference.regularizers import split_terms
from .shards import Shards, local


class Rule:
    """How one loss is merged. Its (L, d) parameters are `given`; here and whole are the (L, 1) rows of d that lie on
    this rank, and in all."""

    @staticmethod
    def seen(given, shards, here, whole):
        """The parameters as the kernels on the shards take them; behind these, what only the merge needs."""
        return given

    @staticmethod
    def states(loss, saved, seen, here):
        """(L, ...) tensors that the ranks tell each other."""
        return [saved]

    @staticmethod
    def fold(given, *tables):
        """(loss, saved) from the states of all ranks, (ranks, L, ...) each; float64."""

    @staticmethod
    def backward(grad, given, saved, here, whole):
        """(grad, parameters, saved) as the kernels on the shards take them."""
        return grad, given, saved

    @staticmethod
    def learned(grad, given, saved, whole):
        """The gradient of the first parameter."""


class LInf(Rule):
    @staticmethod
    def fold(given, table):
        tops, ties = table.unbind(-1)
        top = tops.amax(0)
        saved = torch.stack([top, torch.where(tops == top, ties, 0).sum(0)], -1)
        return losses.l_inf_loss(saved), saved


class Margin(Rule):
    @staticmethod
    def seen(given, shards, here, whole):
        M, k = given
        divisor = losses.ratio(k, whole.clamp(min=1).to(k.dtype))
        return [M, torch.where(divisor < 1, divisor / here.clamp(min=1).to(k.dtype), divisor)]  # below 1: a fraction

    @staticmethod
    def states(loss, saved, seen, here):
        return [loss.double() - seen[0].abs().double().sum(1), saved]

    @staticmethod
    def fold(given, sums, counts):
        return given[0].abs().double().sum(1) + sums.sum(0), counts.sum(0)

    @staticmethod
    def backward(grad, given, saved, here, whole):
        return grad, Margin.seen(given, None, here, whole), saved

    @staticmethod
    def learned(grad, given, saved, whole):
        M, k = given
        return losses.margin_learned(grad, M, losses.ratio(k, whole.clamp(min=1).to(k.dtype)), saved)


def _soft_side(table, slope):
    """(shift, 1 / sum of exponentials, mean - shift, std) of p = softmax(slope x) over all shards, from those of each
    (ranks, l, d, 4)."""
    shifts, inverse, means, stds = table.unbind(-1)
    held = inverse != 0  # empty shards have no exponentials
    exponents = (slope * shifts).masked_fill(~held, -torch.inf)
    shift = shifts.gather(0, exponents.argmax(0, keepdim=True))
    z = torch.where(held, (slope * (shifts - shift)).exp() / inverse, 0)
    total = z.sum(0)
    share = z / torch.where(total == 0, 1, total)
    places = torch.where(held, means + (shifts - shift), 0)
    mean = (share * places).sum(0)
    away = places - mean
    unit = torch.maximum(away.abs(), stds).amax(0)
    unit = torch.where((unit > 0) & unit.isfinite(), unit, 1)  # squares need not be numbers
    variance = (share * ((stds / unit).square() + (away / unit).square())).sum(0)
    return [shift[0], torch.where(total == 0, 0, 1 / total), mean, unit * variance.sqrt()]


class SoftExtrema(Rule):
    @staticmethod
    def fold(given, table):
        saved = SoftExtrema.saved(given, table)
        return losses.soft_extrema_loss(saved).transpose(0, 1), saved

    @staticmethod
    def saved(given, table):
        alpha = given[0].double()
        return torch.stack([*_soft_side(table[..., :4], alpha), *_soft_side(table[..., 4:], -alpha)], -1)

    @staticmethod
    def learned(grad, given, saved, whole):
        return losses.soft_extrema_learned(grad, saved)


class SoftMinMax(Rule):
    @staticmethod
    def fold(given, table):
        saved = SoftExtrema.saved(given, table)
        return losses.soft_min_max_loss(saved, given[0].double()), saved

    @staticmethod
    def learned(grad, given, saved, whole):
        return losses.soft_min_max_learned(grad, given[0], saved)


def moments(n, mean, std, skew, kurtosis, is_constant):
    """[mean, unbiased std, mean z^3, mean z^4] of all numbers from those of shards of n, (ranks, l) each.

    Pébay 2008, "Formulas for Robust, One-Pass Parallel Computation of Covariances and Arbitrary-Order Statistical
    Moments".
    """
    count = n.sum(0)
    centre = (n * mean).sum(0) / count.clamp(min=1)
    delta = torch.where(n > 0, mean - centre, 0)
    unit = torch.maximum(delta.abs(), std).amax(0)
    unit = torch.where((unit > 0) & unit.isfinite(), unit, 1)
    delta, s = delta / unit, std / unit
    m2, m3, m4 = (n - 1).clamp(min=0) * s**2, n * skew * s**3, n * kurtosis * s**4
    second = (m2 + n * delta**2).sum(0)
    third = (m3 + 3 * delta * m2 + n * delta**3).sum(0)
    fourth = (m4 + 4 * delta * m3 + 6 * delta**2 * m2 + n * delta**4).sum(0)
    s = torch.where(is_constant, 0, (second / (count - 1).clamp(min=1)).sqrt())
    one, count = torch.where(s == 0, 1, s), count.clamp(min=1)
    third, fourth = (torch.where(s == 0, 0, m / (count * one**power)) for m, power in ((third, 3), (fourth, 4)))
    return [centre, unit * s, third, fourth]


class Kure(Rule):
    @staticmethod
    def states(loss, saved, seen, here):
        return [here, saved]

    @staticmethod
    def fold(given, n, table):
        mean, rstd, skew, kurtosis = table[:, :, 0].unbind(-1)
        n = n[..., 0]
        first = mean.gather(0, (n > 0).double().argmax(0, keepdim=True))
        rounding = 4 * torch.finfo(given[0].dtype).eps * first.abs()  # of the means of equal numbers
        is_constant = ((n == 0) | ((rstd == 0) & ((mean - first).abs() <= rounding))).all(0)
        std = torch.where(rstd == 0, 0, 1 / rstd)
        mean, std, skew, kurtosis = moments(n, mean, std, skew, kurtosis, is_constant)
        saved = torch.stack([mean, torch.where(std == 0, 0, 1 / std), skew, kurtosis], -1)[:, None]
        return regularizers.kure_loss(saved, given[0].double()), saved

    @staticmethod
    def backward(grad, given, saved, here, whole):
        """The kernel takes 1 / n and n / (n - 1) of its shard."""
        ratio = (whole / (whole - 1).clamp(min=1)) / (here / (here - 1).clamp(min=1)).clamp(min=1)
        kurtosis = saved[..., 3] * ratio
        moved = torch.cat([saved[..., :3], kurtosis[..., None]], -1).to(saved.dtype)
        target = (given[0] + (kurtosis - saved[..., 3])).to(given[0].dtype)
        return _share(grad, here, whole), [target], moved


def _share(grad, here, whole):
    """A kernel divides by the numbers of its shard."""
    return grad * (here / whole.clamp(min=1))[:, 0].to(grad.dtype)


class Msqe(Rule):
    @staticmethod
    def states(loss, saved, seen, here):
        return [here, loss, saved[..., 0]]

    @staticmethod
    def fold(given, n, means, products):
        share = n / n.sum(0).clamp(min=1)
        return (share[..., 0] * means).sum(0), (share * products).sum(0)[..., None]

    @staticmethod
    def backward(grad, given, saved, here, whole):
        return _share(grad, here, whole), given, saved

    @staticmethod
    def learned(grad, given, saved, whole):
        return regularizers.msqe_learned(grad, saved)


class BinReg(Rule):
    """saved: how many weights are in each bin, and their mean squares."""

    @staticmethod
    def fold(given, table):
        counts, squares = table.chunk(2, -1)
        count = counts.sum(0)
        squares = (counts / torch.where(count == 0, 1, count) * squares).sum(0)
        return squares.sum((1, 2)), torch.cat([count, squares], -1)


class PartialL2(Rule):
    """The threshold is found digit by digit over all shards; what lies below it here is the local rank."""

    @staticmethod
    def seen(given, shards, here, whole):
        def count(prefix, place):
            return shards.call["digits_fwd"](shards.local, prefix, place)

        theta, local_rank = select(count, lambda table: shards.summed(table)[0].long(), *given, shards.weights[0].dtype)
        return [local_rank.clamp(min=1), theta, local_rank]

    @staticmethod
    def states(loss, saved, seen, here):
        _, theta, local_rank = seen
        counts = (local_rank > 0) | loss.isnan()  # of a NaN in any shard
        return [here, torch.where(counts, loss.double() * here[:, 0], 0), theta]

    @staticmethod
    def fold(given, n, sums, thetas):
        theta = thetas[0]
        mean = sums.sum(0) / n.sum(0)[:, 0].clamp(min=1)
        return torch.where(theta.isnan(), theta, mean), theta[:, None, None]

    @staticmethod
    def backward(grad, given, saved, here, whole):
        return _share(grad, here, whole), given, saved


RULES = {
    "l_inf": LInf,
    "margin": Margin,
    "soft_min_max": SoftMinMax,
    "soft_extrema": SoftExtrema,
    "kure": Kure,
    "msqe": Msqe,
    "bin_reg": BinReg,
    "partial_l2": PartialL2,
}


def forward(kernel, row, call):
    """A loss's forward on lists with DTensors."""
    rule, count = RULES.get(row.name), row.parameters

    def run(weights, *args):
        shards = Shards(weights, call)
        given, options = list(args[:count]), args[count:]
        here, whole = shards.rows(options[-2] if row.columns else 1)
        seen = rule.seen(given, shards, here, whole)
        loss, saved = kernel(shards.local, *seen[:count], *options)
        merged = shards.merged(
            rule.states(loss, saved, seen, here), lambda part, *tables: rule.fold([part.of(p) for p in given], *tables)
        )
        loss, saved = (m.to(saved.dtype) for m in merged)
        return (loss.movedim(1, 0).contiguous() if row.name == "soft_extrema" else loss), saved.contiguous()

    return run


def backward(kernel, row, call):
    """A loss's backward on lists with DTensors."""
    rule, count = RULES.get(row.name), row.parameters

    def run(grad, weights, *args, out=None, needed=None):
        shards = Shards(weights, call)
        given, saved, options = list(args[:count]), args[count], args[count + 1 :]
        here, whole = shards.rows(options[0] if row.columns else 1)
        grad_, given_, saved_ = rule.backward(grad, given, saved, here, whole)
        result = kernel(grad_, shards.local, *given_, saved_, *options, **_targets(out, needed))
        gradients = shards.like(result[0] if row.learned else result)
        return (gradients, rule.learned(grad, given, saved, whole)) if row.learned else gradients

    return run


def _targets(out, needed):
    options = {} if needed is None else {"needed": needed}
    return options if out is None else {**options, "out": [local(o) for o in out]}


def terms_forward(kernel, row, call):
    """Several losses of lists with DTensors, merged from one message."""

    def run(weights, names, parameters, bits, flags):
        shards = Shards(weights, call)
        here, whole = shards.rows()
        terms = [(RULES[name], given) for name, given, _, _ in split_terms(names, parameters, bits, flags)]
        seen = [rule.seen(given, shards, here, whole) for rule, given in terms]
        local_parameters = [p for (_, given), some in zip(terms, seen, strict=True) for p in some[: len(given)]]
        losses_, saved = kernel(shards.local, names, local_parameters, bits, flags)
        states = [
            rule.states(*results, some, here)
            for (rule, _), some, *results in zip(terms, seen, losses_, saved, strict=True)
        ]

        def fold(part, *tables):
            tables, merged = iter(tables), []
            for (rule, given), some in zip(terms, states, strict=True):
                merged += rule.fold([part.of(p) for p in given], *[next(tables) for _ in some])
            return tuple(merged)

        merged = shards.merged([s for some in states for s in some], fold)
        merged = [m.to(losses_[0].dtype).contiguous() for m in merged]
        return merged[::2], merged[1::2]

    return run


def terms_backward(kernel, row, call):
    """The gradients of several losses of lists with DTensors."""

    def run(grads, weights, names, parameters, bits, flags, saved, out=None, needed=None):
        shards = Shards(weights, call)
        here, whole = shards.rows()
        grads_, parameters_, saved_, learned = [], [], [], []
        for grad, kept, (name, given, _, _) in zip(
            grads, saved, split_terms(names, parameters, bits, flags), strict=True
        ):
            rule = RULES[name]
            grad_, given_, kept_ = rule.backward(grad, given, kept, here, whole)
            grads_.append(grad_)
            parameters_ += given_
            saved_.append(kept_)
            own = rule.learned(grad, given, kept, whole)
            learned += [] if own is None else [own]
        made, _ = kernel(grads_, shards.local, names, parameters_, bits, flags, saved_, **_targets(out, needed))
        return shards.like(made), learned

    return run


def statistics(kernel, row, call):
    """`weight_stats_fwd` of lists with DTensors."""

    def run(weights):
        shards = Shards(weights, call)
        table = kernel(shards.local)
        return merged_statistics(shards, shards.rows()[0], table).to(table.dtype)

    return run


def merged_statistics(shards, counts, table):
    """The table of statistics of the whole weights, float64, from that of the shards, of so many numbers each (L,
    1)."""

    def fold(part, n, table):
        low, high, mean, std, kurtosis, top, skew = table.unbind(-1)
        low, high = low.amin(0), high.amax(0)
        mean, std, skew, kurtosis = moments(n[..., 0], mean, std, skew, kurtosis, low == high)
        return (torch.stack([low, high, mean, std, kurtosis, top.amax(0), skew], -1),)

    return shards.merged([counts, table], fold)[0]
