"""Run by test_modules.py in several ranks: DistributedDataParallel, process groups, what FSDP1 is refused by."""

import contextlib
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

sys.path.insert(0, str(Path(__file__).parents[1]))

import ranks
from nn.attached import images
from nn.replicas import assert_equal_on_all_ranks, counted, flat

from r2kernels import Palettizer, Quantizer, RangeRegularizer, calibrate, sensitivity

ROWS = 4  # of each rank's batch


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 16), nn.ReLU(), nn.Linear(16, 10)
    )
    return model.double()


def batch(step, rank=None):
    """A rank's batch, or None: those of all ranks."""
    x, y = images(seed=step, count=ROWS * distributed.get_world_size())
    own = slice(None) if rank is None else slice(rank * ROWS, (rank + 1) * ROWS)
    return x[own].double(), y[own]


def loss_of(run, step, rank=None):
    x, y = batch(step, rank)
    return nn.functional.cross_entropy(run(x), y)


def optimizer_of(model, quantizer):
    return torch.optim.SGD([{"params": model.parameters()}, *quantizer.param_groups()], lr=0.05, momentum=0.9)


def rank_of(mesh):
    return mesh.get_rank()


def check_training_equals_one_process(mesh):
    linear = {"*": {"delta": 0.0}}  # else EWGS scales by the signs of each rank's own gradients
    for method, overrides in (("lsq", None), ("pact", None), ("ewgs", linear)):
        found = []
        for wrap in (False, True):
            model = net()
            quantizer = Quantizer(model, method, 4, 4, overrides=overrides)
            quantizer.initialize(batch(0)[0])
            run = DistributedDataParallel(model) if wrap else model
            optimizer = optimizer_of(model, quantizer)
            for step in range(3):
                optimizer.zero_grad()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore" if not wrap else "error")
                    loss_of(run, step, rank_of(mesh) if wrap else None).backward()
                optimizer.step()
            found.append(flat(model, quantizer))
            assert_equal_on_all_ranks(model, quantizer)
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def check_ranges_start_from_the_first_rank(mesh):
    model = net()
    quantizer = Quantizer(model, "lsq", 4, 4)
    run = DistributedDataParallel(model)
    with counted() as calls:
        loss_of(run, 1, rank_of(mesh)).backward()
    assert calls.count("all_reduce") == 1 and quantizer.has_started()
    assert_equal_on_all_ranks(quantizer)
    other = net()
    alone = Quantizer(
        other, "lsq", 4, 4, process_group=distributed.new_group([rank_of(mesh)], use_local_synchronization=True)
    )
    other(batch(1, 0)[0])
    assert torch.equal(flat(alone), flat(quantizer))


def check_another_backward_of_one_rank(mesh):
    model = net()
    quantizer = Quantizer(model, "lsq", 4, 4)
    run, optimizer = DistributedDataParallel(model), optimizer_of(model, quantizer)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(run, step, rank_of(mesh)).backward()
        optimizer.step()
        if step >= 1 and rank_of(mesh) == 0:
            optimizer.zero_grad()
            with counted() as calls:
                loss_of(model, step).backward()
                clip_grad_norm_(model.parameters(), 1.0)
            assert not calls
    assert_equal_on_all_ranks(model, quantizer)


def check_a_forward_of_one_rank_before_all(mesh):
    """It starts ranges of its own, and the first that is shared gives all ranks those of the first rank."""
    model = net()
    quantizer = Quantizer(model, "lsq", 4, 4)
    run, optimizer = DistributedDataParallel(model), optimizer_of(model, quantizer)
    if rank_of(mesh) == 0:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            loss_of(model, 0).backward()
            loss_of(model, 0).backward()
        assert sum("are not averaged over the ranks" in str(w.message) for w in told) == 1
        optimizer.zero_grad()
        started = flat(quantizer)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(run, step, rank_of(mesh)).backward()
        if step == 0:
            assert rank_of(mesh) != 0 or torch.equal(flat(quantizer), started)
        optimizer.step()
    assert_equal_on_all_ranks(model, quantizer)


def check_accumulation_under_no_sync(mesh):
    found = []
    for pieces in (1, 2):
        model = net()
        quantizer = Quantizer(model, "lsq", 4)
        quantizer.initialize(batch(0)[0])
        run, optimizer = DistributedDataParallel(model), optimizer_of(model, quantizer)
        for step in range(2):
            optimizer.zero_grad()
            x, y = batch(step, rank_of(mesh))
            for i, (part, target) in enumerate(zip(x.chunk(pieces), y.chunk(pieces), strict=True)):
                last = i == pieces - 1
                with counted() as calls, contextlib.nullcontext() if last else run.no_sync():
                    (nn.functional.cross_entropy(run(part), target) / pieces).backward()
                assert calls.count("all_reduce") == int(last)
            optimizer.step()
        assert_equal_on_all_ranks(model, quantizer)
        found.append(flat(model, quantizer))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def check_a_process_group_and_no_sync(mesh):
    """Without DDP: the user averages the gradients of the weights."""
    found = []
    for pieces in (1, 2):
        model = net()
        quantizer = Quantizer(model, "lsq", 4, 4, process_group=distributed.group.WORLD)
        optimizer = optimizer_of(model, quantizer)
        for step in range(2):
            optimizer.zero_grad()
            x, y = batch(step, 0)  # the same on all ranks
            for i, (part, target) in enumerate(zip(x.chunk(pieces), y.chunk(pieces), strict=True)):
                with counted() as calls, quantizer.no_sync() if i < pieces - 1 and step else contextlib.nullcontext():
                    (nn.functional.cross_entropy(model(part), target) / pieces).backward()
                assert calls.count("all_reduce") == int(i == pieces - 1 or not step)
            for p in model.parameters():
                distributed.all_reduce(p.grad)
                p.grad /= distributed.get_world_size()
            optimizer.step()
        assert_equal_on_all_ranks(model, quantizer)
        found.append(flat(model))
    assert found[0].isfinite().all()


def check_half_of_the_ranks(mesh):
    """Two trainings side by side, each over a process group of its own."""
    world, rank = distributed.get_world_size(), rank_of(mesh)
    halves = [distributed.new_group(list(range(world // 2))), distributed.new_group(list(range(world // 2, world)))]
    half = int(rank >= world // 2)
    model = net()
    quantizer = Quantizer(model, "lsq", 4, 4)
    run = DistributedDataParallel(model, process_group=halves[half])
    for _ in range(1 + half):  # as often as it likes
        loss_of(run, half, rank).backward()
    grads = torch.stack([p.grad for p in quantizer.parameters() if p.dim() == 0])
    own = [torch.empty_like(grads) for _ in range(world // 2)]
    distributed.all_gather(own, grads, group=halves[half])
    assert all(torch.equal(g, grads) for g in own)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, branch):
        return {"out": [branch(self, x)]}


def check_layers_that_some_ranks_do_not_use(mesh):
    rank = rank_of(mesh)
    branches = (lambda m, x: m.a(x), lambda m, x: m.b(m.a(x)), lambda m, x: x * m.c.bias)
    model = Branching()
    quantizer = Quantizer(model, "lsq", 4, 4)
    run = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = optimizer_of(model, quantizer)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))
    for step in range(4):
        optimizer.zero_grad()
        branch = branches[(rank + step) % 2 if step < 3 else 2 * (rank > 0)]
        with counted() as calls:
            run(x, branch)["out"][0].square().sum().backward()
        assert calls.count("all_reduce") == 1
        optimizer.step()
        assert_equal_on_all_ranks(model, quantizer)
    assert [p.grad for p in quantizer.inputs._modules["c"].parameters()] == [None]


def check_a_part_of_the_model(mesh):
    """DDP averages what is a part of its model, and nobody else does."""
    model = net()
    model.quantizer = Quantizer(model, "lsq", 4)
    model.forward = lambda x: model[:6](x)
    model.quantizer.initialize(batch(0)[0])
    run = DistributedDataParallel(model)
    with counted() as calls:
        loss_of(run, 0, rank_of(mesh)).backward()
    assert "all_reduce" not in calls
    grads = torch.stack([p.grad for p in model.quantizer.parameters()])
    everywhere = [torch.empty_like(grads) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everywhere, grads)
    assert all(torch.equal(g, grads) for g in everywhere) and grads.abs().min() > 0


def check_palettizer(mesh):
    model = net()
    palettizer = Palettizer(model, 2)
    run, optimizer = DistributedDataParallel(model), torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        with counted() as calls:
            loss_of(run, step, rank_of(mesh)).backward()
        optimizer.step()
        palettizer.step()
        if rank_of(mesh) == 0:
            loss_of(model, step).backward()
        assert not calls
    assert_equal_on_all_ranks(model, palettizer)


def check_sensitivity_is_the_mean_over_all_ranks(mesh):
    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    model, rank, world = net(), rank_of(mesh), distributed.get_world_size()
    own = [batch(step, rank) for step in range(1 + (rank == 0))]
    found = sensitivity(model, own, loss=loss)
    every = [batch(step, r) for r in range(world) for step in range(1 + (r == 0))]
    for name, h in found.items():
        grads = [torch.autograd.grad(loss(model, b), model.get_parameter(name))[0] for b in every]
        torch.testing.assert_close(h, torch.stack(grads).square().mean(0).float())
    moments = torch.cat([x for x, _ in every]).square().mean((0, 2, 3)).float()
    found = sensitivity(model, [x for x, _ in own], kind="inputs")["0.weight"]
    torch.testing.assert_close(found, moments[:, None, None].expand(8, 2, 3, 3))
    with pytest.raises(TypeError, match="sensitivity takes plain modules"):
        sensitivity(DistributedDataParallel(net()), own, loss=loss)


def check_calibrate_in_a_group(mesh):
    world, rank = distributed.get_world_size(), rank_of(mesh)
    halves = [distributed.new_group(list(range(world // 2))), distributed.new_group(list(range(world // 2, world)))]
    half = int(rank >= world // 2)
    model = net()
    quantizer = calibrate(model, [batch(half)[0]], 4, 4, process_group=halves[half])
    other = calibrate(net(), [batch(half)[0]], 4, 4, process_group=halves[half])
    assert torch.equal(flat(quantizer), flat(other))
    model(batch(0, rank)[0])


def check_a_compiled_model(mesh):
    model = net()
    quantizer = Quantizer(model, "lsq", 4, 4)
    run = DistributedDataParallel(torch.compile(model, backend="eager"))
    optimizer = optimizer_of(model, quantizer)
    with run.no_sync():
        loss_of(run, 0, rank_of(mesh)).backward()
    for step in range(2):
        optimizer.zero_grad()
        loss_of(run, step, rank_of(mesh)).backward()
        optimizer.step()
    assert_equal_on_all_ranks(model, quantizer)


def check_flat_parameters_are_refused(mesh):
    def palettize(model):
        return Palettizer(model, 2)

    def quantize(model):
        return Quantizer(model, "lsq", 4, 4)

    def regularize(model):
        return RangeRegularizer(model)

    for attach in (palettize, quantize, regularize):
        for orig in (False, True):
            for policy in (None, ModuleWrapPolicy({nn.Linear, nn.Conv2d})):
                for first in (True, False):
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        model = net().float()
                        owner = attach(model) if first else None
                        run = FullyShardedDataParallel(
                            model, use_orig_params=orig, device_id=torch.device("cpu"), auto_wrap_policy=policy
                        )
                    uses = [lambda run=run: run(torch.zeros(2, 2, 6, 6))]
                    if attach is regularize and first:
                        uses = [owner, owner.accumulate_grad_]
                    for use in uses if first else [lambda model=model, attach=attach: attach(model)]:
                        with pytest.raises(RuntimeError, match=r"FullyShardedDataParallel.*fully_shard \(FSDP2\)"):
                            use()


if __name__ == "__main__":
    ranks.main(globals())
