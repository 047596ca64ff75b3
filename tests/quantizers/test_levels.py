"""Ternary and half-integer levels of LSQ: values and gradients by hand, and what is not allowed."""

import math

import pytest
import torch
from torch.testing import assert_close

import r2kernels as r2
from r2kernels import reference


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("levels", "bits", "x", "expected"),
    [
        ("ternary", 2, [-9, -0.6, -0.5, 0.4, 0.6, 1.4, 9], [-1, -1, 0, 0, 1, 1, 1]),
        (
            "seq",
            2,
            [-9, -1.2, -0.9, -0.1, 0, 0.1, 0.9, 1, 1.2, 9],
            [-1.5, -1.5, -0.5, -0.5, 0.5, 0.5, 0.5, 0.5, 1.5, 1.5],
        ),
        ("seq", 3, [-9, -2.1, 2, 3.2], [-3.5, -2.5, 2.5, 3.5]),
        ("seq", 1, [-3, -0.1, 0, 0.1, 3], [-1, -1, 1, 1, 1]),
    ],
)
def test_levels_by_hand(levels, bits, x, expected):
    for layer in (r2, reference):
        assert layer.lsq(2 * double(*x), 2.0, bits, levels=levels).tolist() == [2.0 * e for e in expected]


@pytest.mark.parametrize(
    ("levels", "y", "gradient", "of_step", "top"),
    [
        ("ternary", [-1, -1, 1, 1, 1, 1], [0, 0, 4, 0, 0, 0], -1 - 2 + 0.25 * 4 + 8 + 16 + 32, 1),
        (
            "seq",
            [-1.5, -1.5, 0.5, 1.5, 1.5, 1.5],
            [0, 2, 4, 8, 0, 0],
            -1.5 - 0.25 * 2 - 0.25 * 4 + 0.25 * 8 + 1.5 * 48,
            1.5,
        ),
    ],
)
def test_gradients_of_levels_by_hand(levels, y, gradient, of_step, top):
    for layer in (r2, reference):
        x = double(-9, -1.25, 0.75, 1.25, 3.25, 9).requires_grad_()
        s = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        found = layer.lsq(x, s, 2, levels=levels)
        assert found.tolist() == y
        found.backward(double(1, 2, 4, 8, 16, 32))
        assert x.grad.tolist() == gradient
        assert s.grad.item() == pytest.approx(of_step / math.sqrt(6 * top))


def test_levels_of_stretched_elastic_quantization():
    """As ParetoQ writes them, by the range alpha: alpha (round(clip(w / alpha, -0.99, 0.99) k / 2 - s) + s) 2 / k."""
    w, alpha = torch.randn(2000, dtype=torch.float64), 1.7
    for levels, k, shift in (("ternary", 3, 0.0), ("seq", 4, 0.5)):
        expected = alpha * ((w / alpha).clamp(-0.99, 0.99).mul(k / 2).sub(shift).round() + shift) * 2 / k
        assert_close(r2.lsq(w, 2 * alpha / k, 2, levels=levels), expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda r2, x: r2.lsq(x, 0.1, 2, levels="lsb"),
            ValueError,
            r"levels must be one of \('lsq', 'ternary', 'seq'\)",
        ),
        (lambda r2, x: r2.lsq(x, 0.1, 3, levels="ternary"), ValueError, r"levels=\"ternary\" .* take 2 bits; got 3"),
        (lambda r2, x: r2.lsq(x, 0.1, 2, signed=False, levels="seq"), ValueError, r"levels='seq' .* needs signed=True"),
    ],
)
def test_errors(call, error, message):
    for layer in (r2, reference):
        with pytest.raises(error, match=message):
            call(layer, torch.randn(4, 5))
