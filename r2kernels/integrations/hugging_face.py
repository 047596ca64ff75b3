"""transformers' Trainer, or any subclass of it:

trainer = r2kernels.integrations.hf(Trainer)(model, args, ..., r2=[regularizer, palettizer])
"""

import functools
import os

from .modules import TrainedModules, check_gradients_are_plain, loss_scale

STATE = "r2kernels.safetensors"  # in every checkpoint


@functools.cache
def hf(trainer):
    """A subclass of `trainer` (transformers' `Trainer` or a subclass) that takes `r2`: a RangeRegularizer, a
    Palettizer, a Quantizer, or a list of them, made of its model.

    What is learned gets into the optimizer, without weight decay. The regularizer's gradient is added once for each
    step of the optimizer, before clipping, whatever the accumulation. `Palettizer.step()` follows each step that was
    not skipped. Checkpoints and `save_model` write `r2kernels.safetensors` beside the dense model;
    `resume_from_checkpoint` and `load_best_model_at_end` read it. Logs hold `r2_range`, `r2_loss` and `r2_gap`, see
    `TrainedModules.report`.

    TypeError for another `r2`; ValueError where it belongs to another model (as with `model_init`), under DeepSpeed,
    for a checkpoint without its state, and where a scheduler was given whose optimizer lacks the `param_groups()`.
    """
    return type(trainer.__name__, (_WithModules, trainer), {"__doc__": trainer.__doc__, "__module__": __name__})


class _WithModules:
    """What `hf` puts before a Trainer."""

    def __init__(self, *args, r2, **kwargs):
        self.r2 = TrainedModules(r2)
        super().__init__(*args, **kwargs)
        check_gradients_are_plain(self.accelerator.distributed_type.value)
        if not self.is_model_parallel:
            self.r2.to(self.args.device)

    def create_optimizer(self, *args, **kwargs):
        made_here = self.optimizer is None
        self.r2.check_model(self.model)
        optimizer = super().create_optimizer(*args, **kwargs)
        if made_here:  # of all parameters of the model, of which these modules may be parts
            own = {id(p) for p in self.r2.parameters()}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in own]
        return optimizer

    def create_scheduler(self, *args, **kwargs):
        """Before it the optimizer gets the groups: accelerate's `prepare` for FSDP2 refuses what is not the model's."""
        self.r2.join(getattr(self.optimizer, "optimizer", self.optimizer))  # accelerate's has the real one inside
        self._starts_anew = True
        return super().create_scheduler(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        if self._starts_anew:
            self.r2.zero_grad()  # the trainer zeroes the gradients of the model alone, not of the optimizer
        loss = super().training_step(*args, **kwargs)
        self._starts_anew = self.accelerator.sync_gradients
        if self._starts_anew:  # this was the last backward before a step
            scaler = getattr(self.accelerator, "scaler", None)
            self.r2.accumulate_grad_(loss_scale(scaler, self.accelerator.device))
        return loss

    def log(self, logs, *args, **kwargs):
        logs.update(self.r2.report())
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir=None, *args, **kwargs):
        from safetensors.torch import save_file

        folder = self.args.output_dir if output_dir is None else output_dir
        if self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            state = {name: value.detach().contiguous() for name, value in self.r2.state_dict().items()}
            save_file(state, os.path.join(folder, STATE))
        super().save_model(output_dir, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, *args, **kwargs):
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        self._load_modules(resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        self._load_modules(self.state.best_model_checkpoint)

    def _load_modules(self, folder):
        from safetensors.torch import load_file

        path = os.path.join(folder, STATE)
        if not os.path.isfile(path):
            raise ValueError(f"{folder} has no {STATE}; it was not saved by a trainer of r2kernels.integrations.hf")
        self.r2.load_state_dict(load_file(path))
