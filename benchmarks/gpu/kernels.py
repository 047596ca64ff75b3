"""Device time of the kernels of every op beside a copy and a read of the same weights, measured in the same rounds.

Bytes are those of the passes that the algorithm makes over the weights: GB/s says how near a call comes to them, also
where a kernel moves less (16-bit DKM works on the values that occur). Nothing is timed whose numbers are wrong.
"""

import functools
import statistics

from .child import Case
from .processes import child

WORKERS = 1
NUMBERS = {"11.7M": 11_678_912, "256M": 2**28}
REHEARSED = {"11.7M": 20_011, "256M": 70_001}
L2_SETS, MOST_SETS = 2.5, 24  # inputs rotate among sets of so many times the L2 cache
SIGMA = 0.05
ITERATIONS = 1, 5
KINDS = ("range", "quantizers", "dkm16", "dkm256", "dkm4", "dkm64")
SECONDS = 90  # of each with a dtype and a backend
# op -> times that the weights or gradients are read, written; forward, then backward
PASSES = {
    "l_inf": ((1, 0), (1, 1)),
    "margin": ((1, 0), (1, 1)),
    "soft_min_max": ((1, 0), (1, 1)),
    "soft_min_max, alpha learned": ((1, 0), (1, 1)),
    "kure": ((1, 0), (1, 1)),
    "msqe": ((1, 0), (1, 1)),
    "lsq": ((1, 1), (2, 1)),
    "ewgs": ((1, 1), (2, 1)),
    "pact": ((1, 1), (2, 1)),
}
# (op, of what, at least): shares of the bandwidth of a read or copy
TARGETS = (("soft_min_max forward", 0.85), ("soft_min_max backward", 0.85), ("lsq", 0.8))
LIST_TARGET = 60  # microseconds, ResNet-18's list forward and backward
COUNTERS = ("SpeedOfLight", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats", "LaunchStats")


def batches(plan, done):
    """The backends that are the default of each op, the counters of their slowest, then the others."""
    if plan.device == "cpu":
        items = ("list", "quantizers-float32", "dkm4-bfloat16")
        yield [child("kernels", item, plan, 60, backend=backend) for item in items for backend in plan.backends]
        return
    items = [f"{kind}-{dtype}" for kind in KINDS for dtype in ("float32", "bfloat16")]
    usual, others = [("list", backend) for backend in plan.backends], []
    for item in items:
        first, *rest = sorted(plan.backends, reverse=not item.startswith("dkm"))  # cuda for dkm, else triton
        usual.append((item, first))
        others += [(item, backend) for backend in rest]
    for item, backend in usual:
        yield [child("kernels", item, plan, SECONDS, backend=backend)]
    if ncu := plan.tools.get("ncu"):
        for row in sorted((row for row in rows_of(done) if "share" in row), key=lambda row: row["share"])[:3]:
            yield [counters_of(row, ncu, plan)]
    for item, backend in others:
        yield [child("kernels", item, plan, SECONDS, backend=backend)]


def counters_of(row, ncu, plan):
    sections = [option for section in COUNTERS for option in ("--section", section)]
    wrapper = (ncu, "--profile-from-start", "off", "--launch-count", "8", *sections)
    only = ("--only", row["case"])
    return child("kernels", f"counters-{row['item']}", plan, SECONDS, *only, backend=row["backend"], wrapper=wrapper)


def rows_of(tasks):
    return [row for task in tasks for row in task["rows"] if row["ok"]]


def missed(row):
    """The target that a row has missed, or ''."""
    for name, least in TARGETS:
        if row["case"].startswith(name) and row["share"] < least:
            return f"target {least:.0%}"
    if row["case"].startswith("dkm"):
        least = 0.7 if row["clusters"] <= 64 else 0.4
        return f"target {least:.0%}" * (row["share"] < least)
    return ""


def table(tasks):
    """A line for each call, then the kernels of each."""
    lines, detail = [], []
    for row in rows_of(tasks):
        if "share" in row:
            lines.append(
                f"{row['backend']:>7} {row['item']:<19} {row['case']:<44} {row['us']:>10.1f} us "
                f"{row['GB/s']:>7.0f} GB/s {row['share']:>6.1%} of a {row['beside']} "
                f"({row['of GB/s']:.0f} GB/s, {row['method']}) {missed(row)}"
            )
            detail += [f"{row['backend']} {row['item']} {row['case']}:"] + [
                f"    {us:>10.1f} us  {'' if count is None else f'{count:g} x '}{name[:120]}"
                for name, (us, count) in sorted(row["kernels"].items(), key=lambda kernel: -kernel[1][0])
            ]
        elif "replay us" in row:
            found = f"{row['backend']} {row['case']}: {row['replay us']:.1f} us a replay, {row['us']:.1f} us in kernels"
            lines.append(f"{found}{f' (target {LIST_TARGET} us)' * (row['case'] == 'soft_min_max, ResNet-18')}")
    counters = [task["printed"] for task in tasks if "counters-" in task["task"]]
    return "\n".join([*lines, "", *detail, *counters])


def cases(item, device, backend):
    counters = item.startswith("counters-")
    item = item.removeprefix("counters-")
    if item == "list":
        for name in ("soft_min_max", "l_inf", "lsq", "dkm, K = 16, T = 5"):
            yield Case(f"{name}, ResNet-18", functools.partial(of_a_list, name, device, backend), 50)
        return
    kind, dtype = item.split("-")
    about = {"item": item, "backend": backend}
    if kind.startswith("dkm"):
        k = int(kind[3:])
        made = [(f"dkm, K = {k}, T = {t}", functools.partial(dkm, k, t), passes_of_dkm(t)) for t in ITERATIONS]
    else:
        chosen = [op for op in PASSES if (op in ("lsq", "ewgs", "pact")) == (kind == "quantizers")]
        made = [(op, functools.partial(op_of, op), PASSES[op]) for op in chosen]
    for size in NUMBERS:
        for name, call, passes in made:
            judge = functools.partial(judged, name, dtype, device)
            for direction, moves in zip(("forward", "backward"), passes, strict=True):
                timed = functools.partial(measured, call, direction, moves, dtype, size, device)
                run = functools.partial(counted, call, direction, dtype, size, device) if counters else timed
                yield Case(f"{name} {direction}, {size}", functools.partial(checked, judge, run, about), 55)


def checked(judge, run, about):
    judge()
    return {**about, **run()}


@functools.cache
def judged(name, dtype, device):
    """AssertionError where the op's numbers are not within their budget."""
    import torch

    from . import inputs, smoke

    dtype, op = getattr(torch, dtype), name.split(",")[0]
    if op == "dkm":
        k = int(name.split(",")[1].split("=")[1])
        smoke.hold(functools.partial(inputs.draws_of_dkm, dtype, 0, k, "euclidean"), *inputs.solving(), device)
        return
    for family in ("range_losses", "regularizers", "quantizers"):
        for label, *problem in inputs.PROBLEMS[family](dtype, 0, ()):
            if label == op:
                smoke.hold(*problem, device)


def passes_of_dkm(T):
    """Forward T updates and the output; backward upstream, T - 1 recurrences, the first with gradients, and dW."""
    recurrences = 0 if T == 1 else T
    return (T + 1, 1), (2 + recurrences + 2, 1)


def dkm(k, T, w):
    import torch

    import r2kernels

    c = constant(w.device, *torch.linspace(-2 * SIGMA, 2 * SIGMA, k).tolist())
    return r2kernels.dkm(w, c, 0.4 * SIGMA / (k - 1), iterations=T)[0]


@functools.cache
def constant(device, *values, learned=False):
    """A tensor that is made once, outside of what is timed."""
    import torch

    return torch.tensor(values if len(values) > 1 else values[0], device=device, requires_grad=learned)


def op_of(name, w):
    import r2kernels

    alpha = 2 / SIGMA
    return {
        "l_inf": lambda: r2kernels.l_inf(w),
        "margin": lambda: r2kernels.margin(w, 2 * SIGMA, k=0.01),
        "soft_min_max": lambda: r2kernels.soft_min_max(w, alpha),
        "soft_min_max, alpha learned": lambda: r2kernels.soft_min_max(w, constant(w.device, alpha, learned=True)),
        "kure": lambda: r2kernels.kure(w),
        "msqe": lambda: r2kernels.msqe(w, SIGMA / 2, 4),
        "lsq": lambda: r2kernels.lsq(w, SIGMA / 2, 4),
        "ewgs": lambda: r2kernels.ewgs(w, -2 * SIGMA, 2 * SIGMA, 4, delta=1e-3),
        "pact": lambda: r2kernels.pact(w, 2 * SIGMA, 4),
    }[name]()


@functools.lru_cache(maxsize=1)
def weight_sets(dtype, size, device):
    """So many tensors that none stays in the L2 cache until its turn comes."""
    import torch

    n, count = (REHEARSED if device == "cpu" else NUMBERS)[size], 2
    g = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, dtype)
    if device == "cuda":
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        count = min(int(L2_SETS * cache / (n * dtype.itemsize)) + 1, MOST_SETS)
    return [torch.randn(n, generator=g, device=device).mul_(SIGMA).to(dtype).requires_grad_() for _ in range(count)]


def calls_of(call, direction, ws):
    """One for each set of weights; a backward comes from a graph that is kept. Results stay until the next call on the
    same set, so that they rotate as the weights do."""
    import torch

    kept = [None] * len(ws)

    def forward(i):
        with torch.no_grad():
            kept[i] = call(ws[i])

    def backward(i):
        y, g = graphs[i]
        kept[i] = torch.autograd.grad(y, ws[i], g, retain_graph=True)

    if direction == "backward":
        graphs = [(y, torch.ones_like(y) if y.dim() == 0 else y.detach().flip(0)) for y in map(call, ws)]
    run = forward if direction == "forward" else backward
    return [functools.partial(run, i) for i in range(len(ws))]


def yardsticks(ws):
    """A copy into memory that exists; a read, by the better of two reductions of 32-bit words."""
    import torch

    words = [w.detach()[: w.numel() // 2 * 2].view(torch.float32) for w in ws]
    return {
        "copy": [functools.partial(torch.empty_like(w).copy_, w) for w in words],
        "sum": [functools.partial(torch.sum, w) for w in words],
        "amax": [functools.partial(torch.amax, w, 0) for w in words],
    }


def measured(call, direction, moves, dtype, size, device):
    """Microseconds and GB/s, and the median over the rounds of the share of what a read (a copy, where the op writes)
    reached in the same round."""
    from .device_time import side_by_side

    ws = weight_sets(dtype, size, device)
    named = {**yardsticks(ws), "op": calls_of(call, direction, ws)}
    samples, kernels, how = side_by_side(named, device, **({"rounds": 3} if device == "cpu" else {}))
    reads, writes = moves
    beside = "copy" if writes else "read"
    of_yardstick = (
        samples["copy"] if writes else [min(a, b) for a, b in zip(samples["sum"], samples["amax"], strict=True)]
    )
    size_of = ws[0].nbytes
    ratios = [
        (reads + writes) * y / ((2 if writes else 1) * us) for us, y in zip(samples["op"], of_yardstick, strict=True)
    ]
    us = statistics.median(samples["op"])
    return {
        "us": us,
        "GB/s": (reads + writes) * size_of / us / 1e3,
        "share": statistics.median(ratios),
        "beside": beside,
        "of GB/s": (2 if writes else 1) * size_of / statistics.median(of_yardstick) / 1e3,
        "rounds": samples["op"],
        "sets": len(ws),
        "method": how,
        "kernels": kernels["op"],
        "clusters": call.args[0] if call.func is dkm else None,
    }


def counted(call, direction, dtype, size, device):
    """One call between the marks that ncu waits for."""
    import torch

    calls = calls_of(call, direction, weight_sets(dtype, size, device))
    for one in calls:
        one()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    calls[0]()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return {}


def of_a_list(name, device, backend):
    """ResNet-18's list, forward and backward: the replay of a graph, and its kernels."""
    import cases

    from .device_time import by_clock, by_profiler, replays, total
    from .graphs import replay_of
    from .steps import Step

    step = Step(name, "list", device, learns=False)
    step.weights = [w.requires_grad_() for w in cases.model_weights("ResNet-18", device=device)]
    if device == "cpu":
        step.weights = step.weights[:3]
    step.leaves = step.weights
    replay = replay_of(step, device)
    kernels = (by_clock if device == "cpu" else by_profiler)([replay] * 5)
    us = total(kernels)
    return {"backend": backend, "replay us": us if device == "cpu" else replays(replay), "us": us, "kernels": kernels}
