"""The Triton backend: for every family launchers in <family>.py, and the kernels' formulas in <family>_kernels.py."""

try:
    import triton
except ImportError as error:
    raise ImportError("triton is not installed") from error
import torch

from .dkm import TritonDKM, assign_fwd, settled
from .quantizers import TritonQuantizers
from .range_losses import TritonRangeLosses
from .regularizers import TritonRegularizers


def load():
    interpreted = triton.knobs.runtime.interpret
    if not interpreted and not torch.cuda.is_available():
        raise RuntimeError(
            "no CUDA device was found (and TRITON_INTERPRET=1, for CPU tensors, was not set before triton was imported)"
        )
    return Triton(interpreted)


class Triton(TritonRangeLosses, TritonRegularizers, TritonQuantizers):
    """All ops."""

    def DKM(self, *problem):
        return TritonDKM(self, *problem)

    def assign_fwd(self, *problem):
        return assign_fwd(self, *problem)

    def settled(self, *problem):
        return settled(*problem)
