"""Numbers of every scale: to the bit where only powers of two are between them; DoReFa, whose tanh has a scale, by the
budget."""

import budget
import pytest
import torch
from quantizers import calls

pytestmark = pytest.mark.usefixtures("nan_filled", "one_thread")

SHAPES = [(37, 61), (5,), (1,), (4097,)]
POWERS = [-100, -61, 100]


def numbers(dtype, device):
    return [calls.numbers(shape, dtype, device, i) for i, shape in enumerate(SHAPES)]


def scaled(one, c):
    """The same call of numbers c times as large: `delta` of ewgs has no scale."""
    lengths = one.parameters[: 2 if one.op == "ewgs" else 1]
    return one._replace(
        xs=[x * c for x in one.xs], parameters=[p * c for p in lengths] + one.parameters[len(lengths) :]
    )


def same(found, expected, times):
    return all(torch.equal(a, b * times) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("op", ["lsq", "ewgs", "pact"])
def test_exact_powers_of_two(op, bits, dtype, flag, device, variant):
    one = calls.call(op, numbers(dtype, device), bits, flag)
    y, (dx, own) = one.forward(), one.backward()
    for c in (2.0**power for power in POWERS):
        other = scaled(one, c)
        levels, slopes = (1.0, 1 / c) if op == "ewgs" else (c, 1.0)  # codes between bounds, or multiples of a step
        assert same(other.forward(), y, levels), c
        found, of_parameters = other.backward()
        assert same(found, dx, slopes) and same(of_parameters, own, slopes), c


@pytest.mark.parametrize("kind", ["lsq", "ternary", "seq"])
def test_a_step_for_each_channel(kind, device, variant):
    xs = [calls.numbers((12, 40), torch.float32, device), calls.numbers((5, 7, 3), torch.float32, device)]
    one = calls.call("lsq", xs, 2, True, axis=0, kind=kind)
    y, (dx, own) = one.forward(), one.backward()
    for c in (2.0**power for power in POWERS):
        other = scaled(one, c)
        found, of_parameters = other.backward()
        assert same(other.forward(), y, c) and same(found, dx, 1.0) and same(of_parameters, own, 1.0), c


@pytest.mark.parametrize("detach_max", [True, False])
@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_dorefa(scale, bits, detach_max, device, variants):
    """Beyond 10 all tanh are 1, and below 1e-3 they are the weights."""
    draws = []
    for seed in range(17):
        xs = [calls.numbers((n,), torch.float64, "cpu", 10 * seed + n) * scale for n in (5, 60, 4097)]
        one = calls.call("dorefa", [x.to(device, torch.float32) for x in xs], bits, detach_max, seed=seed)
        draws.append(one._replace(gs=[g * min(scale, 1) for g in one.gs]))  # of which gradients are about g / scale
    budget.hold(draws, variants, calls.gradients, calls.truth)
    for v in variants:
        with v.chosen():
            for one in draws:
                for y, expected in zip(one.forward(), calls.expected(one)[0], strict=True):
                    assert ((y - expected).abs() <= 2.0 / (2**bits - 1) + 1e-6 * y.abs()).all(), v
                    assert (y != expected).float().mean() < 1e-3 or y.numel() < 10, v
