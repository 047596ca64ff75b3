"""Problems of every family that begin at an odd element or an even one, made on the CPU and brought to the device."""

import functools
import itertools

import budget
import cases
import torch
from dkm import problems
from quantizers import calls
from torch.testing import assert_close

import r2kernels
from r2kernels import reference, use_backend

SIZES = (1, 7, 33, 4095, 4097, 12289, 11507)
GEOMETRIES = ((1, "output"), (1, "output"), (4, "output"), (3, "contiguous"))
ROWS = ((2, "euclidean", 16), (4, "sqeuclidean", 16), (4, "sqeuclidean", 256), (3, "euclidean", 340))


def placed(sizes, dtype, offset, seed, scale=cases.SCALE):
    """Normal numbers that begin `offset` elements behind the beginning of their memory."""
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n + offset, generator=g, dtype=torch.float64) * scale).to(dtype)[offset:] for n in sizes]


def moved(found, device):
    """The same tensors on another device, with strides and offset; in tuples, lists and dicts."""
    if isinstance(found, torch.Tensor):
        return cases.like(found.detach(), found.dtype, device)
    if isinstance(found, dict):
        return {name: moved(value, device) for name, value in found.items()}
    if isinstance(found, (tuple, list)):
        several = [moved(value, device) for value in found]
        return type(found)(*several) if hasattr(found, "_fields") else type(found)(several)
    return found


def flat(found):
    """All tensors of a structure."""
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, dict):
        found = found.values()
    return [t for value in found for t in flat(value)] if isinstance(found, (tuple, list, type({}.values()))) else []


def same(a, b):
    """The same numbers, NaN where NaN is."""
    return all(
        x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())
        for x, y in zip(flat(a), flat(b), strict=True)
    )


def tensors_of(draw):
    return next(getattr(draw, name) for name in ("weights", "xs", "ws") if hasattr(draw, name))


def losses(family, dtype, offset, clusters):
    for op in cases.of(family):
        yield op.label, functools.partial(draws_of_loss, op, dtype, offset), budget.evaluate, budget.truth


def draws_of_loss(op, dtype, offset):
    """Enough to pool over: six lists and ten single tensors, of several geometries where the op has them."""
    found = []
    for seed in range(16):
        single = seed % 3 == 1 or seed > 12
        d, layout = GEOMETRIES[seed % 4] if op.columns else (1, "output")
        sizes = (SIZES[3:][seed % 4],) if single else [n for n in SIZES if n >= d]
        g = torch.Generator().manual_seed(seed + 1000)
        ws = placed(sizes, dtype, offset, seed)
        found.append(budget.with_weights(op, ws, g, (d, layout), single, bits=1 + seed % 8))
    return found


def quantizers(dtype, offset, clusters):
    for op in cases.of("quantizers"):
        yield op.label, functools.partial(draws_of_quantizer, op.function, dtype, offset), calls.gradients, calls.truth


def draws_of_quantizer(op, dtype, offset):
    return [
        calls.call(op, placed(SIZES if seed % 2 else SIZES[5:6], dtype, offset, seed, 1.0), 1 + seed % 8, seed % 4 < 2)
        for seed in range(16)
    ]


def dkm(dtype, offset, clusters):
    for k in clusters:
        for metric in ("euclidean", "sqeuclidean") if k <= 64 else ("euclidean",):
            yield f"dkm, K = {k}, {metric}", functools.partial(draws_of_dkm, dtype, offset, k, metric), *solving()
    for d, metric, k in ROWS:
        label = f"dkm, rows of {d}, K = {k}, {metric}"
        yield label, functools.partial(draws_of_dkm, dtype, offset, k, metric, d), *solving()
    for gradient in ("last", "implicit"):
        draws = functools.partial(draws_of_dkm, dtype, offset, 5, "euclidean")
        yield f"dkm, gradient {gradient}", draws, *solving(gradient)


def solving(gradient="unrolled"):
    return (functools.partial(f, gradient=gradient) for f in (problems.solve, problems.truth))


def draws_of_dkm(dtype, offset, k, metric, d=1):
    sizes = (4097, 12289, 9001) if k < 256 else (4097, 6007)
    sharpness = (0.3, 0.1, 0.03) if k < 256 else (0.03,)
    return [
        problems.draw(placed(some, dtype, offset, seed), k, sharp, metric, d, seed=seed)
        for seed, (sharp, some) in enumerate(itertools.product(sharpness, (sizes, sizes[1:2])))
    ]


PROBLEMS = {
    "range_losses": functools.partial(losses, "range_losses"),
    "regularizers": functools.partial(losses, "regularizers"),
    "quantizers": quantizers,
    "dkm": dkm,
}


def on_the_cpu(run, *arguments):
    with use_backend("reference"):
        return run(*arguments)


def bits_of_quantizers(dtype, offset, device):
    """Forward all but dorefa, whose tanh is its own, and backward lsq and pact give the reference's bits."""
    for op, bits, kind in (
        *itertools.product(("lsq", "ewgs", "pact", "dorefa"), (1, 2, 4, 8), ("lsq",)),
        ("lsq", 2, "ternary"),
        ("lsq", 4, "seq"),
    ):
        for axis in (None, 0) if op == "lsq" else (None,):
            xs = placed(SIZES, dtype, offset, bits, 1.0)
            xs = [x.reshape(-1, 1) for x in xs[:3]] if axis == 0 else xs
            one = calls.call(op, xs, bits, True, axis, kind=kind)
            exact, there = on_the_cpu(lambda one=one: (one.forward(), one.backward()[0])), moved(one, device)
            for name, found, expected in zip(
                ("forward", "backward"), (there.forward(), there.backward()[0]), exact, strict=True
            ):
                off = sum((a.cpu() != e).sum().item() for a, e in zip(found, expected, strict=True))
                most = 0 if op in ("lsq", "pact") or (op == "ewgs" and name == "forward") else sum(SIZES)
                most = sum(SIZES) // 1000 if op == "dorefa" and name == "forward" else most
                assert off <= most, f"{off} numbers of {op} {name}, {bits} bits, {kind}, axis {axis} differ"


def statistics(dtype, offset, device):
    ws = placed(SIZES, dtype, offset, 3)
    exact = on_the_cpu(r2kernels.weight_stats, [w.double() for w in ws])
    found = r2kernels.weight_stats(moved(ws, device))
    eps = torch.finfo(found.std.dtype).eps
    for name in ("min", "max", "mean", "std", "kurtosis", "abs_max"):
        a, b = getattr(found, name).cpu().double(), getattr(exact, name)
        assert_close(a, b, rtol=100 * eps, atol=100 * eps * cases.SCALE, msg=lambda text, name=name: f"{name}: {text}")


def terms(dtype, offset, device):
    """All at once as each alone in float64: to two ulp of the gradient's RMS."""
    given = {
        "soft_min_max": {"alpha": 2.0},
        "kure": {},
        "msqe": {"step": 0.02, "bits": 4},
        "bin_reg": {"step": 0.02, "bits": 4},
        "margin": {"M": 0.1, "k": 0.01},
        "l_inf": {},
        "partial_l2": {"fraction": 0.5},
    }

    def run(ws):
        ws = [w.detach().requires_grad_() for w in ws]
        found = r2kernels.weight_terms(ws, given)
        return found, torch.autograd.grad(sum(loss.sum() for loss in found.values()), ws)

    ws = placed(SIZES[3:], dtype, offset, 5)
    losses, gradients = on_the_cpu(run, [w.double() for w in ws])
    there, of_ws = moved(run(moved(ws, device)), "cpu")
    rounding = 100 * torch.finfo(there["kure"].dtype).eps
    for name, loss in losses.items():
        assert_close(
            there[name].double(), loss.detach(), rtol=rounding, atol=rounding, msg=lambda t, n=name: f"{n}: {t}"
        )
    for a, e in zip(of_ws, gradients, strict=True):
        error = budget.rms(a.double() - e) / budget.rms(e)
        assert error <= 2 * torch.finfo(dtype).eps + rounding, f"dL/dW errs by {error:.3g} of its RMS"


def codes(dtype, offset, device):
    """Of the nearest centroid, or of one that is as near in this precision."""
    for k, d in ((2, 1), (16, 1), (256, 1), (650, 1), (16, 2), (256, 4)):
        ws, c = placed(SIZES[3:], dtype, offset, k), problems.start(k, d) * cases.SCALE
        c = c.to(reference.columns(ws[0]).dtype if dtype == torch.float64 else torch.float32)
        found = r2kernels.assign(moved(ws, device), [c.to(device)] * len(ws), cluster_dim=d)
        for w, code in zip(ws, found, strict=True):
            rows, wide = reference.columns(w.double(), d).t(), c.double().reshape(k, d)
            distance = torch.cdist(rows, wide)
            own = distance.gather(1, code.cpu().long()[:, None])[:, 0]
            slack = 8 * torch.finfo(c.dtype).eps * rows.abs().max()
            assert (own <= distance.amin(1) + slack).all(), f"a code of K = {k}, d = {d} is not the nearest centroid's"


def inertia_of_kmeans(dtype, offset, device):
    for k, d in ((4, 1), (16, 1), (16, 2)):
        w = placed((12289,), dtype, offset, k)[0]
        spread = []
        for c in (
            r2kernels.kmeans(moved(w, device), k, cluster_dim=d),
            on_the_cpu(lambda k=k, d=d, w=w: r2kernels.kmeans(w, k, cluster_dim=d)),
        ):
            rows = reference.columns(w.double(), d).t()
            spread.append(torch.cdist(rows, c.cpu().double().reshape(k, d)).amin(1).square().sum())
        assert spread[0] <= 1.001 * spread[1], f"K = {k}, d = {d}: inertia {spread[0]}, of the CPU {spread[1]}"


def shards_of_one_rank(dtype, offset, device):
    """DTensors on a mesh of one rank, whose states are gathered and merged: as plain tensors."""
    from torch import distributed
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    kind = torch.device(device).type
    if not distributed.is_initialized():
        backend = "nccl" if kind == "cuda" else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(kind, (1,))
    plain = moved(placed(SIZES[3:], dtype, offset, 7), device)
    shards = [distribute_tensor(w, mesh, [Shard(0)]) for w in plain]
    starts = r2kernels.kmeans(plain, 4)
    assert all(torch.equal(a, b) for a, b in zip(r2kernels.kmeans(shards, 4), starts, strict=True)), "kmeans differs"
    calls = {
        "l_inf": r2kernels.l_inf,
        "soft_min_max": lambda ws: r2kernels.soft_min_max(ws, 2.0),
        "kure": r2kernels.kure,
        "partial_l2": lambda ws: r2kernels.partial_l2(ws, 0.5),
        "lsq": lambda ws: r2kernels.lsq(ws, 0.02, 4)[0],
        "dkm": lambda ws: r2kernels.dkm(ws, starts, 0.01)[0][0],
    }
    for name, call in calls.items():
        results = []
        for ws in (plain, shards):
            ws = [w.detach().requires_grad_() for w in ws]
            found = call(ws)
            gradients = torch.autograd.grad(found.sum(), ws[:1])
            results.append([getattr(t, "_local_tensor", t).detach().cpu().double() for t in (found, *gradients)])
        for a, e in zip(*results, strict=True):
            error = budget.rms(a - e) / budget.rms(e).clamp(min=1e-30)
            assert error <= 100 * torch.finfo(dtype).eps, f"{name} of shards differs by {error:.3g} of its RMS"


OTHERS = {
    "bits of quantizers": bits_of_quantizers,
    "weight_stats": statistics,
    "weight_terms": terms,
    "assign": codes,
    "kmeans": inertia_of_kmeans,
    "DTensors": shards_of_one_rank,
}
