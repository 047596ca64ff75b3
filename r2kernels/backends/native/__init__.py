"""Launchers onto the extension, a module for each family: the same lines for `_C.cpu` and `_C.cuda`."""

from . import dkm, quantizers, range_losses, regularizers
from .extension import on_codes
from .kmeans import fit_block, fit_lines, partition
from .kmeans_lines import NativeLines
from .kmeans_rows import fit_rows
from .tables import errors, nearest

__all__ = ["Native", "errors", "fit_block", "fit_lines", "fit_rows", "load", "nearest", "on_codes", "partition"]


class Native(
    range_losses.NativeRangeLosses,
    regularizers.NativeRegularizers,
    quantizers.NativeQuantizers,
    dkm.NativeClusterings,
    NativeLines,
):
    """The ops of one half of the extension."""

    def __init__(self, name):
        super().__init__(name)
        self.state = self.contract["state"]
        self.losses = {**range_losses.functions(self.library), **regularizers.functions(self.library)}
        self.quantizers = quantizers.functions(self.library)
        self.passes = dkm.functions(self.library)


def load(name):
    """The backend `name`, "cpu" or "cuda"; ImportError or RuntimeError with the reason why it cannot be used."""
    return Native(name)
