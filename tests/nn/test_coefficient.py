"""LearnableCoefficient: its value, its gradients, where it goes, and what it refuses."""

import math

import pytest
import torch

from r2kernels import LearnableCoefficient


def test_learnable_coefficient():
    """omega moves to log(strength / R)."""
    coefficient = LearnableCoefficient(0.5, init=1.0)
    R = torch.tensor(2.0, requires_grad=True)
    loss = coefficient(R)
    loss.backward()
    e = math.exp(1.0)
    assert (
        loss.item() == pytest.approx(e * 2 - 0.5)
        and R.grad.item() == pytest.approx(e)
        and coefficient.omega.grad.item() == pytest.approx(2 * e - 0.5)
    )
    optimizer = torch.optim.SGD(coefficient.param_groups(lr=0.5))
    for _ in range(200):
        optimizer.zero_grad()
        coefficient(R.detach()).backward()
        optimizer.step()
    assert (
        coefficient.omega.item() == pytest.approx(math.log(0.25), abs=1e-4)
        and optimizer.param_groups[0]["weight_decay"] == 0
    )
    for bad in (0, -1.0, math.inf):
        with pytest.raises(ValueError, match="strength must be a finite number > 0"):
            LearnableCoefficient(bad)
    with pytest.raises(TypeError, match="init must be a number"):
        LearnableCoefficient(1.0, init="0")
