"""Run by test_modules.py in several ranks: a Palettizer and a Quantizer under `fully_shard`."""

import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))

import ranks
from nn.replicas import assert_equal_on_all_ranks, counted, flat
from nn.shards import SHARDINGS, Block, Net, as_a_whole, batch, by_blocks, loss_of, made, net, train, whole

from r2kernels import Palettizer, Quantizer, calibrate, load_palettized, save_palettized, save_quantized


def palettize(model, **options):
    return Palettizer(model, 2, **options)


def quantize(model, **options):
    return Quantizer(model, "lsq", 4, 4, **options)


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def assert_trains_alike(mesh, attach, shardings=SHARDINGS, **options):
    model, owner = made(attach, mesh, kind=options.get("kind"))
    train(model, owner)
    for i, shard in enumerate(shardings):
        for first in (True, False) if shard is by_blocks else (bool(i % 2),):
            sharded, other = made(attach, mesh, shard, first, **options)
            train(sharded, other, mesh.get_rank())
            assert_close(whole(sharded), whole(model))
            assert_close(flat(other), flat(owner))
            assert_equal_on_all_ranks(other)
            assert not any(hat is not None for hat in other._hats)
            assert all("weight" not in m.__dict__ for m in sharded.modules())


def check_palettizer(mesh):
    assert_trains_alike(mesh, palettize)


def check_palettizer_with_options(mesh):
    for options in (
        {"cluster_dim": 2, "lut_dtype": "fp16"},
        {"group_size": 4, "per_channel_scale": True},
        {"preserve_zeros": True, "metric": "sqeuclidean"},
        {"iterations": "converge", "gradient": "implicit"},
    ):
        assert_trains_alike(mesh, lambda model, options=options: palettize(model, **options), (by_blocks,))


def check_quantizer(mesh):
    assert_trains_alike(mesh, quantize)


def check_quantizer_with_options(mesh):
    linear = {"*": {"delta": 0.0}}  # else EWGS scales by the signs of each rank's own gradients
    for attach in (
        lambda model: Quantizer(model, "pact", 4, 4),
        lambda model: Quantizer(model, "ewgs", 4, 4, overrides=linear),
        lambda model: Quantizer(model, "lsq", 3, axis="output"),
        lambda model: Quantizer(model, "lsq", 2, group_size=12, levels="ternary"),
    ):
        assert_trains_alike(mesh, attach, (by_blocks,))


class Collectives(TorchDispatchMode):
    """Counts those of the dispatcher."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.namespace in ("c10d", "_c10d_functional")
        return function(*args, **(kwargs or {}))


def collectives(model, rank, forward_alone=False):
    with Collectives() as found:
        loss = loss_of(model, 0, rank)
        if not forward_alone:
            loss.backward()
    return found.count


def check_no_collective_is_added(mesh):
    """But the one of a quantizer's gradients, of all ranges together."""
    for shard in SHARDINGS:
        counts = []
        for attach in (None, palettize, quantize):
            model = shard(net(), mesh)
            owner = attach and attach(model)
            if owner is not None and attach is quantize:
                owner.initialize(batch(9)[0])
            train(model, owner, mesh.get_rank(), steps=1, optimizer=torch.optim.SGD)
            with counted() as calls:
                counts.append((collectives(model, mesh.get_rank(), True), collectives(model, mesh.get_rank())))
            assert attach is None or calls.count("all_reduce") == int(attach is quantize)
        forward, both = counts[0]
        assert counts[1] == (forward, both) and counts[2] == (forward, both + 1)


def check_one_unit_at_a_time_has_other_weights(mesh):
    for attach in (palettize, quantize):
        model, owner = made(attach, mesh, by_blocks)
        modules = {layer.name: layer.module for layer in owner.layers}
        seen = []

        def look(name, modules=modules, seen=seen):
            return lambda *_: seen.append((name, {n for n, m in modules.items() if "weight" in m.__dict__}))

        for name, module in modules.items():
            module.register_forward_pre_hook(look(name))
        loss_of(model, 0, mesh.get_rank())
        root = {"embed.weight", "odd.weight", "head.weight"}
        assert len(seen) == 7
        for name, replaced in seen:
            part = name.rpartition(".")[0].rpartition(".")[0]
            assert replaced == root | {n for n in modules if part and n.startswith(part + ".")}


def check_activation_checkpointing(mesh):
    for attach in (palettize, quantize):
        assert_trains_alike(mesh, attach, (by_blocks, as_a_whole), kind=False)
        assert_trains_alike(mesh, attach, (by_blocks,), kind=True)


def check_checkpointing_of_whole_blocks(mesh):
    """The unit is called inside the part that is computed again."""
    for reentrant in (False, True):
        for attach in (palettize, quantize):
            found = []
            for shard in (None, by_blocks):
                model, owner = made(attach, mesh, shard)
                if shard:
                    for block in model.blocks:
                        block.kept = block.forward
                forward = Net.forward

                def again(self, x, reentrant=reentrant):
                    x = self.embed(x)
                    for block in self.blocks:
                        x = checkpoint(block, x, use_reentrant=reentrant)
                    return self.head(self.odd(x).relu())

                Net.forward = again
                try:
                    train(model, owner, mesh.get_rank() if shard else None, steps=2)
                finally:
                    Net.forward = forward
                found.append((whole(model), flat(owner)))
            assert_close(found[1][0], found[0][0])
            assert_close(found[1][1], found[0][1])


def check_checkpointing_of_the_whole_model(mesh):
    for attach in (palettize, quantize):
        for reentrant in (False, True):
            found = []
            for shard in (None, by_blocks):
                model, _ = made(attach, mesh, shard)
                x = batch(0, mesh.get_rank())[0].requires_grad_()
                checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
                other, _ = made(attach, mesh)
                other(x.detach()).square().sum().backward()
                found.append(x.grad)
                if shard is None:
                    assert_close([p.grad for p in model.parameters()], [p.grad for p in other.parameters()])
            assert_close(found[0], found[1])


def check_a_compiled_model(mesh):
    """It is not called before it is compiled."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Block().double()
        palettize(model)
        for unit in (model.a, model):
            fully_shard(unit, mesh=mesh)
        run = torch.compile(model, backend="eager") if compiled else model
        run(torch.ones(3, 12, dtype=torch.float64)).square().sum().backward()
        found.append([p.grad.full_tensor() for p in model.parameters()])
    assert_close(found[0], found[1])


def check_saving(mesh):
    with tempfile.TemporaryDirectory() as folder:
        for attach, save in ((palettize, save_palettized), (quantize, save_quantized)):
            model, owner = made(attach, mesh)
            sharded, other = made(attach, mesh, by_blocks)
            save(other, Path(folder) / "model.r2")
            saved = load_palettized(Path(folder) / "model.r2")
            owner.remove()
            for name, value in model.state_dict().items():
                assert_close(saved[name], value)
            assert all(isinstance(p, DTensor) for p in sharded.parameters())


def check_delta(mesh):
    """All ranks take the first rank's, and the model stays sharded."""
    model = by_blocks(net(), mesh)
    owner = Quantizer(model, "ewgs", 4, 4, overrides={"*": {"delta": "hessian"}})
    owner.initialize(batch(9)[0])
    before = flat(owner)
    owner.estimate_delta(lambda: loss_of(model, 0, mesh.get_rank()))
    assert_equal_on_all_ranks(owner)
    assert not torch.equal(before, flat(owner)) and all(isinstance(p, DTensor) for p in model.parameters())


def check_tensor_parallel_palettes(mesh):
    """Codes in eval() are of each rank's own rows; what needs the whole weight names the option and the layer."""
    kinds = {"a": RowwiseParallel(input_layouts=Replicate()), "b": ColwiseParallel(output_layouts=Replicate())}
    plan = {f"blocks.{i}.{name}": kind for i in range(2) for name, kind in kinds.items()}
    x = batch(0)[0]
    plain, model = net(), parallelize_module(net(), mesh, plan)
    owners = [palettize(plain), palettize(model)]
    assert_close(flat(owners[1]), flat(owners[0]))
    assert owners[0].sizes() == owners[1].sizes()
    assert_close(model.eval()(x), plain.eval()(x))
    for options in ({"group_size": 4}, {"per_channel_scale": True}):
        model = parallelize_module(net(), mesh, plan)
        palettize(model, **options)
        with pytest.raises(
            ValueError, match=rf"{next(iter(options))}=.* of blocks\.0\.a\.weight needs the whole weight"
        ):
            model(x)
    model = parallelize_module(net(), mesh, plan)
    Quantizer(model, "lsq", 4, group_size=12)
    with pytest.raises(ValueError, match=r"group_size=12 of blocks\.0\.a\.weight needs the whole weight"):
        model(x)


def check_evaluation(mesh):
    for attach in (palettize, quantize):
        model, owner = made(attach, mesh)
        train(model, owner, steps=1)
        sharded, other = made(attach, mesh, by_blocks)
        train(sharded, other, mesh.get_rank(), steps=1)
        for m in (model, sharded):
            m.zero_grad(), m.eval()
        x = batch(1)[0]
        with torch.no_grad():
            assert_close(sharded(x), model(x))
            with other.frozen():
                assert_close(sharded(x), model(x))
                assert not other._kept
        loss_of(model, 0).backward()
        loss_of(sharded, 0, mesh.get_rank()).backward()
        for p, q in zip(model.parameters(), sharded.parameters(), strict=True):
            assert_close(q.grad.full_tensor(), p.grad)
            assert p.grad.abs().max() > 0


def check_what_is_stored(mesh):
    """Codes, sizes and errors are those of the whole weights, and `remove` writes them back into the shards."""
    for attach in (palettize, quantize, lambda model: Quantizer(model, "pact", 2)):
        model, owner = made(attach, mesh)
        sharded, other = made(attach, mesh, by_blocks)
        is_palette = isinstance(owner, Palettizer)
        both = [o.clustered() if is_palette else o.coded() for o in (owner, other)]
        for name, stored in both[0].items():
            assert_close(both[1][name].decoded(), stored.decoded())
        assert owner.sizes() == other.sizes() and owner.export().weights.keys() == other.export().weights.keys()
        losses = [o.gap() if is_palette else o.errors() for o in (owner, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
        sharded.eval()
        with torch.no_grad():
            before = sharded(batch(0)[0])  # leaves the root whole
        other.remove(), owner.remove()
        assert_close(whole(sharded), whole(model))
        assert all(isinstance(p, DTensor) for p in sharded.parameters())
        if is_palette:
            assert_close(sharded(batch(0)[0]), before)
        assert len(sharded.blocks[0].a.weight.full_tensor().unique()) <= 16


def check_ranges_start_in_the_first_forward(mesh):
    """Of each layer once it is whole, from the batch of the first rank."""
    rank = mesh.get_rank()
    for options in ({}, {"observe": 2}, {"delay": 1}):
        for first in (True, False):
            model = net()
            owner = quantize(model, **options) if first else None
            by_blocks(model, mesh)
            owner = owner or quantize(model, **options)
            for step in range(4):
                loss_of(model, step, rank).backward()
                assert_equal_on_all_ranks(owner)
            assert owner.has_started() and all(q.is_started for q in owner.inputs.children())
            alone = net()
            other = quantize(alone, process_group=None, **options)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for step in range(4):
                    loss_of(alone, step, 0).backward()
            assert_close(flat(owner), flat(other))


def check_accumulation_without_sync(mesh):
    found = []
    for pieces in (1, 2):
        model, owner = made(quantize, mesh, by_blocks)
        optimizer = torch.optim.SGD([{"params": model.parameters()}, *owner.param_groups()], lr=0.05)
        for step in range(2):
            optimizer.zero_grad()
            x, y = batch(step, mesh.get_rank())
            for i, (part, target) in enumerate(zip(x.chunk(pieces), y.chunk(pieces), strict=True)):
                model.set_requires_gradient_sync(i == pieces - 1)
                with counted() as calls:
                    (nn.functional.cross_entropy(model(part), target) / pieces).backward()
                assert calls.count("all_reduce") == int(i == pieces - 1)
            optimizer.step()
        found.append((whole(model), owner.weights._modules["embed/weight"].step.detach()))
        assert_equal_on_all_ranks(owner)
    assert_close(found[0], found[1])


def check_hybrid_sharding(mesh):
    """Two groups: shards, and replicas of shards."""
    both = distributed.init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("replicate", "shard"))
    for attach in (palettize, quantize):
        model, owner = made(attach, mesh)
        train(model, owner)
        sharded, other = made(attach, both, by_blocks)
        train(sharded, other, mesh.get_rank())
        assert_close(whole(sharded), whole(model))
        assert_close(flat(other), flat(owner))
        assert_equal_on_all_ranks(other)
    model = by_blocks(net(), both)
    owner = quantize(model)
    loss_of(model, 0, mesh.get_rank()).backward()
    assert_equal_on_all_ranks(owner)


def check_mixed_precision(mesh):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for attach in (palettize, quantize):
        model = net(dtype=torch.float32)
        owner = attach(model)
        by_blocks(model, mesh, mp_policy=policy)
        optimizer = torch.optim.SGD([*model.parameters(), *owner.parameters()], lr=0.05)
        losses, kinds = [], set()
        model.blocks[0].a.register_forward_pre_hook(lambda m, _, kinds=kinds: kinds.add(m.weight.dtype))
        for _ in range(4):
            optimizer.zero_grad()
            losses.append(loss_of(model, 0, mesh.get_rank(), torch.float32))
            losses[-1].backward()
            optimizer.step()
            if attach is palettize:
                owner.step()
        assert kinds == {torch.bfloat16} and losses[-1] < losses[0]
        assert_equal_on_all_ranks(owner)
        assert all(t.dtype != torch.bfloat16 for t in owner.state_dict().values())


def check_calibrate(mesh):
    batches = [batch(i)[0] for i in range(2)]
    model, sharded = net(), by_blocks(net(), mesh)
    found = [calibrate(m, batches, 4, 8) for m in (model, sharded)]
    assert_close(flat(found[1]), flat(found[0]))
    model.eval(), sharded.eval()
    assert_close(sharded(batches[0]), model(batches[0]))


def check_a_forward_that_fails(mesh):
    for attach in (palettize, quantize):
        model, owner = made(attach, mesh, by_blocks)
        with pytest.raises(RuntimeError):
            model.blocks[0](torch.zeros(3, 5, dtype=torch.float64))
        assert not owner._entry and not owner._nested and not owner._placed
        assert all("weight" not in m.__dict__ for m in model.modules())


if __name__ == "__main__":
    ranks.main(globals())
