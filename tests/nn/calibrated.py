"""What two ranks calibrate."""

import math

import ranks
import torch
from nn.quantized import values
from torch import nn

from r2kernels import calibrate
from r2kernels.nn import reestimate_batchnorm


class Branches(nn.Module):
    """The second only where the batch is large."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(x) if x.max() > 5 else self.a(x)


def calibrated(numbers):
    """The state of a model that was calibrated on these of three batches."""
    torch.manual_seed(0)
    batches = [torch.rand(8, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    return values(calibrate(Branches(), [(5 * i + 1) * batches[i] - i % 2 / 2 for i in numbers], symmetric=False))


def calibrate_rank(rank, folder):
    """One of two processes: calibrates on its batches, and saves its state."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    result = {"state": calibrated([[0], [1, 2]][rank])}
    try:
        calibrate(Branches(), [torch.full((2, 4), [1.0, math.nan][rank])])
    except ValueError as error:
        result["error"] = str(error)
    norm = nn.BatchNorm1d(2)
    reestimate_batchnorm(norm, [torch.full((3, 2), v) for v in ([2.0, 4.0, 6.0], [4.0])[rank]])
    result["norm"] = norm.running_mean
    torch.save(result, folder / f"{rank}.pt")
    ranks.leave()
