"""Lightning, as `lightning.pytorch` or `pytorch_lightning`:

trainer = Trainer(callbacks=[r2kernels.integrations.LightningCallback(regularizer, palettizer)])
"""

import importlib
import sys

import torch

from ..nn import attached, copy_attached
from .modules import TrainedModules, check_gradients_are_plain


def _lightning():
    """The package that is imported already, else the one that is installed."""
    for name in sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    raise ImportError("LightningCallback needs Lightning; install it with: pip install lightning")


pl = _lightning()


class LightningCallback(pl.Callback):
    """Has RangeRegularizers, Palettizers and Quantizers, made of the LightningModule or its parts, train with it.

    What is learned gets into the optimizer, without weight decay; where `configure_optimizers` makes a scheduler it has
    to give the optimizer `[{"params": self.parameters()}, *regularizer.param_groups()]` itself (ValueError). The
    regularizer's gradient is added once for each step of the optimizer, before clipping, whatever the accumulation, and
    `Palettizer.step()` follows each step that was not skipped. Of several optimizers it is the one that holds the
    weights. Checkpoints hold the state. Logs hold `r2_loss` for each step, `r2_range` and `r2_gap` for each epoch of
    training and validation, see `TrainedModules.report`.

    With `WeightAveraging` ranges and centroids are averaged as the weights are, and belong to the averaged weights in
    validation, at the end of training and in checkpoints that are tested.
    """

    def __init__(self, *modules):
        self.r2, self._optimizer, self._trainer, self._current = TrainedModules(modules), None, None, None

    def setup(self, trainer, pl_module, stage):
        check_gradients_are_plain(type(trainer.strategy).__name__)
        self._trainer = trainer
        self.r2.check_model(pl_module)
        self.r2.to(trainer.strategy.root_device)

    def on_fit_start(self, trainer, pl_module):
        self._optimizer = self._of_the_weights(trainer.optimizers)
        self.r2.join(self._optimizer)
        if self._average is not None:
            self._average.update_parameters = _Update(self._average)

    def _of_the_weights(self, optimizers):
        weights = {id(w) for w in self.r2.weights()}
        some = [o for o in optimizers if any(id(p) in weights for group in o.param_groups for p in group["params"])]
        some = optimizers if len(optimizers) == 1 else some
        if len(some) != 1:
            raise ValueError(f"the weights must lie in one optimizer; they lie in {len(some)} of {len(optimizers)}")
        return some[0]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if optimizer is not self._optimizer:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        is_scaled = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
        self.r2.accumulate_grad_(scaler.get_scale() if is_scaled else 1.0)
        if self.r2.loss is not None:
            pl_module.log("r2_loss", self.r2.loss)

    def on_train_epoch_end(self, trainer, pl_module):
        self._log(pl_module)

    def on_validation_start(self, trainer, pl_module):
        self._log(pl_module)

    def on_validation_epoch_start(self, trainer, pl_module):
        if self._average is not None:
            self._current = [_copied(a) for a in attached(pl_module)]
            copy_attached(self._average.module, pl_module)

    def on_validation_epoch_end(self, trainer, pl_module):
        if self._current is not None:
            _load(attached(pl_module), self._current)
            self._current = None

    def on_train_end(self, trainer, pl_module):
        if self._average is not None:
            copy_attached(self._average.module, pl_module)

    def _log(self, pl_module):
        report = self.r2.report()
        pl_module.log_dict({name: report[name] for name in ("r2_range", "r2_gap") if name in report})

    @property
    def _average(self):
        """The averaged model of `WeightAveraging`, with something attached, or None."""
        kind = getattr(pl.callbacks, "WeightAveraging", ())
        found = [c._average_model for c in self._trainer.callbacks if isinstance(c, kind)]
        return next((model for model in found if model is not None and attached(model)), None)

    def state_dict(self):
        state = {"modules": _copied(self.r2)}
        if self._average is not None:
            state["average"] = [_copied(a) for a in attached(self._average)]
        return state

    def load_state_dict(self, state):
        self.r2.load_state_dict(state["modules"])
        if "average" not in state:
            return
        if self._average is not None:
            _load(attached(self._average), state["average"])
        else:  # the weights of the checkpoint are the averaged ones
            _load(attached(self._trainer.lightning_module), state["average"])


class _Update:
    """`AveragedModel.update_parameters`, which averages what is attached to the model too."""

    def __init__(self, average):
        self.average, self.update = average, average.update_parameters

    def __call__(self, model):
        decay = _decay(self.average)
        self.update(model)
        copy_attached(model, self.average.module, decay=decay)


def _decay(average):
    """What the average is multiplied by in its next update, or None for the first, a copy. Averages are linear: it is
    what becomes of 1 and 0."""
    count = average.n_averaged
    if count == 0:
        return None
    old = torch.ones(1, dtype=torch.float64, device="cpu")
    new = torch.zeros_like(old)
    if average.multi_avg_fn is not None:
        average.multi_avg_fn([old], [new], count.cpu())
        return old.item()
    if average.avg_fn is not None:
        return average.avg_fn(old, new, count.cpu()).item()
    return (count / (count + 1)).item()


def _copied(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _load(modules, states):
    for module, state in zip(modules, states, strict=True):
        module.load_state_dict(state)
