"""Every function on DTensors is the function on whole tensors: values, gradients of weights and of what is learned.

A case is run in all layouts by all ranks; then every rank judges some of the cases, by budget.py, and in float64 to
1e-12 of the natural scales, also against the same function on whole tensors.
"""

from collections.abc import Callable
from typing import NamedTuple

import budget
import cases
import ranks
import torch
from dkm import problems
from quantizers import calls
from sharding.laid import Laid, full, laid_as, layouts, like, local, same_on_all_ranks

import r2kernels as r2
from r2kernels import reference
from r2kernels.functional.regularizers import sampled_std
from r2kernels.reference.columns import accumulator

EXACT = 1e-12
SEEDS = {torch.float64: 1, torch.float32: 3, torch.bfloat16: 3, torch.float16: 3}  # lists of 20 tensors: 60 draws
INPUTS = [
    "one element",
    "two elements",
    "below a vector",
    "ties",
    "far from zero",
    "constant",
    "zero",
    "transposed",
    "channels last",
    "every second",
    "mixed list",
]
ROWS = [(1, 40), (3, 9), (5, 1)]  # fewer than ranks
# rows of these lie on one shard however they are cut, and of the last, whose last row is not full, along dimension 0
OF_COLUMNS = [(32, 16), (16, 2, 2, 16), (64, 32)]
WITH_LEFTOVERS = [(31,), (63,)]


class Case(NamedTuple):
    """`run(draw, laid)` gives quantities; `judge(draw)` their true values and natural scales."""

    name: str
    draws: list
    run: Callable
    judge: Callable


def hold(mesh, every):
    """Runs the cases in all layouts, then judges some of them."""
    laid, found = Laid(layouts(mesh)), []
    for case in every:
        results = []
        for draw in case.draws:
            with laid.chosen():
                results.append(case.run(draw, laid))
        found.append(results)
    failures = []
    for case, results in list(zip(every, found, strict=True))[mesh.get_rank() :: mesh.size()]:
        for dtype in SEEDS:
            pairs = [(d, r) for d, r in zip(case.draws, results, strict=True) if d.dtype == dtype]
            lines = (_inexact if dtype == torch.float64 else _over_budget)(case, pairs)
            failures += [f"{case.name}, {dtype}: {line}" for line in lines]
    assert not failures, "\n" + "\n".join(failures)


def _over_budget(case, pairs):
    own, pool = budget.Pool(), budget.Pool()
    for draw, found in pairs:
        exact, scale = case.judge(draw)
        with r2.use_backend("reference"):
            own.add(budget.errors(case.run(draw, Laid([])), exact, scale))
        pool.add(budget.errors(found, exact, scale))
    return budget.exceeded(own, {"sharded": pool}, draw.dtype).splitlines() if pairs else []


def _inexact(case, pairs):
    lines = []
    for i, (draw, found) in enumerate(pairs):
        exact, scale = case.judge(draw)
        for what, expected in (("the reference", exact), ("whole tensors", case.run(draw, Laid([])))):
            expected = {name: getattr(expected, "quantities", expected)[name] for name in _quantities(exact)}
            for quantity, error in budget.errors(found, expected, scale).items():
                if not error.max() <= EXACT:
                    lines.append(f"draw {i}: {quantity} is {error.max():.3g} from that of {what}")
    return lines


def _quantities(result):
    return getattr(result, "quantities", result)


def tensors(dtype, seed):
    g = torch.Generator().manual_seed(seed + 500)
    ws = [w for name in INPUTS for w in cases.make(name, dtype, seed=seed)]
    return ws + [(torch.randn(s, generator=g, dtype=torch.float64) * cases.SCALE).to(dtype) for s in ROWS]


def shaped(shapes, dtype, seed):
    g = torch.Generator().manual_seed(seed + 600)
    return [(torch.randn(s, generator=g, dtype=torch.float64) * cases.SCALE).to(dtype) for s in shapes]


def evaluate(draw, laid):
    """`budget.evaluate` of weights that are laid out."""
    ws = laid.of(draw.weights)
    result = budget.evaluate(draw._replace(weights=ws))
    for made, w in zip(result.weights, ws, strict=True):
        like(made, w)
    if laid.current:
        same_on_all_ranks(result.loss, *([] if result.parameter is None else [result.parameter]))
    return result._replace(weights=full(result.weights))


def losses(op, dtypes, make=tensors, geometry=(1, "output")):
    """Draws of lists, and of a tensor alone."""
    found = []
    for dtype in dtypes:
        for seed in range(SEEDS[dtype]):
            g = torch.Generator().manual_seed(seed + 1000)
            bits = 1 + (3 * seed + 1) % 8
            ws = make(dtype, seed)
            found.append(budget.with_weights(op, ws, g, geometry, bits=bits))
            alone = ws[(5 * seed + 3) % len(ws)]
            found.append(budget.with_weights(op, [alone], g, geometry, single=True, bits=bits))
    return found


def _loss_cases(family):
    """Of one op for each function in all dtypes, of the others in float32 and float64."""
    for op in cases.of(family):
        dtypes = SEEDS if op in cases.ONE_EACH else [torch.float64, torch.float32]
        yield Case(op.label, losses(op, dtypes), evaluate, budget.truth)


def check_range_losses(mesh):
    hold(mesh, list(_loss_cases("range_losses")))


def check_regularizers(mesh):
    hold(mesh, list(_loss_cases("regularizers")))


def check_rows_of_columns(mesh):
    def of(shapes):
        return lambda dtype, seed: shaped(shapes, dtype, seed)

    ops = [op for op in cases.ONE_EACH if op.columns]
    dtypes = [torch.float64, torch.float32, torch.bfloat16]
    every = [
        Case(f"{op.label}, {d} of {layout}", losses(op, dtypes, of(OF_COLUMNS), (d, layout)), evaluate, budget.truth)
        for op in ops
        for d, layout in ((2, "output"), (4, "output"), (2, "contiguous"), (4, "contiguous"))
    ]
    every += [
        Case(
            f"{op.label}, leftovers", losses(op, dtypes[:1], of(WITH_LEFTOVERS), (2, "output")), evaluate, budget.truth
        )
        for op in ops
    ]
    hold(mesh, every)


def quantize(one, laid):
    """Gradients by the public function; what is quantized has the bits of whole tensors."""
    xs, ps = [x.requires_grad_() for x in laid.of([x.detach() for x in one.xs])], one.parameters
    sizes = [1 if one.axis is None else x.shape[one.axis] for x in xs]
    ps = [[part[0] if one.axis is None else part for part in p.detach().split(sizes)] for p in ps]
    ps = [[p.clone().requires_grad_() for p in some] for some in ps]
    ys = quantized(one, xs, ps)
    learned = [some for some, wanted in zip(ps, LEARNED[one.op], strict=True) if wanted]
    grads = torch.autograd.grad(ys, [*xs, *[p for some in learned for p in some]], laid.of(one.gs))
    of_xs, of_parameters = grads[: len(xs)], grads[len(xs) :]
    if laid.current:
        for made, y, x, whole in zip(of_xs, ys, xs, quantized(one, one.xs, ps), strict=True):
            like(made, x)
            like(y.detach(), x)
            assert one.op == "dorefa" or torch.equal(local(y), local(laid_as(whole, x)))
        if of_parameters:
            same_on_all_ranks(*of_parameters)
    of_parameters = [g.reshape(-1) for g in of_parameters]
    per = len(of_parameters) // max(len(learned), 1)
    return calls.quantities(
        full(list(of_xs)), [torch.cat(of_parameters[i * per : (i + 1) * per]) for i in range(len(learned))]
    )


def check_statistics(mesh):
    """weight_stats, as regularizers/test_weight_stats.py judges it, and the std of the same sample."""
    laid = Laid(layouts(mesh))
    for dtype in SEEDS:
        own, pool, wide = budget.Pool(), budget.Pool(), dtype == torch.float64
        for seed in range(3):
            ws = [*tensors(dtype, seed), *shaped([(130, 300)], dtype, seed)]
            exact = reference.weight_stats_fwd([w.double() for w in ws])[:, :6]
            scale = torch.where(torch.arange(6) == 2, exact[:, 5:], exact.abs())
            with laid.chosen():
                placed = laid.of(ws)
                stats, sampled = r2.weight_stats(placed), sampled_std(placed)
            same_on_all_ranks(*stats[:6], sampled)
            assert stats.numel == tuple([w.numel() for w in ws])
            rows = torch.stack(stats[:6], 1).double()
            assert torch.equal(rows[:, [0, 1, 5]], exact[:, [0, 1, 5]]), "these are exact"
            errors = budget.relative((rows - exact).abs(), scale)
            std = reference.sampled_std_fwd([w.double() for w in ws])
            of_sample = budget.relative((sampled.double() - std).abs(), std)
            if wide:
                assert errors.max() <= EXACT and of_sample.max() <= EXACT, (errors, of_sample)
                continue
            rounded = reference.weight_stats_fwd(ws)[:, :6].double()
            fields = r2.WeightStats._fields
            own.add(dict(zip(fields, budget.relative((rounded - exact).abs(), scale).unbind(1), strict=False)))
            own.add({"sampled": budget.relative((reference.sampled_std_fwd(ws).double() - std).abs(), std)})
            pool.add({**dict(zip(fields, errors.unbind(1), strict=False)), "sampled": of_sample})
        failures = "" if wide else budget.exceeded(own, {"sharded": pool}, accumulator(dtype))
        assert not failures, "\n" + failures


LEARNED = {"lsq": [True], "ewgs": [True, True, False], "pact": [True], "dorefa": []}


def quantized(one, xs, ps):
    if one.op == "lsq":
        return r2.lsq(xs, ps[0], one.bits, signed=one.flag, axis=one.axis, levels=one.levels)
    if one.op == "ewgs":
        return r2.ewgs(xs, ps[0], ps[1], one.bits, delta=torch.stack(ps[2]).detach(), signed=one.flag)
    if one.op == "pact":
        return r2.pact(xs, ps[0], one.bits, plus=one.flag)
    return r2.dorefa(xs, one.bits, detach_max=one.flag)


def _quantizer_case(op, axis=None, kind="lsq"):
    draws = []
    for dtype, seeds in SEEDS.items():
        for seed in range(seeds):
            xs = [x for x in tensors(dtype, seed) if axis is None or x.dim() > max(axis, 1)]
            bits = {"ternary": 2, "seq": 3}.get(kind, 1 + (3 * seed + 1) % 8)
            draws.append(calls.call(op, xs, bits, seed % 2 == 0 or kind != "lsq", axis, seed, cases.SCALE, kind))
    return Case(
        f"{op} {axis} {kind}", [d._replace(parameters=d.parameters * (op != "dorefa")) for d in draws], quantize, _judge
    )


def _judge(one):
    if one.op == "dorefa":
        one = one._replace(parameters=[calls.dorefa_scale(one.xs, one.bits)])
    return calls.truth(one)


def check_quantizers(mesh):
    every = [_quantizer_case(op) for op in ("lsq", "ewgs", "pact", "dorefa")]
    every += [_quantizer_case("lsq", kind=kind) for kind in ("ternary", "seq")]
    hold(mesh, every)


def check_channels(mesh):
    """A step for each channel, along the dimension that is cut and along another."""
    rows = []
    for axis in (0, 1, -1):
        for seed in range(2):
            xs = [x for x in tensors(torch.float64, seed) if x.dim() > 1]
            one = calls.call("lsq", xs, 3, True, axis, seed, cases.SCALE)
            rows.append((one, quantize(one, Laid([]))))
    laid = Laid(layouts(mesh))
    for one, whole in rows:
        for _ in range(3):
            with laid.chosen():
                found = quantize(one, laid)
            sizes = whole["dparameter 0"].abs().max()
            assert all(map(torch.equal, found["dW"], whole["dW"]))
            assert (found["dparameter 0"] - whole["dparameter 0"]).abs().max() <= EXACT * sizes


def cluster(gradient):
    def run(problem, laid):
        """quantity -> tensors, by the public function."""
        ws = [w.detach().requires_grad_() for w in laid.of(problem.ws)]
        cs = [(c[:, 0] if problem.d == 1 else c).detach().clone().requires_grad_() for c in problem.c]
        hats, fresh = r2.dkm(
            ws,
            cs,
            problem.tau,
            iterations=3,
            metric=problem.metric,
            gradient=gradient,
            cluster_dim=problem.d,
            layout=problem.layout,
        )
        inputs = [*ws, *(cs if gradient == "unrolled" else [])]
        gc = [g[:, 0] if problem.d == 1 else g for g in problem.gc]
        grads = torch.autograd.grad([*hats, *fresh], inputs, [*laid.of(problem.gs), *gc])
        for hat, dw, w in zip(hats, grads, ws, strict=False):
            like(hat.detach(), w)
            like(dw, w)
        own = list(grads[len(ws) :])
        if laid.current:
            same_on_all_ranks(*fresh, *own)
        k = [(-1, problem.d)] * len(ws)
        found = {
            "W_hat": [h.detach() for h in full(list(hats))],
            "centroids": [f.detach().reshape(s) for f, s in zip(fresh, k, strict=True)],
            "dW": full(list(grads[: len(ws)])),
        }
        return {**found, "dC_0": [g.reshape(s) for g, s in zip(own, k, strict=True)]} if own else found

    return run


def _dkm_case(metric, d, layout, gradient, dtypes):
    draws = []
    for dtype in dtypes:
        for seed in range(SEEDS[dtype]):
            for sharpness in (1, 0.1) if gradient == "unrolled" else (0.3,):
                ws = tensors(dtype, seed) if d == 1 else shaped(OF_COLUMNS * 3, dtype, seed)
                ws = [w for w in ws if w.numel() < 5000 and w.unique().numel() > 15]  # else centroids meet weights
                draws.append(problems.draw(ws, 5, sharpness, metric, d, layout, seed))
    return Case(
        f"dkm {metric}, {d} of {layout}, {gradient}", draws, cluster(gradient), lambda p: problems.truth(p, gradient)
    )


def check_dkm(mesh):
    every = [_dkm_case(metric, 1, "output", "unrolled", SEEDS) for metric in problems.UNITS]
    every += [
        _dkm_case(metric, 1, "output", gradient, (torch.float64, torch.float32))
        for metric in problems.UNITS
        for gradient in ("last", "implicit")
    ]
    hold(mesh, every)


def check_dkm_of_rows(mesh):
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    hold(
        mesh,
        [
            _dkm_case(metric, d, layout, "unrolled", dtypes)
            for metric, d, layout in (
                ("euclidean", 2, "output"),
                ("sqeuclidean", 4, "output"),
                ("sqeuclidean", 2, "contiguous"),
                ("euclidean", 4, "contiguous"),
            )
        ],
    )


if __name__ == "__main__":
    ranks.main(globals())
