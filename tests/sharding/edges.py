"""Functions on DTensors at the edges: numbers that are not finite, gradients with placements of their own, weights of
FSDP with TP, splits of all kinds, what is refused, compiled regions, kmeans and assign."""

import re

import cases
import ranks
import torch
from sharding.laid import dtensor, full, layouts, like, local, same_on_all_ranks
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import r2kernels as r2

EXACT = 1e-12


def numbers(*shape, seed=0, dtype=torch.float64):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 10).to(dtype)


def tensors(dtype=torch.float64):
    return [
        numbers(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(9, 6), (1, 40), (16, 4, 3), (5,), (33, 8)])
    ]


def everything(ws, gs):
    """name -> (results like the weights, others): values and gradients of all that can be differentiated."""
    ws = [w.detach().requires_grad_() for w in ws]
    wide = torch.float64 if ws[0].dtype == torch.float64 else torch.float32

    def learned(*values):
        return [torch.full((len(ws),), value, dtype=wide, requires_grad=True) for value in values]

    cs = [torch.linspace(-0.2, 0.2, 4, dtype=wide).requires_grad_() for _ in ws]
    of_losses = {
        "l_inf": (r2.l_inf, []),
        "margin": (lambda ws, M: r2.margin(ws, M, k=0.1), learned(0.1)),
        "margin, number": (lambda ws: r2.margin(ws, 0.1), []),
        "soft_min_max": (r2.soft_min_max, learned(20.0)),
        "soft_min_max, negative": (r2.soft_min_max, learned(-20.0)),
        "soft_min_max, fixed": (lambda ws: r2.soft_min_max(ws, 3.0), []),
        "soft_extrema": (lambda ws, a: torch.stack(r2.soft_extrema(ws, a)), learned(20.0)),
        "kure": (r2.kure, []),
        "msqe": (lambda ws, s: r2.msqe(ws, s, 4), learned(0.05)),
        "bin_reg": (lambda ws: r2.bin_reg(ws, 0.05, 3), []),
        "partial_l2": (lambda ws: r2.partial_l2(ws, 0.4), []),
    }
    terms = {"soft_min_max": {"alpha": 5.0}, "kure": {}, "l_inf": {}, "margin": {"M": 0.1, "k": 0.1}}
    terms |= {"msqe": {"step": 0.05, "bits": 4}, "bin_reg": {"step": 0.05, "bits": 3}, "partial_l2": {"fraction": 0.3}}
    of_losses["weight_terms"] = (lambda ws: torch.stack([*r2.weight_terms(ws, terms).values()]), [])
    of_weights = {
        "lsq": (lambda ws, s: r2.lsq(ws, s, 4), learned(0.05)),
        "ewgs": (lambda ws, a, b: r2.ewgs(ws, a, b, 3, delta=0.1), learned(-0.2, 0.2)),
        "pact": (lambda ws, a: r2.pact(ws, a, 4), learned(0.15)),
        "dorefa": (lambda ws: r2.dorefa(ws, 3), []),
    }
    found = {}
    for name, (function, given) in of_losses.items():
        loss = function(ws, *given)
        grads = torch.autograd.grad(
            loss, [*ws, *given], torch.linspace(0.5, 2, loss.numel()).to(loss).reshape(loss.shape)
        )
        found[name] = list(grads[: len(ws)]), [loss.detach(), *grads[len(ws) :]]
    for name, (function, given) in of_weights.items():
        ys = function(ws, *given)
        grads = torch.autograd.grad(ys, [*ws, *given], gs)
        found[name] = [y.detach() for y in ys] + list(grads[: len(ws)]), list(grads[len(ws) :])
    hats, fresh = r2.dkm(ws, cs, 0.03, iterations=2)
    grads = torch.autograd.grad([*hats, *fresh], [*ws, *cs], [*gs, *[torch.ones_like(c) for c in cs]])
    found["dkm"] = [h.detach() for h in hats] + list(grads[: len(ws)]), [*fresh, *grads[len(ws) :]]
    return found


def same(found, expected, what, tolerance=EXACT):
    """To `tolerance` of the largest finite number, infinities and NaN where they are."""
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape and found.dtype == expected.dtype, what
    finite = expected.isfinite()
    assert torch.equal(found.isnan(), expected.isnan()), f"{what}: NaN at other places\n{found}\n{expected}"
    assert torch.equal(found[~finite].nan_to_num(), expected[~finite].nan_to_num()), f"{what}: other infinities"
    off, size = (found - expected)[finite].abs(), expected[finite].abs()
    assert not off.numel() or off.max() <= tolerance * size.max(), f"{what}: off by {off.max():.3g}"


def agree(ws, gs, at, tolerance=EXACT):
    whole = everything(ws, gs)
    laid, gs = ([dtensor(t, *at) for t in some] for some in (ws, gs))
    for name, (alike, others) in everything(laid, gs).items():
        for i, (made, expected) in enumerate(zip(full(alike), whole[name][0], strict=True)):
            like(alike[i], laid[i % len(laid)])
            same(made, expected, f"{name} {i} on {at[1]}", tolerance)
        for i, (made, expected) in enumerate(zip(others, whole[name][1], strict=True)):
            same(made, expected, f"{name}, parameter {i} on {at[1]}", tolerance)
        if others:
            same_on_all_ranks(*others)


def check_splits(mesh):
    """Of any number of shards, along any dimensions: the same results."""
    ws = tensors()
    for at in layouts(mesh):
        agree(ws, [numbers(*w.shape, seed=50 + i) for i, w in enumerate(ws)], at)


def check_numbers_that_are_not_finite(mesh):
    """In one shard alone; all ranks have what whole tensors have."""
    for special in cases.SPECIALS.values():
        ws = tensors()
        for w in ws:
            w.view(-1)[-len(special) :] = torch.tensor(special, dtype=w.dtype)
        agree(ws, [torch.ones_like(w) for w in ws], (mesh, [Shard(0)]))


def check_one_tensor(mesh):
    """0-dim losses and parameters."""
    w = numbers(7, 5)
    for make in (lambda t: t, lambda t: dtensor(t, mesh, [Shard(0)])):
        x, a = make(w).requires_grad_(), torch.tensor(3.0, dtype=w.dtype, requires_grad=True)
        loss = r2.soft_min_max(x, a) + r2.kure(x) + r2.margin(x, a / 100)
        loss.backward()
        assert loss.shape == () and a.grad.shape == () and not isinstance(loss, DTensor)
        if make(w) is w:
            expected = loss, a.grad, x.grad
        else:
            found = loss, a.grad, full([x.grad])[0]
    for made, e in zip(found, expected, strict=True):
        same(made, e, "one tensor")


def check_gradients_with_other_placements(mesh):
    """Incoming gradients are brought to the placements of the weights."""
    w, g = numbers(12, 8), numbers(12, 8, seed=1)
    x = dtensor(w, mesh, [Shard(0)]).requires_grad_()
    c = torch.linspace(-0.2, 0.2, 4, dtype=w.dtype)
    parts = DTensor.from_local(g / mesh.size(), mesh, [Partial()])
    for function in (lambda x: r2.lsq(x, 0.05, 4), lambda x: r2.dkm(x, c, 0.03)[0], lambda x: r2.dorefa(x, 3)):
        whole = w.clone().requires_grad_()
        function(whole).backward(g)
        for grad in (dtensor(g, mesh, [Shard(1)]), dtensor(g, mesh, [Replicate()]), parts):
            (made,) = torch.autograd.grad(function(x), x, grad)
            like(made, x)
            same(full([made])[0], whole.grad, f"gradients that are {grad.placements}")
        y = function(x).redistribute(placements=[Shard(1)])
        (y * dtensor(g, mesh, [Shard(1)])).sum().backward()
        like(x.grad, x)
        same(full([x.grad])[0], whole.grad, "results brought elsewhere")
        x.grad = None


class Feed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 22, dtype=torch.float64), nn.Linear(22, 10, dtype=torch.float64)

    def forward(self, x):
        return self.down(self.up(x).relu())


def check_weights_of_fsdp_and_tp(mesh):
    """TP, then FSDP over it, whose shards are strided."""
    grid = distributed.init_device_mesh("cpu", (mesh.size() // 2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = Feed()
    whole = [p.detach().clone() for p in model.parameters()]
    parallelize_module(model, grid["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=grid["dp"])
    laid = list(model.parameters())
    assert any(type(p).__name__ == "_StridedShard" for w in laid for p in w.placements)
    gs = [numbers(*w.shape, seed=70 + i) for i, w in enumerate(whole)]
    whole_results = everything(whole, gs)
    cut = [distribute_tensor(g, grid, [Replicate(), Replicate()], src_data_rank=None) for g in gs]
    for name, (alike, others) in everything(laid, cut).items():
        for i, (made, expected) in enumerate(zip(alike, whole_results[name][0], strict=True)):
            like(made, laid[i % len(laid)])
            same(made.full_tensor(), expected, f"{name} {i} on {made.placements}")
        for made, expected in zip(others, whole_results[name][1], strict=True):
            same(made, expected, name)
        if others:
            same_on_all_ranks(*others)
    c = torch.linspace(-0.2, 0.2, 4, dtype=torch.float64)
    for w, found, expected in zip(laid, r2.kmeans(laid, 4), r2.kmeans(whole, 4), strict=True):
        assert torch.equal(found, expected), w.placements
    assert r2.assign(laid, [c] * len(laid))[0].shape == (local(laid[0]).numel(),)


def check_micro_batches(mesh):
    """Sums of gradients over micro-batches, each cut over ranks: LSQ's scale counts the numbers of all shards."""
    batches = [numbers(mesh.size() * 3 - 1, 6, seed=i) for i in range(3)]
    w = numbers(10, 6, seed=9)

    def train(place):
        of_input, of_weight = (torch.tensor(s, dtype=w.dtype, requires_grad=True) for s in (0.05, 0.04))
        weight = place(w).requires_grad_()
        for x in batches:
            x = place(x)
            q, hat = r2.lsq(x, of_input, 4), r2.lsq(weight, of_weight, 3)
            torch.autograd.backward([q, hat], [place(torch.cos(batches[0])), place(torch.sin(w))])
        return of_input.grad, of_weight.grad, full([weight.grad])[0]

    expected = train(lambda t: t)
    for placement in (Shard(0), Shard(1)):
        found = train(lambda t, p=placement: dtensor(t, mesh, [p]))
        same_on_all_ranks(*found[:2])
        for made, e in zip(found, expected, strict=True):
            same(made, e, placement)


def check_kmeans_and_assign(mesh):
    ws = tensors(torch.float32)
    for at in layouts(mesh)[:6]:
        laid = [dtensor(w, *at) for w in ws]
        for options in ({}, {"preserve_zeros": True}):
            cs = r2.kmeans(laid, 3, **options)
            assert all(map(torch.equal, cs, r2.kmeans(ws, 3, **options))), at[1]
        for x, c, codes in zip(laid, cs, r2.assign(laid, cs), strict=True):
            assert torch.equal(codes, r2.assign(local(x), c) if local(x).numel() else codes[:0])
    rows = [dtensor(numbers(16, 8, dtype=torch.float32), mesh, [Shard(0)])]
    (found,), whole = (
        r2.kmeans(rows, 5, cluster_dim=2),
        r2.kmeans(numbers(16, 8, dtype=torch.float32), 5, cluster_dim=2),
    )
    assert torch.equal(found, whole)


def check_until_it_converges(mesh):
    """And zeros that stay."""
    ws = [w for w in tensors() if w.numel() > 30]
    cs = r2.kmeans(ws, 4)
    for options in ({"metric": "euclidean"}, {"metric": "sqeuclidean"}):
        for gradient in ("last", "implicit"):
            results = []
            for place in (lambda t: t, lambda t: dtensor(t, mesh, [Shard(0)])):
                xs = [place(w).requires_grad_() for w in ws]
                hats, fresh = r2.dkm(xs, cs, 0.004, iterations="converge", tol=1e-13, gradient=gradient, **options)
                grads = torch.autograd.grad(hats, xs, [place(torch.cos(w)) for w in ws])
                results.append([*full([h.detach() for h in hats]), *full(grads), *fresh])
            for found, expected in zip(results[1], results[0], strict=True):
                same(found, expected, (options, gradient), 1e-9)
            same_on_all_ranks(*fresh)
    with_zeros = [torch.where(w.abs() < 0.03, 0, w) for w in ws]
    cs = r2.kmeans(with_zeros, 4, preserve_zeros=True)
    laid = [dtensor(w, mesh, [Shard(0)]).requires_grad_() for w in with_zeros]
    hats, _ = r2.dkm(laid, cs, 0.02, preserve_zeros=True)
    whole, _ = r2.dkm(with_zeros, cs, 0.02, preserve_zeros=True)
    for hat, e, x in zip(full([h.detach() for h in hats]), whole, with_zeros, strict=True):
        same(hat, e, "preserve_zeros")
        assert (hat[x == 0] == 0).all()
    sum((h * h).sum().full_tensor() for h in hats).backward()
    assert all((full([w.grad])[0][x == 0] == 0).all() for w, x in zip(laid, with_zeros, strict=True))


def refused(error, pattern, call, *args, **options):
    try:
        call(*args, **options)
    except error as raised:
        assert re.search(pattern, str(raised)), raised
    else:
        raise AssertionError(f"no {error.__name__}: {pattern}")


def check_what_is_refused(mesh):
    part = DTensor.from_local(numbers(4, 4), mesh, [Partial()])
    refused(ValueError, r"^W has placements \(Partial.*redistribute", r2.l_inf, part)
    refused(ValueError, r"^W\[1\] has placements \(Partial", r2.soft_min_max, [numbers(4, 4), part], 1.0)
    refused(ValueError, r"^x has placements \(Partial", r2.lsq, part, 0.1, 4)
    rows = dtensor(numbers(mesh.size() * 3, 4), mesh, [Shard(0)])
    refused(ValueError, r"^W of shape .*cluster_dim=2.*two shards", r2.l_inf, rows, cluster_dim=2)
    c = numbers(4, 2)
    refused(ValueError, r"^W\[0\] of shape .*two shards", r2.dkm, [rows], [c], 0.1, cluster_dim=2)
    refused(ValueError, r"two shards", r2.kmeans, rows, 4, cluster_dim=2)
    flat = dtensor(numbers(mesh.size() * 3), mesh, [Shard(0)])
    refused(ValueError, r"two shards", r2.l_inf, flat, cluster_dim=2, layout="contiguous")
    step = dtensor(torch.full((1,), 0.1, dtype=torch.float64), mesh, [Replicate()])
    for axis in (None, 0):
        refused(TypeError, r"^step is a DTensor.*full_tensor", r2.lsq, rows, step, 4, axis=axis)
    refused(TypeError, r"^alpha is a DTensor", r2.soft_min_max, rows, step)
    refused(TypeError, r"^centroids is a DTensor", r2.dkm, rows, step, 0.1)
    refused(TypeError, r"^tau is a DTensor", r2.dkm, rows, c[:, 0], step)
    refused(RuntimeError, "second derivative", _twice, rows)


def _twice(w):
    w = w.detach().requires_grad_()
    (g,) = torch.autograd.grad(r2.soft_min_max(w, 1.0), w, create_graph=True)
    g.sum().full_tensor().backward()


def check_compiled_regions(mesh):
    """The graph breaks at a function on DTensors; where it must not, the error says why. Modes see nothing amiss."""
    w, c = numbers(16, 8), torch.linspace(-0.2, 0.2, 4, dtype=torch.float64)
    for function in (
        lambda w: r2.soft_min_max([w * 2], torch.tensor([3.0], dtype=w.dtype)).sum(),
        lambda w: r2.dkm(w * 2, c, 0.03)[0],
    ):
        results = []
        for run in (function, torch.compile(function, backend="eager")):
            x = dtensor(w, mesh, [Shard(0)]).requires_grad_()
            y = run(x)
            y.backward(torch.ones_like(y))
            results.append([local(y), local(x.grad)])
        assert all(map(torch.equal, *results))
        with CommDebugMode():
            assert torch.equal(local(function(x.detach())), results[0][0])
    whole = torch.compile(lambda w: r2.lsq(w, 0.05, 4), backend="eager", fullgraph=True)
    refused(Exception, "merged_over_ranks_outside_of_graphs", whole, x)


if __name__ == "__main__":
    ranks.main(globals())
