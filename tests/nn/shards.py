"""A model and how it is sharded, for the tests of `fully_shard` over several ranks."""

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from r2kernels import Palettizer, Quantizer

ROWS = 6  # of each rank's batch


class Block(nn.Module):
    def __init__(self, kind=None):
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(12, 10), nn.Linear(10, 12), kind

    def body(self, x):
        return self.b(self.a(x).relu())

    def forward(self, x):
        return x + (self.body(x) if self.kind is None else checkpoint(self.body, x, use_reentrant=self.kind))


class Net(nn.Module):
    """Of 7 rows and 2: on 4 ranks shards are uneven, and empty."""

    def __init__(self, kind=None):
        super().__init__()
        self.embed = nn.Linear(8, 12)
        self.blocks = nn.ModuleList([Block(kind) for _ in range(2)])
        self.odd, self.head = nn.Linear(12, 7), nn.Linear(7, 2)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.odd(x).relu())


def net(kind=None, dtype=torch.float64):
    torch.manual_seed(0)
    return Net(kind).to(dtype)


def by_blocks(model, mesh, **options):
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def by_layers(model, mesh):
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def as_a_whole(model, mesh):
    return fully_shard(model, mesh=mesh)


def kept_whole(model, mesh):
    return by_blocks(model, mesh, reshard_after_forward=False)


SHARDINGS = (by_blocks, by_layers, as_a_whole, kept_whole)


def batch(step, rank=None, dtype=torch.float64):
    g = torch.Generator().manual_seed(step)
    count = ROWS * distributed.get_world_size()
    x, y = torch.randn(count, 8, generator=g, dtype=dtype), torch.randint(2, (count,), generator=g)
    own = slice(None) if rank is None else slice(rank * ROWS, (rank + 1) * ROWS)
    return x[own], y[own]


def loss_of(run, step, rank=None, dtype=torch.float64):
    x, y = batch(step, rank, dtype)
    return nn.functional.cross_entropy(run(x).to(dtype), y)


def whole(model):
    parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in parameters])


def made(attach, mesh, shard=None, first=True, kind=None):
    """(model, what is attached to it), sharded after the attachment or before."""
    model = net(kind)
    owner = attach(model) if first else None
    if shard is not None:
        shard(model, mesh)
    owner = owner or attach(model)
    if isinstance(owner, Quantizer):
        owner.initialize(batch(9)[0])
    return model, owner


def adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, eps=1e-3)  # which 1 / |gradient| does not amplify rounding by


def train(model, owner, rank=None, steps=3, optimizer=adamw):
    learned = owner.param_groups() if isinstance(owner, Quantizer) else []
    opt = optimizer([{"params": model.parameters()}, *learned], lr=1e-2)
    for step in range(steps):
        opt.zero_grad()
        loss_of(model, step, rank).backward()
        opt.step()
        if isinstance(owner, Palettizer):
            owner.step()
