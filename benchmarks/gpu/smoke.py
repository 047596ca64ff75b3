"""Every op, dtype and alignment on small tensors: results and gradients against the reference in float64, on the CPU.

What they may err is tests/budget.py's; two runs must give the same bits. Then compute-sanitizer looks at these calls.
"""

import functools

from .child import Case
from .processes import child, rehearsed

WORKERS = 6
DTYPES = ("float32", "bfloat16", "float16", "float64")
FAMILIES = ("range_losses", "regularizers", "quantizers", "dkm", "others")
SANITIZERS = ("memcheck", "racecheck", "synccheck")
CLUSTERS = (2, 16, 64, 256, 340, 650)
# each tensor an allocation of its own, so that what lies beyond its end is nobody's
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
OF_FLOAT64 = 1e-12  # what DKM may err in float64 (tests/dkm/test_backends.py)
REHEARSED = {
    "range_losses-float32": "soft_min_max, float32, offset 1",
    "dkm-bfloat16": "K = 16, euclidean, bfloat16, offset 1",
}


def batches(plan, done):
    if plan.device == "cpu":
        yield rehearsed("smoke", REHEARSED, plan, 100)
        return
    items = [f"{family}-{dtype}" for dtype in DTYPES for family in FAMILIES]
    yield [child("smoke", item, plan, 240, backend=backend) for item in items for backend in plan.backends]
    if sanitizer := plan.tools.get("compute-sanitizer"):
        items = [f"touch-{family}-{dtype}" for dtype in ("float32", "bfloat16") for family in FAMILIES[:4]]
        for kind in SANITIZERS:
            wrapper = (sanitizer, "--tool", kind, "--error-exitcode", "9", "--print-limit", "20")
            yield [
                child("smoke", item, plan, 150, backend=backend, wrapper=wrapper)._replace(environment=UNCACHED)
                for item in items
                for backend in plan.backends
            ]


def table(tasks):
    return ""


def cases(item, device, backend):
    """Of a family and dtype, `FAMILY-DTYPE`; `touch-FAMILY-DTYPE` makes each call once and judges nothing."""
    import torch

    from . import inputs

    family, dtype = item.removeprefix("touch-").split("-")
    judged, dtype = not item.startswith("touch-"), getattr(torch, dtype)
    if family == "others":
        yield from others(dtype, device)
        return
    least = OF_FLOAT64 if family == "dkm" and dtype == torch.float64 else 0.0
    for offset in (0, 1):
        for label, draws, run, judge in inputs.PROBLEMS[family](dtype, offset, CLUSTERS if judged else CLUSTERS[::2]):
            check = functools.partial(touch, draws, run, device)
            if judged:
                check = functools.partial(hold, draws, run, judge, device, least)
            yield Case(f"{label}, {str(dtype)[6:]}, offset {offset}", check, 100)


def touch(draws, run, device):
    """One call of a list and one of a single tensor."""
    from . import inputs

    made = draws()
    for draw in {len(inputs.tensors_of(draw)): draw for draw in made}.values():
        run(inputs.moved(draw, device))


def hold(draws, run, judge, device, least=0.0):
    """AssertionError where the device errs by more than the budget and `least`, or not always alike; else how much of
    it is used up."""
    import budget
    import torch

    from r2kernels import use_backend

    from . import inputs

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
    allowed = {name: max(limit, least) for name, limit in budget.limits(own.rms(), one.dtype, narrow).items()}
    wrong = [
        f"{name} errs by {e:.3g}, allowed is {allowed[name]:.3g}"
        for name, e in pool.rms().items()
        if not e <= allowed[name]
    ]
    assert not wrong, "; ".join(wrong)
    return {"of the budget": round(max(error / allowed[name] for name, error in pool.rms().items()), 3)}


def others(dtype, device):
    """What has no budget of its own: the bits of quantizers, statistics, several terms at once, codes, k-means."""
    from . import inputs

    for offset in (0, 1):
        for name, check in inputs.OTHERS.items():
            yield Case(
                f"{name}, {str(dtype)[6:]}, offset {offset}", functools.partial(check, dtype, offset, device), 100
            )
