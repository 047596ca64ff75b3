"""What ranks tell each other: how many collectives, of how many bytes, whatever the size of the weights."""

import ranks
import torch
from sharding.laid import Messages, dtensor
from torch import distributed
from torch.distributed.tensor import Replicate, Shard
from torch.profiler import profile

import r2kernels as r2

L, K = 5, 6
NUMBER = 8  # bytes; all that is told is float64


def _learned(value):
    return lambda: [torch.full((L,), value, dtype=torch.float64, requires_grad=True)]


def _none():
    return []


def _dkm(T, **options):
    def call(ws, *cs):
        hats, fresh = r2.dkm(ws, list(cs), 0.3, iterations=T, **options)
        return [*hats, *fresh]

    return call


def _centroids(d=1):
    def make():
        shape = (K,) if d == 1 else (K, d)
        numbers = torch.linspace(-1, 1, K * d, dtype=torch.float64).reshape(shape)
        return [numbers.clone().requires_grad_() for _ in range(L)]

    return make


def _terms(ws, alpha):
    terms = {"soft_min_max": {"alpha": alpha}, "l_inf": {}, "margin": {"M": 0.1, "k": 0.01}, "kure": {}}
    return list(r2.weight_terms(ws, terms).values())


def _bounds():
    return [*_learned(-1.0)(), *_learned(1.0)()]


# name -> (call, makes its parameters, forward: numbers of each layer in each collective, backward: the same)
CALLS = {
    "l_inf": (r2.l_inf, _none, [2], []),
    "l_inf of rows": (lambda ws: r2.l_inf(ws, cluster_dim=2), _none, [4], []),
    "margin": (r2.margin, _learned(0.1), [2], []),
    "soft_min_max": (r2.soft_min_max, _learned(2.0), [8], []),
    "soft_extrema": (r2.soft_extrema, _learned(2.0), [8], []),
    "kure": (r2.kure, _none, [5], []),
    "msqe": (lambda ws, s: r2.msqe(ws, s, 4), _learned(0.1), [3], []),
    "bin_reg": (lambda ws: r2.bin_reg(ws, 0.1, 3), _none, [16], []),
    "partial_l2": (lambda ws: r2.partial_l2(ws, 0.4), _none, [256] * 8 + [3], []),  # a count of each digit
    "weight_terms": (_terms, _learned(2.0), [8 + 2 + 2 + 5], []),
    "lsq": (lambda ws, s: r2.lsq(ws, s, 4), _learned(0.1), [], [1]),
    "ewgs": (lambda ws, a, b: r2.ewgs(ws, a, b, 4), _bounds, [], [2]),
    "pact": (lambda ws, a: r2.pact(ws, a, 4), _learned(1.0), [], [1]),
    "dorefa": (lambda ws: r2.dorefa(ws, 4), _none, [2], [1]),
    "dorefa, detached": (lambda ws: r2.dorefa(ws, 4, detach_max=True), _none, [2], []),
    "dorefa, 1 bit": (lambda ws: r2.dorefa(ws, 1), _none, [2], []),
    "dkm": (_dkm(5), _centroids(), [4 * K] * 5, [K] * 6),
    "dkm, last": (_dkm(5, gradient="last"), _centroids(), [4 * K] * 5, [K]),
    "dkm, implicit": (_dkm(5, gradient="implicit"), _centroids(), [4 * K] * 5, [K, K, K * K]),
    "dkm, squares": (_dkm(5, metric="sqeuclidean"), _centroids(), [2 * K] * 5, [K] * 6),
    "dkm of rows": (_dkm(3, cluster_dim=2), _centroids(2), [3 * K] * 3, [2 * K] * 4),
}


def weights(size, *at):
    g = torch.Generator().manual_seed(0)
    return [dtensor(torch.randn(size, 4, generator=g, dtype=torch.float64), *at).requires_grad_() for _ in range(L)]


def told(call, make, ws):
    """(collectives, bytes) forward and backward."""
    forward, backward = Messages(), Messages()
    parameters = make()
    with forward.counted():
        outputs = call(ws, *parameters)
    outputs = [o for o in (outputs if isinstance(outputs, (list, tuple)) else [outputs]) if o.requires_grad]
    grads = [torch.ones_like(o) for o in outputs]
    with backward.counted():
        torch.autograd.grad(outputs, [*ws, *parameters], grads, allow_unused=True)
    return (forward.collectives, forward.bytes), (backward.collectives, backward.bytes)


def check_what_is_told(mesh):
    """One shard or many numbers: the same messages."""
    for size in (8, 8 * 64):
        ws = weights(size, mesh, [Shard(0)])
        for name, (call, make, *expected) in CALLS.items():
            found = told(call, make, ws)
            assert found == tuple([(len(e), sum(e) * L * NUMBER) for e in expected]), (name, size, found, expected)


def check_statistics(mesh):
    ws = weights(16, mesh, [Shard(0)])
    for call, collectives in (
        (r2.weight_stats, 1),
        (r2.functional.regularizers.sampled_std, 1),
        (lambda ws: r2.assign(ws, [c.detach() for c in _centroids()()]), 0),
    ):
        messages = Messages()
        with messages.counted():
            call(ws)
        assert messages.collectives == collectives and messages.bytes <= 8 * L * NUMBER * collectives, vars(messages)


def check_every_dimension_that_cuts(mesh):
    """One collective for each dimension of a mesh that shards, none for one that replicates, one for each group."""
    grid = distributed.init_device_mesh("cpu", (2, mesh.size() // 2))
    call, make, (numbers,), _ = CALLS["soft_min_max"]
    for placements, sizes in (
        ((Replicate(), Replicate()), []),
        ((Replicate(), Shard(0)), [1]),
        ((Shard(0), Replicate()), [1]),
        ((Shard(0), Shard(1)), [1, 2]),
        ((Shard(0), Shard(0)), [1, 2]),
    ):
        found, back = told(call, make, weights(8, grid, placements))
        assert found == (len(sizes), sum(sizes) * numbers * L * NUMBER) and back == (0, 0), (placements, found)
    mixed = [*weights(8, mesh, [Shard(0)])[:2], *weights(8, grid, (Shard(0), Shard(1)))[:1]]
    mixed += [w.detach().clone().requires_grad_() for w in (torch.ones(3, 4, dtype=torch.float64),) * 2]
    assert told(call, make, mixed) == ((3, (2 + 1 + 2) * numbers * NUMBER), (0, 0))


def check_nothing_is_told_besides(mesh):
    """The counter sees what the profiler sees."""
    ws = weights(16, mesh, [Shard(0)])
    for name in ("soft_min_max", "lsq", "dkm"):
        call, make, *expected = CALLS[name]
        with profile() as seen:
            found = told(call, make, ws)
        events = [e.name for e in seen.events() if e.name.startswith(("c10d::", "_c10d_functional::"))]
        assert len(events) == sum(map(len, expected)) == sum(f[0] for f in found), (name, events)


if __name__ == "__main__":
    ranks.main(globals())
