"""A loop with accelerate, before the learning-rate scheduler is made:

r2kernels.integrations.attach(accelerator, regularizer, palettizer, optimizer=optimizer)
"""

import functools

from .modules import TrainedModules, check_gradients_are_plain, loss_scale


def attach(accelerator, *modules, optimizer):
    """Has RangeRegularizers, Palettizers and Quantizers train in a loop with accelerate, which stays as it is.

        optimizer = AdamW(model.parameters())
        r2kernels.integrations.attach(accelerator, regularizer, palettizer, optimizer=optimizer)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss(model, batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    optimizer: before or after `prepare`; with FSDP2 after. What is learned is added to it, without weight decay. The
    regularizer's gradient is added once for each of its steps: before the accelerator clips gradients of the weights,
    or else before the step. `Palettizer.step()` follows each step that was not skipped. `save_state` and `load_state`
    hold the state.

    Returns the `TrainedModules`, whose `report()` is for logs. TypeError for another module; ValueError under
    DeepSpeed, and where the optimizer has a scheduler already and lacks the `param_groups()`.
    """
    check_gradients_are_plain(accelerator.distributed_type.value)
    r2 = TrainedModules(modules).to(accelerator.device)
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's has the real one inside
    r2.join(optimizer)
    accelerator.register_for_checkpointing(r2)
    before = _BeforeClipping(accelerator, r2)
    optimizer.register_step_pre_hook(before.step)
    optimizer.register_step_post_hook(before.stepped)
    for name in ("clip_grad_norm_", "clip_grad_value_"):
        setattr(accelerator, name, before.clip(getattr(accelerator, name)))
    return r2


class _BeforeClipping:
    """Adds the regularizers' gradient once for each step of an optimizer."""

    def __init__(self, accelerator, r2):
        self.accelerator, self.r2, self.added = accelerator, r2, False

    def clip(self, clip):
        @functools.wraps(clip)
        def clipped(parameters, *args, **kwargs):
            parameters = list(parameters)
            scaler = self.accelerator.scaler
            # a GradScaler unscales once before each step, which it may skip without a word to the optimizer
            due = self.accelerator.sync_gradients and (scaler is not None or not self.added)
            if due and {id(p) for p in parameters} & {id(w) for w in self.r2.weights()}:
                self.r2.accumulate_grad_(loss_scale(scaler, self.accelerator.device))
                self.added = True
            return clip(parameters, *args, **kwargs)

        return clipped

    def step(self, optimizer, args, kwargs):
        if not self.added:
            scale = getattr(optimizer, "grad_scale", None)  # of a fused optimizer, which unscales by itself
            self.r2.accumulate_grad_(1.0 if scale is None else scale)

    def stepped(self, optimizer, args, kwargs):
        self.added = False
