"""What the tests of Quantizer train."""

import ranks
import torch
from nn.attached import images
from torch import nn

from r2kernels import Quantizer

METHODS = ("lsq", "ewgs", "pact")


def plain(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))


def quantized(method, *bits, **options):
    """A function that attaches a Quantizer whose ranges have started."""

    def attach(model):
        quantizer = Quantizer(model, method, *bits, **options)
        quantizer.initialize(images()[0])
        return quantizer

    return attach


def train(model, quantizer, steps=10, lr=0.02, run=None):
    x, y = images()
    optimizer = torch.optim.SGD([{"params": model.parameters()}, *quantizer.param_groups()], lr=lr, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy((run or model)(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def values(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def train_rank(rank, folder):
    """One of two processes: trains under DDP on its half of the images, and saves its state and gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))
    quantizer = Quantizer(model, "lsq", 4, 4)
    wrapped = nn.parallel.DistributedDataParallel(model)
    x, y = images()
    half = slice(rank * 4, rank * 4 + 4)
    optimizer = torch.optim.SGD([{"params": model.parameters()}, *quantizer.param_groups()], lr=0.05)
    result = {}
    for i in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(wrapped(x[half]), y[half])
        if i == 0:
            result["start"] = values(quantizer)
            (result["local"],) = torch.autograd.grad(loss, [quantizer.inputs._modules["0"].step], retain_graph=True)
        loss.backward()
        if i == 0:
            result["average"] = quantizer.inputs._modules["0"].step.grad.clone()
        optimizer.step()
    result["end"] = values(quantizer) | values(model)
    torch.save(result, folder / f"{rank}.pt")
    ranks.leave()


class Branching(nn.Module):
    """A layer that only some batches reach, and with `own` a quantizer that is a part of the model."""

    def __init__(self, own):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        if own:
            self.quantizer = Quantizer(self, "lsq", 4, 4)

    def forward(self, x, both):
        x = self.a(x)
        return self.b(x) if both else x


def train_branching_rank(rank, folder):
    """One of two processes: the second alone reaches a layer, in the second step."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    result = {}
    for own in (False, True):
        model = Branching(own)
        quantizer = model.quantizer if own else Quantizer(model, "lsq", 4, 4)
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        learned = [] if own else quantizer.param_groups()
        optimizer = torch.optim.SGD([{"params": model.parameters()}, *learned], lr=0.05)
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))
        for i in range(4):
            optimizer.zero_grad()
            wrapped(x, both=rank == 1 and i >= 1).square().sum().backward()
            optimizer.step()
        result[own] = values(model) | values(quantizer)
    torch.save(result, folder / f"{rank}.pt")
    ranks.leave()
