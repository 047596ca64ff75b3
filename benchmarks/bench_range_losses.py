"""The range losses, every contender of a case side by side: `pytest benchmarks/bench_range_losses.py`.

A case is an op, a model's shapes and a kind of work. All its contenders are measured together, round by round
(measure.py), at the first test that asks for one of them; each test then reports one contender's samples through
pytest-benchmark by replaying them on a clock of its own.
"""

import functools
import statistics
import time

import cases
import pytest
import range_losses_report
import torch
from measure import Clock, extra_memory, interleave, launches, ratios, sample
from range_losses_contenders import (
    ACCUMULATE,
    BACKWARD,
    BOTH,
    FORWARD,
    IN_STD,
    MOVES,
    OPS,
    Case,
    Inputs,
    check,
    contenders,
    copy,
    floors,
    in_std,
    line,
)

COMPILE_LEAST = 90  # seconds that must be left of the budget to start compiling a list
L2_SETS = 2.5  # inputs on a GPU rotate among sets of so many times its L2 cache
MOST_SETS = 32


def names(case):
    ours = ("triton", "cuda", "CUDA graph") if case.device == "cuda" else ("cpu",)
    units = (IN_STD,) if case.op.label == "soft_min_max" and case.work == ACCUMULATE else ()
    return ("eager", "torch.compile", *ours, *units, "floor", "copy")


SHAPES = ("ResNet-18", "Llama-7B block", "one tensor 11.7M", "1,000 x 1,000", "one tensor 10k", "MobileNet-V2")


def in_order(device):
    """The ops and shapes that have targets first: a run that is cut short has them."""
    wanted = {(op, table) for op, table, *_ in range_losses_report.TARGETS[device]}
    return sorted(all_cases(device), key=lambda case: (case.op.label, case.shape) not in wanted)


def all_cases(device):
    for op in OPS:
        for shape in SHAPES:
            if shape == "Llama-7B block" and device == "cpu":
                continue
            for work in (FORWARD, BOTH, ACCUMULATE):
                yield Case(op, shape, work, device)
            if device == "cuda" and shape == "Llama-7B block":
                yield Case(op, shape, BACKWARD, device)
        if device == "cuda" and op.label == "soft_min_max":
            yield from (Case(op, "ResNet-18", work, device, cached=True) for work in (FORWARD, BOTH, ACCUMULATE))
            for shape in ("ResNet-18", "Llama-7B block"):
                yield from (Case(op, shape, work, device, torch.bfloat16) for work in (FORWARD, BOTH, ACCUMULATE))


def not_compiled(case, left):
    """Why torch.compile of the reference is left out of this case, or None. A list is one graph with every tensor's
    operations in it."""
    count = len(cases.MODELS[case.shape]())
    if case.work == BACKWARD:
        return "it frees its buffers in the first backward; forward + backward has it"
    if count > 100:
        return f"compiling a graph of {count:,} tensors takes minutes"
    if count > 1 and (case.op.learn or case.op.label == "kure"):
        return "compiled for single tensors only: a list takes a minute or more for every op"
    if count > 40 and (case.op.label != "soft_min_max" or case.work == FORWARD):
        return (
            f"a list of {count} tensors is compiled for soft_min_max forward + backward only: it takes a minute or more"
        )
    if left < COMPILE_LEAST and count > 1:
        return "too little was left of the run's time budget to compile it"
    return None


@functools.lru_cache(maxsize=1)
def input_sets(case):
    """One set of inputs; on a GPU so many that they do not stay in its L2 cache."""
    first = Inputs(case)
    if case.device == "cpu" or case.cached:
        return [first]
    count = int(L2_SETS * torch.cuda.get_device_properties(0).L2_cache_size / first.bytes) + 1
    return [first, *(Inputs(case, seed) for seed in range(1, min(count, MOST_SETS)))]


@functools.lru_cache(maxsize=1)
def measured(case, deadline, seconds):
    """name -> the row of that contender, with `samples` where it was measured and `absent` where not."""
    rows = {
        name: {
            "table": case.table,
            "op": case.op.label,
            "work": case.work,
            "contender": name,
            "absent": "not usable here",
        }
        for name in names(case)
    }
    if time.monotonic() > deadline:
        for row in rows.values():
            row["absent"] = "the run's time budget was spent"
        return rows
    synchronize = torch.cuda.synchronize if case.device == "cuda" else lambda: None
    inputs = input_sets(case._replace(work=""))
    found, absent = contenders(case, inputs, not_compiled(case, deadline - time.monotonic()))
    default = next((name for name in found if name in ("triton", "cuda", "cpu")), None)
    for name, contender in list(found.items()):
        try:
            sample(contender, inputs[:1], 1, synchronize)
        except Exception as error:
            absent[name] = line(error)
            del found[name]
    wrong = check(case, inputs[0], found) if "eager" in found else {}
    for name in wrong:
        del found[name]
    if IN_STD in rows and default in found:
        found[IN_STD] = in_std(inputs[0])
        rows[IN_STD].update(work=IN_STD, contender=default)
    ways = floors(case)
    for way in ways.values():
        sample(way, inputs[:1], 1, synchronize)
    found["floor"] = min(
        ways.values(), key=lambda way: min(sample(way, inputs, len(inputs), synchronize) for _ in range(3))
    )
    found["copy"] = copy(case, inputs)
    timed = interleave(found, inputs, seconds, synchronize)
    for name, (samples, calls) in timed.items():
        rows[name].update(
            _numbers(case, inputs[0], name, found[name], timed, default),
            samples=samples,
            calls=calls,
            default=name in (default, IN_STD),
        )
        del rows[name]["absent"]
    for name, reason in absent.items():
        rows.setdefault(name, {**rows["eager"], "contender": name})["absent"] = reason
    for name, reason in wrong.items():
        rows[name]["absent"] = rows[name]["wrong"] = f"not timed, its numbers are wrong: {reason}"
    return rows


def _numbers(case, inputs, name, contender, timed, default):
    samples = timed[name][0]
    moved = inputs.bytes * (2 if name == "copy" else MOVES[case.work])
    quartiles = statistics.quantiles(samples, n=4)
    median = statistics.median(samples)
    compared = {
        "to_floor": ratios(timed, name, "floor"),
        "to_copy": ratios(timed, name, "copy", moved / (2 * inputs.bytes)),
        **({"to_raw": ratios(timed, IN_STD, default)} if name == IN_STD else {}),
        "over_eager": ratios(timed, "eager", name),
        "over_compile": ratios(timed, "torch.compile", name),
    }
    numbers = {
        "median_ms": median * 1e3,
        "iqr_ms": (quartiles[2] - quartiles[0]) * 1e3,
        "rounds": len(samples),
        "bytes": moved,
        "gb_per_s": moved / median / 1e9,
        **{ratio: values and values[1] for ratio, values in compared.items()},
        "quartiles": {ratio: values and values[::2] for ratio, values in compared.items()},
    }
    if name not in ("floor", "copy"):
        gradients = inputs.bytes if case.work in (BOTH, BACKWARD) else 0
        numbers["extra_bytes"] = max(extra_memory(contender, inputs) - gradients, 0)
    if case.device == "cuda":
        numbers["launches"] = launches(contender, inputs)
    return numbers


clock = Clock()


def pytest_generate_tests(metafunc):
    device = metafunc.config.getoption("bench_device")
    rows = [(case, name) for case in in_order(device) for name in names(case)]
    metafunc.parametrize(
        "case, contender", rows, ids=[f"{case.op.label}, {case.table}, {case.work}, {name}" for case, name in rows]
    )


@pytest.mark.benchmark(timer=clock)
def test_range_loss(case, contender, range_losses_results, benchmark):
    rows = measured(case, range_losses_results.deadline, range_losses_results.seconds)
    range_losses_results.add(rows)
    row = rows[contender]
    if (
        "wrong" in row and contender != "torch.compile"
    ):  # another's wrong numbers are named in the table, and fail nothing of ours
        pytest.fail(row["absent"], pytrace=False)
    if "absent" in row:
        pytest.skip(row["absent"])
    benchmark.group = f"{case.op.label}, {case.table}, {case.work}"
    benchmark.extra_info.update({k: v for k, v in row.items() if k != "samples"})
    benchmark.pedantic(clock.replay(row["samples"]), rounds=len(row["samples"]))


@pytest.fixture(scope="session")
def range_losses_results(results_of):
    return results_of(range_losses_report)
