"""Every op, dtype and alignment on small tensors: results and gradients against the reference in float64, on the CPU.

What they may err is tests/budget.py's; two runs must give the same bits. Then compute-sanitizer looks at the same calls.
"""

import functools

from . import inputs
from .child import Case
from .processes import child

WORKERS = 6
DTYPES = ("float32", "bfloat16", "float16", "float64")
FAMILIES = ("range_losses", "regularizers", "quantizers", "dkm", "others")
SANITIZERS = ("memcheck", "racecheck", "synccheck")
CLUSTERS = (2, 16, 64, 256, 340, 650)
REHEARSED = (("range_losses", "float32"), ("dkm", "bfloat16"))


def batches(plan, done):
    threads = {"OMP_NUM_THREADS": "2"}

    def tasks(*options, wrapper=(), seconds, items):
        for name, dtype in items:
            for backend in plan.backends:
                item = f"{name}-{dtype}"
                yield child("smoke", item, plan, seconds, *options, backend=backend, wrapper=wrapper)._replace(
                    environment=threads
                )

    if plan.device == "cpu":
        yield [*tasks("--only", "offset 1", seconds=60, items=REHEARSED)]
        return
    yield [*tasks(seconds=240, items=[(family, dtype) for dtype in DTYPES for family in FAMILIES])]
    if sanitizer := plan.tools.get("compute-sanitizer"):
        touched = [(f"touch-{family}", dtype) for dtype in ("float32", "bfloat16") for family in FAMILIES[:4]]
        for kind in SANITIZERS:
            wrapper = (sanitizer, "--tool", kind, "--error-exitcode", "9", "--print-limit", "20")
            yield [*tasks(wrapper=wrapper, seconds=150, items=touched)]


def table(tasks):
    return ""


def cases(item, device, backend):
    """Of a family and dtype, `FAMILY-DTYPE`; `touch-FAMILY-DTYPE` makes each call once and judges nothing."""
    import torch

    family, dtype = item.removeprefix("touch-").split("-")
    judged, dtype = not item.startswith("touch-"), getattr(torch, dtype)
    if family == "others":
        yield from others(dtype, device)
        return
    for offset in (0, 1):
        for label, draws, run, judge in inputs.PROBLEMS[family](dtype, offset, CLUSTERS if judged else CLUSTERS[::2]):
            check = functools.partial(hold if judged else touch, draws, run, judge, device, backend)
            yield Case(f"{label}, {str(dtype)[6:]}, offset {offset}", check, 100)


def touch(draws, run, judge, device, backend):
    """One call of a list and one of a single tensor."""
    made = draws()
    for draw in {len(inputs.tensors_of(draw)): draw for draw in made}.values():
        run(inputs.moved(draw, device))


def hold(draws, run, judge, device, backend):
    """AssertionError where the device errs by more than the budget, or not always alike; else what it errs by."""
    import budget
    import torch

    from r2kernels import use_backend

    own, pool = budget.Pool(), budget.Pool()
    for one in draws():
        narrow = one.dtype == torch.float64
        with use_backend("reference"):
            exact, scale = judge(one)
            rounded = one.to(torch.float32) if narrow else one
            own.add(budget.errors(run(rounded), *(judge(rounded) if narrow else (exact, scale))))
        there = inputs.moved(one, device)
        found, again = (inputs.moved(getattr(r, "quantities", r), "cpu") for r in (run(there), run(there)))
        assert inputs.same(found, again), "two runs differ"
        pool.add(budget.errors(found, exact, scale))
    wrong = budget.exceeded(own, {backend: pool}, one.dtype, narrow)
    assert not wrong, wrong
    allowed = budget.limits(own.rms(), one.dtype, narrow)
    return {"of the budget": round(max(error / allowed[name] for name, error in pool.rms().items()), 3)}


def others(dtype, device):
    """What has no budget of its own: the bits of quantizers, statistics, several terms at once, codes, k-means."""
    for offset in (0, 1):
        for name, check in inputs.OTHERS.items():
            yield Case(
                f"{name}, {str(dtype)[6:]}, offset {offset}", functools.partial(check, dtype, offset, device), 100
            )
