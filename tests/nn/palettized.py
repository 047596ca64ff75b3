"""What the tests of Palettizer train."""

import ranks
import torch
from nn.attached import images
from torch import nn

from r2kernels import Palettizer


def plain(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))


def train(model, palettizer, steps=4, optimizer=torch.optim.SGD, **options):
    x, y = images()
    opt = optimizer(model.parameters(), **{"lr": 0.05, **options})
    losses = []
    for _ in range(steps):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        palettizer.step()
        losses.append(loss.item())
    return losses


def train_rank(rank, folder):
    """One of two processes: trains under DDP on its half of the images, and saves all state."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = plain()
    palettizer = Palettizer(model, 2)
    wrapped = nn.parallel.DistributedDataParallel(model)
    x, y = images()
    half = slice(rank * 4, rank * 4 + 4)
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        opt.zero_grad()
        nn.functional.cross_entropy(wrapped(x[half]), y[half]).backward()
        opt.step()
        palettizer.step()
    torch.save({**model.state_dict(), **palettizer.state_dict()}, folder / f"{rank}.pt")
    ranks.leave()
