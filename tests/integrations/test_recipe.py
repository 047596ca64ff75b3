"""A loop of one's own with a GradScaler, clipping and accumulation."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from r2kernels import Palettizer, RangeRegularizer

pytestmark = pytest.mark.usefixtures("one_thread")


def train(model, reg, palettizer, loader, loss, accumulation, device="cpu", scale=1024.0, norm=1.0, seen=None):
    """`seen`: is called before each step of the optimizer."""
    # the recipe
    optimizer = AdamW([{"params": model.parameters()}, *reg.param_groups()], lr=1e-2)
    optimizer.register_step_post_hook(lambda *args: palettizer.step())  # not after a step that the scaler skips
    scaler = torch.amp.GradScaler(device, init_scale=scale)
    for i, batch in enumerate(loader, 1):
        scaler.scale(loss(model, batch) / accumulation).backward()
        if i % accumulation == 0:
            scaler.unscale_(optimizer)
            reg.accumulate_grad_()  # once for each step, after unscaling and before clipping
            clip_grad_norm_(model.parameters(), norm)
            seen()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))


def batches():
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 8, generator=g), torch.randint(4, (8,), generator=g)) for _ in range(8)]


def loss(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return cross_entropy(model(batch[0]), batch[1])


def run(weight=1.0, **options):
    """(what is trained, the gradients at each step)"""
    model, steps = network(), []
    reg, palettizer = RangeRegularizer(model, weight=weight, alpha=8.0, alpha_unit="std"), Palettizer(model, 2)
    given = [*model.parameters(), reg.alpha]

    def seen():
        steps.append([p.grad.clone() for p in given])

    train(model, reg, palettizer, batches(), loss, 4, seen=seen, **options)
    return model, reg, palettizer, steps


def test_the_regularizer_counts_once():
    plain, found = [run(weight, norm=math.inf)[3][0] for weight in (0.0, 1.0)]
    alone = network()
    reg = RangeRegularizer(alone, weight=1.0, alpha=8.0, alpha_unit="std")
    reg.accumulate_grad_()
    for before, after, p in zip(plain, found, [*alone.parameters(), reg.alpha], strict=True):
        if p.grad is not None:
            times = ((after - before) * p.grad).sum() / (p.grad * p.grad).sum()
            assert times.item() == pytest.approx(1, abs=5e-5)


def test_clipping_sees_the_regularizer():
    for step in run(weight=10.0, norm=0.1)[3]:
        assert torch.nn.utils.get_total_norm(step[:-1]).item() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize(("scale", "steps"), ((1024.0, 2), (math.inf, 0)))
def test_it_trains(scale, steps):
    model, reg, palettizer, _ = run(scale=scale)
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), network().parameters(), strict=True)]
    assert palettizer.steps == steps
    assert {*changed, bool((reg.alpha != 8).all())} == {steps > 0}
