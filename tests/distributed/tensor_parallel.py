"""Run by test_modules.py in several ranks: what is attached to weights that stay DTensors, and a
RangeRegularizer under `fully_shard`."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

sys.path.insert(0, str(Path(__file__).parents[1]))

import ranks
from nn.replicas import assert_equal_on_all_ranks, counted
from nn.shards import SHARDINGS, by_blocks, loss_of, net

from r2kernels import Palettizer, Quantizer, RangeRegularizer, calibrate
from r2kernels.sharding.shards import whole

REGULARIZERS = (
    {"alpha": 2.0},
    {"alpha": 8.0, "alpha_unit": "std", "learn": False},
    {"alpha": 8.0, "alpha_unit": "std"},
    {"loss": "margin", "k": 0.1},
    {"loss": "l_inf"},
    {"loss": "kure"},
    {"alpha": 2.0, "cluster_dim": 2, "layout": "contiguous", "exclude": ["head"]},
)


def state(*modules):
    return [whole(t).detach() for m in modules for t in m.state_dict().values() if t.is_floating_point()]


def assert_alike(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def regularized(shard, mesh, options, first, in_graph):
    """(model, regularizer) after some steps, sharded after the regularizer was made or before."""
    model, rank = net(), None if shard is None else mesh.get_rank()
    reg = RangeRegularizer(model, weight=0.05, **options) if first else None
    if shard is not None:
        shard(model, mesh)
    reg = reg or RangeRegularizer(model, weight=0.05, **options)
    optimizer = torch.optim.SGD([{"params": model.parameters()}, *reg.param_groups()], lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, step, rank)
        (loss + reg() if in_graph else loss).backward()
        if not in_graph:
            reg.accumulate_grad_()
        optimizer.step()
    return model, reg


def check_regularizer_under_fully_shard(mesh):
    for i, options in enumerate(REGULARIZERS):
        for in_graph in (True, False):
            expected = state(*regularized(None, mesh, options, True, in_graph))
            for n, shard in enumerate(SHARDINGS if i == 0 else (by_blocks,)):
                model, reg = regularized(shard, mesh, options, bool(n % 2), in_graph)
                assert_alike(state(model, reg), expected)
                if reg.state_dict():
                    assert_equal_on_all_ranks(reg)


def check_regularizer_sends_one_message(mesh):
    """A second one where the exponents are in units of a standard deviation."""
    for options, count in (({"alpha": 2.0}, 1), ({"alpha": 8.0, "alpha_unit": "std"}, 2), ({"loss": "kure"}, 1)):
        model = by_blocks(net(), mesh)
        reg = RangeRegularizer(model, **options)
        with counted() as calls:
            reg.accumulate_grad_()
        assert len(calls) == count
        with counted() as calls:
            reg().backward()
        assert len(calls) == count


def check_regularizer_names_its_losses(mesh):
    model = net()
    expected = RangeRegularizer(model).losses()
    found = RangeRegularizer(by_blocks(model, mesh)).losses()
    assert found.keys() == expected.keys()
    assert_alike(found.values(), expected.values())


class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False), nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        return self.c(self.b(self.a(x).tanh()))


def parallel(mesh):
    """Over all ranks by tensor parallelism; over four by two of it and two of `fully_shard`."""
    count = mesh.size()
    yield init_device_mesh("cpu", (count,), mesh_dim_names=("tp",))
    if count == 4:
        yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def divided(model, mesh):
    parallelize_module(model, mesh["tp"], {"a": ColwiseParallel(), "b": RowwiseParallel()})
    if "dp" in mesh.mesh_dim_names:
        for layer in (model.a, model.b, model.c, model):
            fully_shard(layer, mesh=mesh["dp"])
    return model


def examples(step, count, own=None):
    g = torch.Generator().manual_seed(step)
    x = torch.randn(count * 4, 8, generator=g, dtype=torch.float64)
    return x if own is None else x[own * 4 : own * 4 + 4]


def trained(attach, mesh, is_divided):
    """(model, what is attached) after some steps, of the parallel model or of one process with all batches."""
    count = mesh["dp"].size() if "dp" in mesh.mesh_dim_names else 1
    own = mesh["dp"].get_local_rank() if is_divided and count > 1 else None
    model = divided(Parallel(), mesh) if is_divided else Parallel()
    owner = attach(model)
    if isinstance(owner, Quantizer):
        owner.initialize(examples(9, 1))  # else ranges start from the first rank's batch
    learned = owner.param_groups() if hasattr(owner, "param_groups") else []
    parameters = [{"params": list(model.parameters())}, *learned]
    optimizer = torch.optim.SGD(parameters, lr=0.05, foreach=False)  # DTensors beside plain ones
    for step in range(3):
        optimizer.zero_grad()
        loss = whole(model(examples(step, count, own))).square().mean()
        if isinstance(owner, RangeRegularizer):
            loss = loss + owner()
        loss.backward()
        optimizer.step()
        if isinstance(owner, Palettizer):
            owner.step()
    return model, owner


def assert_trains_as_one_process(mesh, attach):
    for kind in parallel(mesh):
        expected, found = trained(attach, kind, False), trained(attach, kind, True)
        assert_alike(state(*found), state(*expected))
        assert_equal_on_all_ranks(found[1])
        outputs = []
        for model, _ in (expected, found):
            model.eval()
            outputs.append(whole(model(examples(9, 1))).detach())
        assert_alike(outputs[1:], outputs[:1])


def check_palettizer(mesh):
    for options in ({}, {"metric": "sqeuclidean", "gradient": "last"}, {"cluster_dim": 2}, {"preserve_zeros": True}):
        assert_trains_as_one_process(mesh, lambda model, options=options: Palettizer(model, 2, **options))


def check_quantizer(mesh):
    """Weights and inputs apart: products of both are integers, whose sums are rounded to either side of a tie."""
    linear = {"*": {"delta": 0.0}}  # else EWGS scales by the signs of each rank's own gradients
    for attach in (
        lambda model: Quantizer(model, "lsq", 4),
        lambda model: Quantizer(model, "lsq", 4, axis="output"),
        lambda model: Quantizer(model, "lsq", None, 4),
        lambda model: Quantizer(model, "ewgs", 4, overrides=linear),
        lambda model: Quantizer(model, "ewgs", None, 4, overrides=linear),
        lambda model: Quantizer(model, "pact", 4),
        lambda model: Quantizer(model, "pact", None, 4),
    ):
        assert_trains_as_one_process(mesh, attach)


def check_regularizer(mesh):
    for options in REGULARIZERS[:3]:
        assert_trains_as_one_process(mesh, lambda model, o=options: RangeRegularizer(model, weight=0.1, **o))


def check_calibrate(mesh):
    for kind in parallel(mesh):
        for options in ({}, {"symmetric": False}):
            outputs, states = [], []
            for model in (Parallel(), divided(Parallel(), kind)):
                quantizer = calibrate(model, [examples(0, 1)], 8, 8, **options)
                outputs.append(whole(model.eval()(examples(1, 1))).detach())
                states.append(state(quantizer))
            assert_alike(states[1], states[0])
            assert_alike(outputs[1:], outputs[:1])


def check_what_is_stored(mesh):
    for kind in parallel(mesh):
        model = divided(Parallel(), kind)
        palettizer, plain = Palettizer(model, 2), Palettizer(Parallel(), 2)
        assert palettizer.sizes() == plain.sizes()
        gaps = [torch.tensor(list(p.gap().values())) for p in (palettizer, plain)]
        assert_alike(gaps[:1], gaps[1:])
        dense = whole(model.a.weight).detach().clone()
        plain.remove()
        palettizer.remove()
        assert_alike(state(model), state(plain._model[0]))
        assert not torch.equal(whole(model.a.weight), dense)


def check_what_needs_whole_weights_is_refused(mesh):
    model = divided(Parallel(), next(parallel(mesh)))
    for attach, option in (
        (lambda: Palettizer(model, 2, group_size=4, replace=True), "group_size=4 of a.weight"),
        (lambda: Palettizer(model, 1, granularity=(2, 2), replace=True), r"granularity=\(2, 2\) of a.weight"),
        (lambda: Palettizer(model, 2, per_channel_scale=True, replace=True), "per_channel_scale=True of a.weight"),
        (lambda: Quantizer(model, "lsq", 4, group_size=4, replace=True), "group_size=4 of a.weight"),
    ):
        with pytest.raises(ValueError, match=option):
            attach()
            model.train()(examples(0, 1))


if __name__ == "__main__":
    ranks.main(globals())
