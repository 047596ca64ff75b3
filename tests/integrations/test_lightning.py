"""Lightning's Trainer with modules that train beside its model."""

import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from integrations.imports import without
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import get_ema_avg_fn, get_ema_multi_avg_fn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from r2kernels import Palettizer, Quantizer, RangeRegularizer
from r2kernels.integrations import LightningCallback

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*(num_workers|Checkpoint directory|log_every_n_steps)"),
]


class Classifier(pl.LightningModule):
    """`steps`: for each step of the optimizer the gradients that it is given, by name."""

    def __init__(self, fused=False, schedule=False, groups=()):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4))
        self.fused, self.schedule, self.groups, self.steps, self.seen = fused, schedule, list(groups), [], []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        torch.manual_seed(self.trainer.current_epoch * 100 + index)  # Lightning's checkpoints hold no random state
        x, y = batch
        return cross_entropy(self(x), y)

    def validation_step(self, batch, index):
        x, y = batch
        self.seen.append(self(x))
        self.log("val_loss", cross_entropy(self.seen[-1], y))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([{"params": self.parameters()}, *self.groups], lr=1e-2, fused=self.fused)
        if not self.schedule:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)]

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.steps.append({n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None})


def loader(batch=8):
    g = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(64, 8, generator=g), torch.randint(4, (64,), generator=g)), batch)


def fit(model, folder, *callbacks, ckpt=None, batch=8, checkpoints=(), **options):
    pl.seed_everything(1, verbose=False)
    usual = dict(max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    usual |= dict(default_root_dir=folder, enable_checkpointing=bool(checkpoints), num_sanity_val_steps=0)
    trainer = pl.Trainer(callbacks=[*callbacks, *checkpoints], **{**usual, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, loader(batch), loader(), ckpt_path=ckpt)
    return trainer


def regularizer(model, weight=1.0):
    return RangeRegularizer(model, weight=weight, alpha=8.0, alpha_unit="std", learn=False)


@pytest.mark.parametrize("precision", ("32-true", "bf16-mixed"))
@pytest.mark.parametrize("accumulation", (1, 4))
def test_the_regularizer_counts_once(tmp_path, accumulation, precision):
    options = dict(accumulate_grad_batches=accumulation, precision=precision, max_epochs=1)
    plain, model = Classifier(), Classifier()
    fit(plain, tmp_path, **options)
    fit(model, tmp_path, LightningCallback(regularizer(model)), **options)
    alone = Classifier()
    regularizer(alone).accumulate_grad_()
    assert len(model.steps) == 8 // accumulation
    for name in ("net.0.weight", "net.3.weight"):
        true = alone.get_parameter(name).grad
        times = ((model.steps[0][name] - plain.steps[0][name]) * true).sum() / (true * true).sum()
        assert times.item() == pytest.approx(1, abs=5e-5)


@pytest.mark.parametrize("fused", (False, True))
def test_a_scaler_unscales_the_regularizer_too(tmp_path, fused):
    """As precision="16-mixed" on a GPU, with the scaler of a CPU; a fused optimizer unscales by itself."""
    found = []
    for scale in (None, 1024.0):
        model = Classifier(fused=fused)
        trainer_precision = pl.plugins.MixedPrecision("bf16-mixed", "cpu")
        if scale is not None:
            trainer_precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        fit(model, tmp_path, LightningCallback(regularizer(model)), plugins=[trainer_precision], max_epochs=1)
        found.append(model)
    plain, scaled = found
    factor = 1024.0 if fused else 1.0
    for name, g in plain.steps[0].items():
        assert_close(scaled.steps[0][name], g * factor, rtol=0.05, atol=0.01 * factor * g.abs().max().item())
    assert_close(scaled.state_dict(), plain.state_dict(), rtol=0.1, atol=2e-2)


@pytest.mark.parametrize(("scale", "steps"), ((1024.0, 8), (math.inf, 0)))
def test_skipped_steps_are_no_steps(tmp_path, scale, steps):
    model = Classifier()
    palettizer = Palettizer(model, 2)
    precision = pl.plugins.MixedPrecision("bf16-mixed", "cpu")
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    fit(model, tmp_path, LightningCallback(palettizer), plugins=[precision], max_epochs=1)
    assert palettizer.steps == steps


def test_clipping_sees_the_regularizer(tmp_path):
    model = Classifier()
    fit(model, tmp_path, LightningCallback(regularizer(model, 10.0)), gradient_clip_val=0.1)
    for step in model.steps:
        assert torch.nn.utils.get_total_norm(step.values()).item() == pytest.approx(0.1, rel=1e-3)


def palettized(model):
    return [RangeRegularizer(model), Palettizer(model, 2)]


def quantized(model):
    return [RangeRegularizer(model, "margin"), Quantizer(model, "lsq", 4, 4)]


def test_all_that_is_learned_is_trained(tmp_path):
    model = Classifier()
    r2 = quantized(model)
    trainer = fit(model, tmp_path, LightningCallback(*r2))
    state, own = trainer.optimizers[0].state, [p for module in r2 for p in module.parameters()]
    assert len(own) == 5 and all(state[p]["exp_avg_sq"].abs().sum() > 0 for p in own)
    assert [g["weight_decay"] for g in trainer.optimizers[0].param_groups] == [0.01, 0.0, 0.0]


def test_a_scheduler_needs_the_groups_first(tmp_path):
    model = Classifier(schedule=True)
    r2 = quantized(model)
    with pytest.raises(ValueError, match="has a learning-rate scheduler already"):
        fit(model, tmp_path, LightningCallback(*r2))
    model.groups = [group for module in r2 for group in module.param_groups()]
    trainer = fit(model, tmp_path, LightningCallback(*r2))
    assert len({group["lr"] for group in trainer.optimizers[0].param_groups}) == 1


def everything(model, callback):
    return {**model.state_dict(), **callback.r2.state_dict()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def averaging():
    return WeightAveraging(avg_fn=get_ema_avg_fn(0.8))


@pytest.mark.parametrize("others", ((), (averaging,)), ids=("plain", "averaged"))
@pytest.mark.parametrize("attach", (palettized, quantized))
def test_resume_is_bitwise(tmp_path, attach, others):
    finals = []
    for ckpt in (None, str(tmp_path / "epoch=0.ckpt")):
        model = Classifier()
        callback = LightningCallback(*attach(model))
        saved = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        some = [callback, *[make() for make in others]]
        fit(model, tmp_path, *some, checkpoints=[saved], ckpt=ckpt, accumulate_grad_batches=2)
        finals.append(everything(model, callback))
    assert_same(*finals)


@pytest.mark.parametrize("first", (True, False), ids=("before", "after"))
@pytest.mark.parametrize("make", (averaging, WeightAveraging, lambda: multi()), ids=("ema", "swa", "multi"))
@pytest.mark.parametrize("attach", (palettized, quantized))
def test_averaged_weights_have_their_own(tmp_path, attach, make, first):
    """In validation, at the end and in checkpoints; the same average by hand of the states of all steps."""
    model = Classifier()
    callback, average = LightningCallback(*attach(model)), make()
    states = []

    class Recorder(pl.Callback):
        def on_train_batch_end(self, *args):
            states.append({n: v.clone() for n, v in everything(model, callback).items()})

    order = [callback, average] if first else [average, callback]
    saved = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(model, tmp_path, *order, Recorder(), checkpoints=[saved])
    wanted = states[0]
    for n, state in enumerate(states[1:], 1):
        decay = n / (n + 1) if make is WeightAveraging else 0.8
        wanted = {
            k: decay * v + (1 - decay) * state[k] if v.is_floating_point() else state[k] for k, v in wanted.items()
        }
    found = everything(model, callback)
    for name in [name for name in wanted if not name.startswith("0.")]:  # the regularizer's alpha or M goes on
        assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)

    model.eval()
    last = torch.cat([model(x) for x, _ in loader()])
    assert_close(torch.cat(model.seen[-8:]), last, rtol=1e-4, atol=1e-5)

    again = Classifier()
    callback = LightningCallback(*attach(again))
    tester = pl.Trainer(callbacks=[callback, make()], accelerator="cpu", logger=False, enable_progress_bar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tester.validate(again, loader(), ckpt_path=str(tmp_path / "epoch=1.ckpt"), verbose=False)
    assert_close(torch.cat(again.seen), last, rtol=1e-4, atol=1e-5)


def multi():
    return WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.8))


def test_logs(tmp_path):
    model = Classifier()
    callback = LightningCallback(*palettized(model))
    trainer = fit(model, tmp_path, callback)
    found, report = trainer.callback_metrics, callback.r2.report()
    assert {"r2_loss", "r2_range", "r2_gap"} <= {*found}
    for name, value in report.items():
        assert found[name].item() == pytest.approx(value, rel=1e-5)


def test_several_optimizers(tmp_path):
    class Pair(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.other = nn.Linear(8, 4)

        def training_step(self, batch, index):
            x, y = batch
            for net, optimizer in zip((self.other, self.net), self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(cross_entropy(net(x), y))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.other, self.net)]

    model = Pair()
    callback = LightningCallback(RangeRegularizer(model.net), Palettizer(model.net, 2))
    trainer = fit(model, tmp_path, callback, max_epochs=1)
    assert callback.r2[1].steps == 8
    assert [len(optimizer.param_groups) for optimizer in trainer.optimizers] == [1, 2]
    with pytest.raises(ValueError, match="must lie in one optimizer; they lie in 2 of 2"):
        fit(model := Pair(), tmp_path, LightningCallback(RangeRegularizer(model)))


def test_the_other_package():
    found = without(
        ("lightning",),
        """
        import pytorch_lightning as pl
        import r2kernels
        print(issubclass(r2kernels.integrations.LightningCallback, pl.Callback))
        """,
    )
    assert "True" in found


def test_what_is_missing_is_named():
    found = without(
        ("lightning", "pytorch_lightning"),
        """
        import r2kernels
        try:
            r2kernels.integrations.LightningCallback
        except ImportError as error:
            print(error)
        """,
    )
    assert "pip install lightning" in found
