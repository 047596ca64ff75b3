"""Bits where they matter: one way of clustering for each weight, under a budget of bytes."""

import math
from collections.abc import Mapping

import numpy as np
import torch

from ..reference import checks
from .clustering import ClusteringOptions, clustered_weight, few_rows, form_of, weighted_error, with_zeros_kept
from .importance import importances_of
from .layers import layers_of
from .sensitivity import sensitivity

TABLES = {"group_size": 16}, {"group_size": 4}, {"group_size": 1}, {"granularity": (None, 1)}
CHOICES = tuple(
    {"bits": bits, "lut_dtype": "fp16", **tables}
    for bits, some in ((1, TABLES), (2, TABLES), (3, TABLES), (4, TABLES), (6, TABLES[:1]), (8, ()))
    for tables in ({"group_size": None}, *some)
)
CELLS = 2**16  # of the budget: what costs are rounded up to


def choose(options, budget):
    """For each list of (bytes, error) the number of one, with the least sum of errors whose bytes are within the
    budget; None where not even the fewest bytes are.

    Multiple-choice knapsack by dynamic programming over the budget in equal cells. What each choice costs beyond the
    cheapest is rounded up to cells, whose size the budget does not change: more budget has never more error.
    """
    least = [min(size for size, _ in some) for some in options]
    unit = max(math.ceil(sum(max(size for size, _ in some) for some in options) / CELLS), 1)
    room = (budget - sum(least)) // unit
    if room < 0:
        return None
    room = min(room, sum(-(-max(size for size, _ in some) // unit) for some in options))
    best, taken = np.zeros(room + 1), []  # of the options so far: the least error within so many cells
    for some, base in zip(options, least, strict=True):
        totals = np.full((len(some), room + 1), np.inf)
        for i, (size, error) in enumerate(some):
            cost = -(-(size - base) // unit)
            if cost <= room:
                totals[i, cost:] = best[: room + 1 - cost] + error
        taken.append(totals.argmin(0).astype(np.int32))
        best = totals.min(0)
    chosen = []
    for some, base, choice in zip(reversed(options), reversed(least), reversed(taken), strict=True):
        i = int(choice[room])
        chosen.append(i)
        room -= -(-(some[i][0] - base) // unit)
    return chosen[::-1]


class Budget:
    """What each way to cluster each weight costs, and which way each is given."""

    def __init__(self):
        self._weights = []  # (numbers, [(bytes, error)], sum_i h_i w_i^2 or None)

    @torch.no_grad()
    def add(self, w, ways, weight=None):
        """Clusters a weight by k-means in each of the ways, (`Form`, preserve_zeros); False where it is not finite.

        The error is sum_i h_i (w_i - w_hat_i)^2 with importances h, by default 1 / sum_i w_i^2.
        """
        energy = w.double().square().mul_(1 if weight is None else weight).sum().item()
        found = []
        for form, preserve_zeros in ways if math.isfinite(energy) else ():
            _, clustered = clustered_weight(w, form, preserve_zeros, weight)
            error = weighted_error(w, clustered, weight)
            if weight is None:
                error = error / energy if energy else 0.0
            found.append((clustered.size().packed, error))
        if found:
            self._weights.append((w.numel(), found, None if weight is None else energy))
        return bool(found)

    def spend(self, bits):
        """The number of the way of each weight, for so many bits per number. ValueError where nothing fits.

        Relative errors are in units of the mean of sum_i h_i w_i^2 over the weights with importances.
        """
        total = sum(numbers for numbers, _, _ in self._weights)
        known = [energy for _, _, energy in self._weights if energy is not None]
        unit = sum(known) / len(known) if known else 1.0
        options = [
            [(size, error * (unit if energy is None else 1)) for size, error in found]
            for _, found, energy in self._weights
        ]
        chosen = choose(options, int(bits * total / 8))
        if chosen is None:
            least = 8 * sum(min(size for size, _ in some) for some in options) / total
            raise ValueError(f"budget must be at least {least:.4g} bits per weight here, got {bits:g}")
        return chosen


@torch.no_grad()
def allocate(
    model,
    budget,
    *,
    loader=None,
    loss=None,
    weight=None,
    batches=None,
    forward=None,
    choices=None,
    include=None,
    exclude=None,
):
    """`overrides` for `Palettizer` that spend `budget` bits per weight where they lower the error most.

        importance = sensitivity(model, loader)
        overrides = allocate(model, 3.25, weight=importance)
        palettizer = Palettizer(model, bits=4, overrides=overrides, weight=importance)

    Every weight is clustered in every way of `choices`, by k-means weighted with its importances h. Of each one is
    taken, such that the sum over all layers of sum_i h_i (w_i - w_hat_i)^2 is the least whose bytes, of codes, tables
    and scales, are within the budget: an exact knapsack, but that bytes are counted in 65,536ths of the largest choice.
    With h = F, the Fisher diagonal, half that sum is how much the loss is predicted to rise, as in HAWQ-V2 (Dong et al.
    2020) and SqueezeLLM. Without importances each layer counts by its relative error ||w - w_hat||^2 / ||w||^2, however
    many weights it has.

    budget: bits per weight over all weights that are clustered, a number > 0. A list of them gives a list of overrides,
        and clusters once.
    weight: importances by name, as `sensitivity` gives; or loader, loss, batches and forward, which are passed to it. A
        weight without an entry, or with zeros alone, counts by its relative error times the mean of sum_i h_i w_i^2
        over the others.
    choices: dicts of options of `Palettizer`; by default 1, 2, 3, 4, 6 and 8 bits with one table of float16, to 6 bits
        also one for each 16 output channels, to 4 bits for each 4, each one, and each column of the weight as a matrix.
    include, exclude: as for the `Palettizer` that shall have these overrides.

    The same overrides in every run. Weights that have fewer rows than any choice has centroids are left out. ValueError
    where nothing fits the budget.
    """
    budgets = budget if isinstance(budget, (list, tuple)) else [budget]
    for bits in budgets:
        checks.number("budget", bits, "a finite number > 0", lambda v: 0 < v < math.inf)
    choices = CHOICES if choices is None else _checked(choices)
    usual = ClusteringOptions(8)
    options = [usual._replace(**choice).checked("choices") for choice in choices]
    if weight is not None and loader is not None:
        raise ValueError("weight and loader both give importances; pass one of them")
    if weight is None and loader is None and loss is not None:
        raise ValueError("loss needs a loader")
    layers = layers_of(model, usual, None, include, exclude, embeddings=True)
    if loader is not None:
        limits = {"batches": batches, "forward": forward, "include": include, "exclude": exclude}
        weight = sensitivity(model, loader, loss=loss, **limits)
    importance = importances_of({layer.name: layer.weight().shape for layer in layers}, weight)
    spending, given = Budget(), {}
    for layer in layers:
        whole, h = layer.gathered(), importance.get(layer.name)
        w, ways = whole.weight(), {}
        for choice, o in zip(choices, options, strict=True):
            one = with_zeros_kept(whole._replace(options=o))
            if few_rows(w.shape, form_of(one)) is None:
                ways[form_of(one), one.options.preserve_zeros] = choice
        if ways and not spending.add(w, ways, None if h is None else h.to(w.device)):
            raise ValueError(f"{layer.name} has a NaN or an infinity; only finite weights can be clustered")
        if ways:
            given[layer.name] = list(ways.values())
    if not given:
        raise ValueError(f"{type(model).__name__} has no weight with enough rows for any of the choices")
    found = [
        {name: dict(ways[i]) for (name, ways), i in zip(given.items(), spending.spend(bits), strict=True)}
        for bits in budgets
    ]
    return found if budgets is budget else found[0]


def _checked(choices):
    known = ClusteringOptions._fields
    if not isinstance(choices, (list, tuple)) or not choices or not all(isinstance(c, Mapping) for c in choices):
        raise TypeError(f"choices must be a list of dicts of options of Palettizer, got {choices!r}")
    for choice in choices:
        if "bits" not in choice or not set(choice) <= set(known):
            raise ValueError(f"choices must have bits and other options of {known}, got {choice!r}")
    return choices
