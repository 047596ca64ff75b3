"""Hugging Face's Trainer with modules that train beside its model."""

import pytest
import torch
from integrations.transformer import Gradients, bert, gpt2, trainer
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import BertForSequenceClassification, Trainer

from r2kernels import Palettizer, Quantizer, RangeRegularizer
from r2kernels.integrations import hf

pytestmark = pytest.mark.usefixtures("one_thread")
R2Trainer = hf(Trainer)


def regularizer(model, weight=1.0):
    return RangeRegularizer(model, weight=weight, alpha=8.0, alpha_unit="std", learn=False)


def gradients(folder, kind=Trainer, model=None, more=None, scale=None, **options):
    """Of the first step."""
    seen, model = Gradients(), gpt2() if model is None else model
    made = trainer(model, folder, kind, [seen], more=more, max_steps=1, **options)
    if scale is not None:
        as_fp16(made, scale)
    made.train()
    return seen.steps[0]


def as_fp16(made, scale):
    """What accelerate sets up on a GPU for fp16."""
    accelerator = made.accelerator
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)


@pytest.fixture
def precision_is_restored():
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("precision_is_restored")
@pytest.mark.parametrize("scale", (None, 1024.0), ids=("fp32", "fp16"))
@pytest.mark.parametrize("accumulation", (1, 4))
@pytest.mark.parametrize("max_norm", (0.0, 1e6))
def test_the_regularizer_counts_once(tmp_path, accumulation, max_norm, scale):
    options = dict(gradient_accumulation_steps=accumulation, per_device_train_batch_size=8 // accumulation)
    options |= dict(max_grad_norm=max_norm, scale=scale, optim="adamw_torch")  # a fused one unscales by itself
    plain = gradients(tmp_path, **options)
    model = gpt2()
    found = gradients(tmp_path, R2Trainer, model, {"r2": regularizer(model)}, **options)
    alone = gpt2()
    regularizer(alone).accumulate_grad_()
    true = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    for name, g in true.items():
        times = ((found[name] - plain[name]) * g).sum() / (g * g).sum()
        assert times.item() == pytest.approx(1, abs=5e-5)
    assert len(true) == 9


def test_clipping_sees_the_regularizer(tmp_path):
    model = gpt2()
    found = gradients(tmp_path, R2Trainer, model, {"r2": regularizer(model, 10.0)}, max_grad_norm=0.1)
    assert_close(torch.nn.utils.get_total_norm(found.values()).item(), 0.1, rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore:80 %")
def test_all_that_is_learned_is_trained(tmp_path):
    model = bert()
    quantizer, reg = Quantizer(model, "lsq", 4, 4), RangeRegularizer(model)
    made = trainer(model, tmp_path, R2Trainer, more={"r2": [quantizer, reg]}, weight_decay=0.1, warmup_steps=2)
    named = [*quantizer.named_parameters(), *reg.named_parameters()]
    made.train()
    state = made.optimizer.state
    assert len(named) == 29
    assert all(state[p]["step"] == 6 and state[p]["exp_avg_sq"].abs().sum() > 0 for _, p in named)
    own = {id(p) for _, p in named}
    groups = [g for g in made.optimizer.param_groups if own & {id(p) for p in g["params"]}]
    assert sum(len(g["params"]) for g in groups) == 29
    assert {g["weight_decay"] for g in groups} == {0.0}
    assert len({g["lr"] for g in made.optimizer.param_groups}) == 1  # the scheduler's


@pytest.mark.filterwarnings("ignore:80 %")
def test_a_part_of_the_model_is_without_weight_decay(tmp_path):
    model = bert()
    model.quantizer = Quantizer(model, "lsq", 4)
    made = trainer(model, tmp_path, R2Trainer, more={"r2": model.quantizer}, weight_decay=0.1)
    made.create_optimizer_and_scheduler(6)
    own = {id(p) for p in model.quantizer.parameters()}
    found = [(id(p), g["weight_decay"]) for g in made.optimizer.param_groups for p in g["params"] if id(p) in own]
    assert sorted(found) == sorted((i, 0.0) for i in own)


def palettized(model):
    return [RangeRegularizer(model), Palettizer(model, 2)]


def quantized(model):
    return [RangeRegularizer(model, "margin"), Quantizer(model, "lsq", 4, 4)]


def final(made):
    """All that a training leaves."""
    state = {**made.model.state_dict(), **made.r2.state_dict()}
    return {name: value.clone() for name, value in state.items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("attach", (palettized, quantized))
def test_resume_is_bitwise(tmp_path, attach):
    options = dict(gradient_accumulation_steps=2, per_device_train_batch_size=4, save_strategy="steps", save_steps=3)

    def made():
        model = gpt2(dropout=0.1)
        return trainer(model, tmp_path, R2Trainer, more={"r2": attach(model)}, **options)

    whole = made()
    before = final(whole)
    whole.train()
    resumed = made()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(final(resumed), final(whole))
    assert all(not torch.equal(before[name], value) for name, value in final(whole).items() if "centroids" in name)


def test_the_best_model_has_its_state(tmp_path):
    model = bert()
    options = dict(eval_strategy="steps", save_strategy="steps", eval_steps=2, save_steps=2, learning_rate=1e-2)
    best = dict(load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True)
    made = trainer(model, tmp_path, R2Trainer, more={"r2": palettized(model)}, **options, **best)
    made.train()
    assert made.state.best_model_checkpoint != str(tmp_path / "checkpoint-6")
    stored = load_file(f"{made.state.best_model_checkpoint}/r2kernels.safetensors")
    assert_same(made.r2.state_dict(), stored)
    last = load_file(tmp_path / "checkpoint-6" / "r2kernels.safetensors")
    assert any(not torch.equal(last[name], value) for name, value in stored.items())
    found = made.evaluate()["eval_loss"]
    assert found == made.state.best_metric


def test_logs_and_evaluation_change_nothing(tmp_path):
    finals = []
    for evaluations in ({}, {"eval_strategy": "steps", "eval_steps": 2}):
        model = gpt2()
        made = trainer(model, tmp_path, R2Trainer, more={"r2": palettized(model)}, **evaluations)
        made.train()
        finals.append(final(made))
    assert_same(*finals)
    steps = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(steps) == 6 and all({"r2_range", "r2_loss", "r2_gap"} <= {*entry} for entry in steps)
    reg, palettizer = made.r2
    assert 0 < steps[-1]["r2_gap"] == pytest.approx(sum(palettizer.gap().values()) / len(palettizer.layers))
    ranges = [(w.max() - w.min()).item() for w in made.r2.weights()]
    assert steps[-1]["r2_range"] == pytest.approx(sum(ranges) / len(ranges))
    assert steps[-1]["r2_loss"] == pytest.approx(reg().item(), rel=0.05)
    evaluated = [entry for entry in made.state.log_history if "eval_loss" in entry]
    model.eval()
    assert len(evaluated) == 3 and evaluated[-1]["eval_loss"] == pytest.approx(made.evaluate()["eval_loss"])
    palettizer.remove()  # the same with baked hard weights
    assert evaluated[-1]["eval_loss"] == pytest.approx(Trainer.evaluate(made)["eval_loss"], rel=1e-5)


def test_save_model_keeps_a_dense_model(tmp_path):
    model = bert()
    made = trainer(model, tmp_path, R2Trainer, more={"r2": palettized(model)})
    made.train()
    made.save_model()
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    assert_same(loaded.state_dict(), model.state_dict())
    assert_same(load_file(tmp_path / "r2kernels.safetensors"), made.r2.state_dict())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`")
@pytest.mark.parametrize("attach", (palettized, quantized))
def test_gradient_checkpointing_changes_nothing(tmp_path, attach):
    finals = []
    for checkpointing in (False, True):
        model = gpt2()
        options = dict(gradient_checkpointing=checkpointing, gradient_accumulation_steps=2)
        made = trainer(model, tmp_path, R2Trainer, more={"r2": attach(model)}, **options)
        made.train()
        finals.append(final(made))
    assert_same(*finals)


@pytest.mark.usefixtures("precision_is_restored")
@pytest.mark.parametrize(("scale", "steps"), ((2.0**10, 2), (2.0**100, 0)))
def test_skipped_steps_are_no_steps(tmp_path, scale, steps):
    model = gpt2()
    made = trainer(model, tmp_path, R2Trainer, more={"r2": palettized(model)}, max_steps=2)
    as_fp16(made, scale)
    made.train()
    assert made.r2[1].steps == steps


def test_what_is_refused(tmp_path):
    model = gpt2()
    reg = RangeRegularizer(model)
    with pytest.raises(TypeError, match=r"r2 must be .* got Linear"):
        trainer(model, tmp_path, R2Trainer, more={"r2": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="another model than the trainer's GPT2LMHeadModel"):
        trainer(gpt2(), tmp_path, R2Trainer, more={"r2": reg}).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match="has a learning-rate scheduler already"):
        trainer(model, tmp_path, R2Trainer, optimizers=(optimizer, scheduler), more={"r2": reg}).train()
    trainer(model, tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    with pytest.raises(ValueError, match=r"checkpoint-1 has no r2kernels\.safetensors"):
        trainer(model, tmp_path, R2Trainer, more={"r2": reg}).train(resume_from_checkpoint=True)


def test_an_optimizer_of_ones_own(tmp_path):
    """With the groups and a scheduler already; a second `train` goes on with it."""
    model = gpt2()
    reg, palettizer = palettized(model)
    optimizer = torch.optim.SGD([{"params": model.parameters()}, *reg.param_groups()], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    made = trainer(model, tmp_path, R2Trainer, optimizers=(optimizer, scheduler), more={"r2": [reg, palettizer]})
    made.train()
    assert len(optimizer.param_groups) == 2 and palettizer.steps == 6
    made.train()
    assert len(optimizer.param_groups) == 2 and palettizer.steps == 12
