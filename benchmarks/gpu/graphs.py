"""CUDA graphs by torch's own recipe, torch.compile(mode="reduce-overhead"), two streams, repetitions, huge tensors.

Everything is compared with the same calls without a graph on the same device, to the bit where torch compiles nothing.
On the CPU the same code runs without capture.
"""

import functools

from .child import Case
from .processes import child, rehearsed

WORKERS = 4
WARM = 4  # steps before the capture: one more, and Palettizer.step() reads no values in the three that follow
REPLAYS = 3
REPETITIONS, FEW = 200, 5
BUSY = 600_000_000  # clock cycles for which the first stream is kept busy
ITEMS = {  # item -> seconds
    "capture-leaf": 200,
    "capture-list": 200,
    "capture-computed": 200,
    "capture-strided": 200,
    "capture-activation": 200,
    "modules": 200,
    "streams": 150,
    "repetitions": 200,
    "large": 200,
    "compiled-ops": 300,
    "compiled-modules": 300,
}
REHEARSED = {
    "capture-list": "soft_min_max",
    "modules": "regularizer",
    "streams": "lsq, axis",
    "repetitions": "kure",
    "large": "",
    "compiled-ops": "l_inf",
}


def batches(plan, done):
    if plan.device == "cpu":
        yield rehearsed("graphs", REHEARSED, plan, 60)
        return
    yield [
        child("graphs", item, plan, seconds, backend=backend)
        for item, seconds in ITEMS.items()
        for backend in plan.backends
    ]


def table(tasks):
    return ""


def cases(item, device, backend):
    from . import large, steps

    kind, _, form = item.partition("-")
    if kind == "capture":
        for name in steps.OPS:
            for dtype in ("float32", "bfloat16"):
                run = functools.partial(captured_op, name, form, dtype, device)
                yield Case(f"{name}, {form}, {dtype}", run)
    elif kind == "modules":
        for name in steps.MODULES:
            yield Case(name.lower(), functools.partial(captured_training, name, device), 90)
    elif kind == "streams":
        for name in steps.OPS:
            yield Case(name, functools.partial(two_streams, name, device))
    elif kind == "repetitions":
        for name in steps.OPS:
            yield Case(name, functools.partial(repeated, name, device))
    elif kind == "large":
        yield from large.cases(device)
    elif form == "ops":
        for name in steps.OPS:
            yield Case(name, functools.partial(compiled_op, name, device), 120)
    else:
        for name in steps.MODULES:
            yield Case(name, functools.partial(compiled_training, name, device), 150)


class Replay:
    """A step in a CUDA graph: warmed up on a side stream, gradients None, captured. `tensors` are what it writes."""

    def __init__(self, step, warm=WARM):
        import torch

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm):
                step.clear()
                step.run()
        torch.cuda.current_stream().wait_stream(side)
        step.clear()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.tensors = step.run()

    def __call__(self):
        self.graph.replay()
        return self.tensors


class Again:
    """Stands in for it where there are no graphs."""

    def __init__(self, step, warm=WARM):
        self.step = step
        for _ in range(warm):
            step.clear()
            step.run()

    def __call__(self):
        self.step.clear()
        return self.step.run()


def replay_of(step, device):
    return Replay(step) if device == "cuda" else Again(step)


def copies(tensors):
    return [t.detach().clone() for t in tensors]


def differing(a, b):
    """Which of the tensors are not the same bits (NaN where NaN is)."""
    if len(a) != len(b):
        return f"{len(a)} tensors beside {len(b)}"
    return [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if not bool(((x == y) | ((x != x) & (y != y))).all())]


def hold_replays(what, replay, captured, plain):
    """Replays with new values where the old ones lay, against calls without a graph. Of training 0 is the loss."""
    for seed in range(1, REPLAYS + 1):
        for one in {captured, plain}:
            one.fill(seed)
        found = copies(replay())
        plain.clear()
        wrong = differing(found, copies(plain.run()))
        assert not wrong, f"{what} {seed} differs from the call in {wrong}"


def captured_op(name, form, dtype, device):
    """Replays with new values where the old ones lay, against calls without a graph."""
    import torch

    from .steps import Step

    step = Step(name, form, device, getattr(torch, dtype))
    replay = replay_of(step, device)
    hold_replays("replay", replay, step, step)


def captured_training(name, device):
    """A model trained by replays beside its twin that is trained without a graph."""
    import torch

    from .steps import Training

    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    captured, twin = Training(name, device), Training(name, device)
    replay = replay_of(captured, device)
    for _ in range(WARM):
        twin.clear()
        twin.run()
    hold_replays("step", replay, captured, twin)


def side_by_side(pair, device):
    """(what each gave, whether the first stream was still busy when the second had ended)"""
    import torch

    if device == "cpu":
        return [copies(step.run()) for step in pair], False
    torch.cuda.synchronize()
    first, second, busy = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(first):
        torch.cuda._sleep(BUSY)
        busy.record()
        found = [pair[0].run()]
    with torch.cuda.stream(second):
        found.append(pair[1].run())
        second.synchronize()
        overlapped = not busy.query()
    torch.cuda.synchronize()
    return [copies(tensors) for tensors in found], overlapped


def two_streams(name, device):
    """The first stream is busy when both call: what the second reads must not wait for the first by luck.

    Each pair of calls is of sizes that no call has had, with kernels that are compiled already. `overlapped` of six
    pairs ran while the first stream was busy.
    """
    import torch

    from . import steps

    def made(form, rows):
        step = steps.Step(name, form, device)
        count = 3 if form == "list" else 1
        step.weights = [torch.randn(rows, 48, device=device).mul_(0.05).requires_grad_() for _ in range(count)]
        step.leaves = [*step.weights, *step.learned.values()]
        return step

    overlapped = 0
    for form in ("list", "leaf"):
        made(form, 16).run()
        for rows in (32, 48, 80):
            pair = [made(form, rows), made(form, rows)]
            found, busy = side_by_side(pair, device)
            overlapped += busy
            for step, tensors in zip(pair, found, strict=True):
                step.clear()
                wrong = differing(tensors, copies(step.run()))
                assert not wrong, f"{form} of {rows} rows: results beside a busy stream differ in {wrong}"
    return {"overlapped": overlapped}


def repeated(name, device):
    """The same bits every time, of an op on a list."""
    import torch

    from .steps import Step

    step = Step(name, "list", device)
    first = copies(step.run())
    moved = [torch.zeros((), dtype=torch.bool, device=device) for _ in first]
    for _ in range(REPETITIONS if device == "cuda" else FEW):
        step.clear()
        for flag, a, b in zip(moved, first, step.run(), strict=True):
            flag |= ((a != b) & ((a == a) | (b == b))).any()
    wrong = [i for i, flag in enumerate(moved) if flag]
    assert not wrong, f"repetitions differ in {wrong}"


def compiler(device):
    """torch.compile into CUDA graphs; on the CPU a trace, which compiles nothing."""
    import torch

    return functools.partial(
        torch.compile, **({"mode": "reduce-overhead"} if device == "cuda" else {"backend": "aot_eager"})
    )


def skipped():
    """How often Inductor made no CUDA graph."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["cudagraph_skips"]


def compiled_op(name, device):
    import torch

    from .steps import Step

    torch._dynamo.reset()
    for form in ("list", "computed"):
        step, plain = Step(name, form, device), Step(name, form, device)
        step.function = compiler(device)(step.function)
        for seed in range(REPLAYS + 2):
            torch.compiler.cudagraph_mark_step_begin()
            for one in (step, plain):
                one.clear()
                one.fill(seed)
            found = copies(step.run())
            expected = copies(plain.run())
            for i, (a, b) in enumerate(zip(found, expected, strict=True)):
                where = f"{form}, tensor {i}"  # of "computed" Inductor makes w * 1.5 itself, and may fuse it
                torch.testing.assert_close(
                    a, b, rtol=1e-5, atol=1e-6, equal_nan=True, msg=lambda t, w=where: f"{w}: {t}"
                )
    return {"skipped": skipped()}


def compiled_training(name, device):
    """Losses of five steps beside those of a twin: Inductor fuses and reorders torch's own operations."""
    import torch

    from .steps import Training

    torch._dynamo.reset()
    compiled, twin = Training(name, device, compiler(device)), Training(name, device)
    for seed in range(REPLAYS + 2):
        torch.compiler.cudagraph_mark_step_begin()
        losses = []
        for one in (compiled, twin):
            one.fill(seed)
            one.clear()
            losses.append(one.run()[0].item())
        assert abs(losses[0] - losses[1]) <= 0.02 * abs(losses[1]), f"step {seed}: {losses[0]} beside {losses[1]}"
    return {"skipped": skipped()}
