"""A loop with accelerate and modules that train beside its model."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from r2kernels import Palettizer, Quantizer, RangeRegularizer
from r2kernels.integrations import attach

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def a_fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))


def loader(batch=8):
    g = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(64, 8, generator=g), torch.randint(4, (64,), generator=g)), batch)


class Loop:
    """What a user writes; `make(model)` gives what is attached. `steps`: for each step of the optimizer the gradients
    that it is given, by name."""

    def __init__(self, make=None, accumulation=1, scale=None, prepared_first=False, fused=False, schedule=None):
        self.model, self.steps = network(), []
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        if scale is not None:  # what fp16 on a GPU sets up
            self.accelerator.state._mixed_precision, self.accelerator.native_amp = "fp16", True
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=fused)
        if prepared_first:
            optimizer = self.accelerator.prepare(optimizer)
        if schedule == "before":
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        if make is not None:
            self.r2 = attach(self.accelerator, *make(self.model), optimizer=optimizer)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        real = getattr(optimizer, "optimizer", optimizer)
        real.register_step_pre_hook(lambda *args: self.steps.append(self.gradients()))
        prepared = self.accelerator.prepare(self.model, optimizer, loader(), self.scheduler)
        self.model, self.optimizer, self.loader, self.scheduler = prepared

    def gradients(self):
        model = self.accelerator.unwrap_model(self.model)
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def run(self, norm=None, epochs=1):
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(cross_entropy(self.model(x).float(), y))
                    if norm is not None and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), norm)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
        return self

    def state(self):
        model = self.accelerator.unwrap_model(self.model)
        return {name: value.clone() for name, value in {**model.state_dict(), **self.r2.state_dict()}.items()}


def fixed(model, weight=1.0):
    return [RangeRegularizer(model, weight=weight, alpha=8.0, alpha_unit="std", learn=False)]


def palettized(model):
    return [RangeRegularizer(model), Palettizer(model, 2)]


def quantized(model):
    return [RangeRegularizer(model, "margin"), Quantizer(model, "lsq", 4, 4)]


@pytest.mark.parametrize("scale", (None, 1024.0), ids=("fp32", "fp16"))
@pytest.mark.parametrize("norm", (None, 1e6), ids=("unclipped", "clipped"))
@pytest.mark.parametrize("prepared_first", (False, True))
@pytest.mark.parametrize("accumulation", (1, 4, 3))
def test_the_regularizer_counts_once(accumulation, prepared_first, norm, scale):
    plain = Loop(None, accumulation, scale, prepared_first).run(norm)
    AcceleratorState._reset_state(reset_partial_state=True)
    loop = Loop(fixed, accumulation, scale, prepared_first).run(norm)
    alone = network()
    fixed(alone)[0].accumulate_grad_()
    assert len(loop.steps) == len(plain.steps) == math.ceil(8 / accumulation)
    for name in ("0.weight", "2.weight"):
        true = alone.get_parameter(name).grad
        times = ((loop.steps[0][name] - plain.steps[0][name]) * true).sum() / (true * true).sum()
        assert times.item() == pytest.approx(1, abs=5e-5)


@pytest.mark.parametrize("norm", (None, 1e6), ids=("unclipped", "clipped"))
def test_a_fused_optimizer_unscales_by_itself(norm):
    loops = []
    for fused in (False, True):
        loops.append(Loop(fixed, scale=1024.0, fused=fused).run(norm))
        AcceleratorState._reset_state(reset_partial_state=True)
    plain, fused = [loop.state() for loop in loops]
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-3, atol=1e-4)


def test_clipping_sees_the_regularizer():
    loop = Loop(lambda model: fixed(model, 10.0), 2).run(0.1)
    for step in loop.steps:
        assert torch.nn.utils.get_total_norm(step.values()).item() == pytest.approx(0.1, rel=1e-4)


def test_clipping_something_else_waits():
    """In two parts, of which one has none of the weights, and by value."""
    loop = Loop(lambda model: fixed(model, 10.0))
    first, last = [p for p in loop.model.parameters() if p.dim() == 1], [*loop.model.parameters()]
    for x, y in loop.loader:
        loop.accelerator.backward(cross_entropy(loop.model(x), y))
        loop.accelerator.clip_grad_norm_(first, 0.1)
        before = loop.model[0].weight.grad.clone()
        loop.accelerator.clip_grad_norm_(last, math.inf)
        added = loop.model[0].weight.grad.clone()
        loop.accelerator.clip_grad_value_(last, math.inf)
        assert not torch.equal(before, added) and torch.equal(loop.model[0].weight.grad, added)
        loop.optimizer.step()
        assert torch.equal(loop.steps[-1]["0.weight"], added)
        loop.optimizer.zero_grad()
    assert len(loop.steps) == 8


@pytest.mark.parametrize("attached", (palettized, quantized))
def test_all_that_is_learned_is_trained(attached):
    loop = Loop(attached).run()
    own, groups = list(loop.r2.parameters()), loop.optimizer.param_groups
    assert own and all(loop.optimizer.state[p]["exp_avg_sq"].abs().sum() > 0 for p in own)
    assert [g["weight_decay"] for g in groups] == [0.01] + [0.0] * (len(groups) - 1)
    assert len({g["lr"] for g in groups}) == 1
    assert {"r2_range", "r2_loss"} <= {*loop.r2.report()}


@pytest.mark.parametrize(("scale", "steps"), ((1024.0, 4), (math.inf, 0)))
def test_skipped_steps_are_no_steps(scale, steps):
    loop = Loop(palettized, 2, scale).run(1.0)
    assert loop.r2[1].steps == steps


@pytest.mark.parametrize("attached", (palettized, quantized))
def test_resume_is_bitwise(tmp_path, attached):
    whole = Loop(attached, 2).run(1.0)
    whole.accelerator.save_state(tmp_path)
    whole.run(1.0)
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed = Loop(attached, 2)
    resumed.accelerator.load_state(tmp_path)
    resumed.run(1.0)
    found, wanted = resumed.state(), whole.state()
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_what_is_refused():
    with pytest.raises(ValueError, match="has a learning-rate scheduler already"):
        Loop(palettized, schedule="before")
    with pytest.raises(TypeError, match="got Linear"):
        Loop(lambda model: [model[0]])
    model = network()
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="DEEPSPEED keeps gradients to itself"):
        attach(accelerator, RangeRegularizer(model), optimizer=torch.optim.SGD(model.parameters()))
