"""RangeRegularizer, Palettizer and Quantizer inside other people's trainers.

    trainer = r2kernels.integrations.hf(Trainer)(..., r2=[regularizer, palettizer])          # transformers
    trainer = Trainer(callbacks=[r2kernels.integrations.LightningCallback(regularizer)])      # Lightning
    r2kernels.integrations.attach(accelerator, regularizer, quantizer, optimizer=optimizer)   # accelerate

Each does the same: alpha, M and ranges get into the optimizer; the regularizer's gradient is added once for each step
of the optimizer, before clipping; `step()` follows each step that was not skipped; checkpoints hold the state.
"""

from .accelerate import attach
from .hugging_face import hf

__all__ = ["LightningCallback", "attach", "hf"]


def __getattr__(name):
    if name == "LightningCallback":  # its base class is Lightning's
        from .lightning import LightningCallback

        return LightningCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
