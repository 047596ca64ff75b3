"""What `allocate` spends: within the budget, exactly where it lowers the error most, and more never worse."""

import itertools

import pytest
import torch
from nn.test_sensitivity import data, entropy, network
from torch import nn

from r2kernels import Palettizer, allocate, sensitivity
from r2kernels.files.clustered import Form
from r2kernels.nn.allocation import Budget, choose


def draws(count):
    generator = torch.Generator().manual_seed(count)
    for _ in range(count):
        yield [
            [
                (int(torch.randint(1, 40, (), generator=generator)), float(torch.rand((), generator=generator)))
                for _ in range(4)
            ]
            for _ in range(3)
        ]


def test_choose_is_the_best_of_all():
    for options in draws(20):
        for budget in (10, 25, 40, 60, 200):
            sums = [tuple(map(sum, zip(*some, strict=True))) for some in itertools.product(*options)]
            least = min((error for size, error in sums if size <= budget), default=None)
            chosen = choose(options, budget)
            if least is None:
                assert chosen is None
                continue
            taken = [some[i] for some, i in zip(options, chosen, strict=True)]
            size, error = (sum(part) for part in zip(*taken, strict=True))
            assert size <= budget and error == pytest.approx(least)


def test_choose_keeps_the_budget_where_bytes_are_counted_in_cells():
    options = [[(3_000_001 * bits + i, 4.0**-bits) for bits in range(1, 9)] for i in range(50)]
    errors = []
    for budget in range(150_000_000, 1_300_000_000, 50_000_000):
        chosen = choose(options, budget)
        if chosen is not None:
            assert sum(some[i][0] for some, i in zip(options, chosen, strict=True)) <= budget
            errors.append(sum(some[i][1] for some, i in zip(options, chosen, strict=True)))
    assert errors == sorted(errors, reverse=True) and errors[-1] == 50 * 4.0**-8


def predicted(model, importance, overrides):
    """(bits per weight, sum_i h_i (w_i - w_hat_i)^2) as a Palettizer has it."""
    palettizer = Palettizer(model, 8, overrides=overrides, weight=importance)
    found = palettizer.clustered()
    palettizer.remove(bake=False)
    error = sum(
        (importance[name] * (c.decoded() - model.get_parameter(name)).double().square()).sum().item()
        for name, c in found.items()
    )
    numbers = sum(model.get_parameter(name).numel() for name in found)
    return 8 * sum(c.size().packed for c in found.values()) / numbers, error


CHOICES = [{"bits": bits, "group_size": size, "lut_dtype": "fp16"} for bits in (1, 2, 3, 4) for size in (None, 4)]


def test_allocation_meets_the_budget_is_better_with_more_and_beats_uniform_bits():
    model = network()
    importance = sensitivity(model, data(), loss=entropy)
    errors = []
    budgets = [1.6, 2.4, 3.3, 4.5]
    for budget, overrides in zip(budgets, allocate(model, budgets, weight=importance, choices=CHOICES), strict=True):
        bits, error = predicted(model, importance, overrides)
        assert bits <= budget
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    for choice in CHOICES:
        uniform = dict.fromkeys(overrides, choice)
        bits, error = predicted(model, importance, uniform)
        assert predicted(model, importance, allocate(model, bits, weight=importance, choices=CHOICES))[1] <= error * (
            1 + 1e-6
        )


def test_a_loader_is_a_sensitivity():
    model = network()
    (a,) = allocate(model, [3], loader=data(), loss=entropy, choices=CHOICES)
    assert a == allocate(model, 3, weight=sensitivity(model, data(), loss=entropy), choices=CHOICES)


def test_without_importances_relative_errors_count():
    """A layer a thousand times as large is worth no more bits."""
    torch.manual_seed(0)
    model, found = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)), []
    for scale in (1, 1024):
        with torch.no_grad():
            model[1].weight.mul_(scale)
        found.append(allocate(model, 3.3, choices=CHOICES))
    assert found[0] == found[1]


@pytest.mark.parametrize("bits", [1.7, 2.7])
def test_weights_without_importances_count_as_the_mean_of_others(bits):
    w, h = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).unbind()
    ways = [(Form(bits), False) for bits in (1, 2, 3)]
    found = []
    for scale in (1, 8):
        spending = Budget()
        spending.add(w, ways, h.square())
        spending.add(w.flip(0) * scale, ways)
        found.append(spending.spend(bits))
    assert found[0] == found[1]


def test_what_is_not_finite_has_no_costs():
    assert not Budget().add(torch.tensor([[1.0, torch.nan]]), [(Form(1), False)])


@pytest.mark.parametrize(
    ("error", "text", "options"),
    [
        (ValueError, "budget must be at least 1.* bits per weight", {"budget": 0.5}),
        (ValueError, "budget must be a finite number > 0", {"budget": -1}),
        (ValueError, "budget must be a finite number > 0", {"budget": [3, 0]}),
        (TypeError, "choices must be a list of dicts", {"choices": 3}),
        (ValueError, "choices must have bits", {"choices": [{"group_size": 4}]}),
        (ValueError, "bits of choices must be an int in 1..8", {"choices": [{"bits": 9}]}),
        (ValueError, "weight and loader both give", {"weight": {}, "loader": []}),
        (ValueError, "loss needs a loader", {"loss": entropy}),
    ],
)
def test_errors_name_what_is_wrong(error, text, options):
    with pytest.raises(error, match=text):
        allocate(network(), **{"budget": 3, **options})


def test_a_weight_that_is_not_finite_is_named():
    model = network()
    model[5].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"5\.weight has a NaN or an infinity"):
        allocate(model, 3, choices=CHOICES)
