"""What every trainer does with the modules that train beside a model."""

import torch
from torch import nn

from .. import functional
from ..nn import Palettizer, RangeRegularizer
from ..nn.attach import Attached


class TrainedModules(nn.ModuleList):
    """The RangeRegularizers, Palettizers and Quantizers that train with one model.

    Its `state_dict` is theirs, each with its number before. `loss`: of the regularizers at the last step, or None.
    TypeError names what is none of them.
    """

    def __init__(self, modules):
        modules = list(modules) if isinstance(modules, (list, tuple)) else [modules]
        for module in modules:
            if not isinstance(module, (RangeRegularizer, Attached)):
                raise TypeError(
                    "r2 must be a RangeRegularizer, a Palettizer, a Quantizer or a list of them, got "
                    f"{type(module).__name__}"
                )
        super().__init__(modules)
        self.loss, self._joined, self._hook = None, None, None

    def check_model(self, model):
        """ValueError where one of them holds layers of another model."""
        parts = {id(part) for part in model.modules()}
        for module in self:
            if any(id(place) not in parts for place in _places(module)):
                raise ValueError(
                    f"the {type(module).__name__} belongs to another model than the trainer's {type(model).__name__}"
                )

    def join(self, optimizer):
        """Gives the optimizer their parameters that it has not, and has `step()` follow its steps; once for each.

        ValueError where a learning-rate scheduler has counted the groups already.
        """
        if optimizer is self._joined:
            return
        if self._hook is not None:
            self._hook.remove()
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        options = {"lr": optimizer.defaults["lr"]} if "lr" in optimizer.defaults else {}
        groups = [group for module in self if list(module.parameters()) for group in module.param_groups(**options)]
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in known]
        groups = [group for group in groups if group["params"]]
        if groups and any("initial_lr" in group for group in optimizer.param_groups):
            raise ValueError(
                "the optimizer has a learning-rate scheduler already, which knows no further groups; make it with "
                "[{'params': model.parameters()}, *r2.param_groups()], for each r2 of yours that learns something"
            )
        for group in groups:
            optimizer.add_param_group(group)
        self._hook, self._joined = optimizer.register_step_post_hook(self._follow), optimizer

    def _follow(self, optimizer, args, kwargs):
        """After a step of the optimizer. A GradScaler calls a fused one also when it is to skip the step."""
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return
        for module in self:
            if isinstance(module, Palettizer):
                module.step()

    def accumulate_grad_(self, scale=1.0):
        """`RangeRegularizer.accumulate_grad_` of all regularizers."""
        losses = [module.accumulate_grad_(scale) for module in self if isinstance(module, RangeRegularizer)]
        if losses:
            self.loss = sum(losses)

    def weights(self):
        """The weights that they regularize or replace, each once."""
        found = [w for module in self for w in _weights(module)]
        return list({id(w): w for w in found}.values())

    @torch.no_grad()
    def report(self):
        """name -> number, for logs: `r2_range`, the mean of max - min over the weights; `r2_loss`, the regularizers' at
        the last step; `r2_gap`, the mean of `Palettizer.gap()`."""
        batches = {}
        for w in self.weights():
            batches.setdefault((w.dtype, w.device), []).append(w.detach())
        stats = [functional.weight_stats(some) for some in batches.values()]
        found = {"r2_range": _mean([r for s in stats for r in (s.max - s.min).tolist()])}
        if self.loss is not None:
            found["r2_loss"] = self.loss.item()
        gaps = [gap for module in self if isinstance(module, Palettizer) for gap in module.gap().values()]
        return {**found, "r2_gap": _mean(gaps)} if gaps else found


def loss_scale(scaler, device):
    """What a GradScaler, or None, multiplies a loss by, without reading it."""
    return 1.0 if scaler is None else scaler.scale(torch.ones((), dtype=torch.float32, device=device))


def check_gradients_are_plain(strategy):
    """ValueError where gradients do not lie in `.grad` after backward."""
    if strategy in ("DEEPSPEED", "MEGATRON_LM", "DeepSpeedStrategy"):
        raise ValueError(f"{strategy} keeps gradients to itself; r2kernels works in one process and with DDP and FSDP2")


def _mean(values):
    return sum(values) / len(values)


def _places(module):
    """The modules of the model that hold the weights."""
    if isinstance(module, RangeRegularizer):
        return [holder for holder, _ in module._places]
    return [place.module for layer in module.layers for place in layer.places]


def _weights(module):
    if isinstance(module, RangeRegularizer):
        return [w for group in module._groups() for w in group.weights]
    return [layer.weight() for layer in module.layers]
