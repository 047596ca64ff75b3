"""Run by test_dcp.py in several ranks: checkpoints of torch.distributed.checkpoint, written and read by other ranks.

Arguments: the folder of results, that of the checkpoints, and how many ranks wrote those to be read.
"""

import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

sys.path.insert(0, str(Path(__file__).parents[1]))

import ranks
from nn.replicas import assert_equal_on_all_ranks, flat
from nn.shards import by_blocks, net, whole

from r2kernels import Palettizer, Quantizer, RangeRegularizer

SAVED, WORLDS = Path(sys.argv[2]), sys.argv[3:]
BATCH = 12


def palettize(model):
    return Palettizer(model, 2)


def quantize(model):
    return Quantizer(model, "lsq", 4, 4)


def regularize(model):
    return RangeRegularizer(model, alpha=2.0)


def batch(step):
    g = torch.Generator().manual_seed(step)
    x, y = torch.randn(BATCH, 8, generator=g, dtype=torch.float64), torch.randint(2, (BATCH,), generator=g)
    part, rank = BATCH // distributed.get_world_size(), distributed.get_rank()
    return x[rank * part : (rank + 1) * part], y[rank * part : (rank + 1) * part]


class Run:
    """A training that is saved and resumed as a whole."""

    def __init__(self, attach, mesh, sharded=True):
        self.model = net()
        self.owner = attach(self.model)
        self.run = by_blocks(self.model, mesh) if sharded else nn.parallel.DistributedDataParallel(self.model)
        learned = self.owner.param_groups() if hasattr(self.owner, "param_groups") else []
        self.optimizer = torch.optim.AdamW([{"params": self.model.parameters()}, *learned], lr=1e-2, eps=1e-3)
        self.everything = nn.ModuleDict({"model": self.model, "r2": self.owner})

    def steps(self, first, last):
        for step in range(first, last):
            self.optimizer.zero_grad()
            x, y = batch(step)
            nn.functional.cross_entropy(self.run(x), y).backward()
            if isinstance(self.owner, RangeRegularizer):
                self.owner.accumulate_grad_()
            self.optimizer.step()
            if isinstance(self.owner, Palettizer):
                self.owner.step()
        return self

    def state(self):
        model, optimizer = get_state_dict(self.everything, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, path):
        checkpoint.save(self.state(), checkpoint_id=path)
        return self

    def load(self, path):
        state = self.state()
        checkpoint.load(state, checkpoint_id=path)
        set_state_dict(
            self.everything, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        return self

    def values(self):
        return whole(self.model), flat(self.owner)


def saved(attach, world):
    return SAVED / f"{attach.__name__}-{world}"


def check_resume_with_the_same_ranks(mesh):
    for attach, sharded in ((palettize, True), (quantize, True), (quantize, False), (regularize, False)):
        path = saved(attach, f"{mesh.size()}{'' if sharded else '-ddp'}-again")
        run = Run(attach, mesh, sharded).steps(0, 3).save(path).steps(3, 6)
        again = Run(attach, mesh, sharded).load(path).steps(3, 6)
        for a, b in zip(run.values(), again.values(), strict=True):
            assert torch.equal(a, b)
        moments = [[s["exp_avg"] for s in r.optimizer.state.values()] for r in (run, again)]
        assert len(moments[0]) == len(moments[1]) > 0
        assert_equal_on_all_ranks(again.owner)


def check_save(mesh):
    """And what the training went on to, for the readers."""
    for attach in (palettize, quantize):
        run = Run(attach, mesh).steps(0, 3).save(saved(attach, mesh.size()))
        now, later = run.values(), run.steps(3, 6).values()
        if mesh.get_rank() == 0:
            torch.save((now, later), f"{saved(attach, mesh.size())}.pt")


def check_other_numbers_of_ranks(mesh):
    for world in WORLDS:
        for attach in (palettize, quantize):
            now, later = torch.load(f"{saved(attach, world)}.pt")
            run = Run(attach, mesh).load(saved(attach, world))
            for a, b in zip(run.values(), now, strict=True):
                assert torch.equal(a, b)
            for a, b in zip(run.steps(3, 6).values(), later, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            assert_equal_on_all_ranks(run.owner)


if __name__ == "__main__":
    ranks.main(globals())
