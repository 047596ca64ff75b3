"""What the tests over several ranks ask of the replicas of a model."""

import contextlib

import torch
from torch import distributed


def flat(*modules):
    return torch.cat([t.detach().reshape(-1).double() for m in modules for t in m.state_dict().values()])


def assert_equal_on_all_ranks(*modules):
    own = flat(*modules)
    everywhere = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everywhere, own)
    assert all(torch.equal(other, own) for other in everywhere)


@contextlib.contextmanager
def counted():
    """Counts the collectives that Python calls inside the block."""
    names = ("all_reduce", "all_gather", "broadcast", "all_gather_into_tensor", "all_gather_single")
    names, calls = (*names, "reduce_scatter_tensor"), []
    kept = {name: getattr(distributed, name) for name in names if hasattr(distributed, name)}

    def counting(name):
        def call(*args, **kwargs):
            calls.append(name)
            return kept[name](*args, **kwargs)

        return call

    for name in kept:
        setattr(distributed, name, counting(name))
    try:
        yield calls
    finally:
        for name in kept:
            setattr(distributed, name, kept[name])
