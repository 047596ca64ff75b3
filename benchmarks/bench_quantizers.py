"""The quantizers and regularizers beside eager PyTorch, torch.compile and PyTorch's own LSQ.

    pytest benchmarks/bench_quantizers.py

A case is an op on a tensor or a list, forward and backward. All its contenders are measured together, round by round
(measure.py), at the first test that asks for one of them; each test reports one contender's samples through
pytest-benchmark by replaying them.
"""

import functools
import statistics
import time

import pytest
import quantizers_report
import torch
from measure import Clock, interleave, ratios, sample
from quantizers_contenders import ACTIVATION, LIST, ONE, REGULARIZERS, TERMS, Case, Inputs, contenders, wrong

CASES = (
    *(Case(op) for op in ("lsq", "ewgs", "pact", "dorefa")),
    *(Case(op) for op in REGULARIZERS),
    Case("weight_terms", LIST),
    Case("weight_terms", ONE),
    Case("lsq", LIST),
    Case("lsq", LIST, axis=0),
    Case("pact", ACTIVATION),
    Case("lsq", ACTIVATION),
    Case("lsq", ONE, torch.bfloat16),
    Case("pact", ONE, torch.bfloat16),
    *(Case(op, LIST) for op in ("ewgs", "dorefa", *REGULARIZERS)),
)
NAMES = ("eager", "torch.compile", "floor")


def names(case):
    ours = ("triton", "cuda") if case.device == "cuda" else ("cpu",)
    peers = (
        ("PyTorch's fake quantize",) if case.op == "lsq" and case.shape == ONE and case.dtype == torch.float32 else ()
    )
    return (*ours, *NAMES, *peers, *(f"{name} alone" for name in TERMS if case.function == "weight_terms"))


@functools.lru_cache(maxsize=1)
def measured(case, deadline, seconds):
    """name -> the row of that contender, with `samples` where it was measured and `absent` where not."""
    base = {"table": case.shape, "case": case.label, "op": case.op}
    rows = {name: {**base, "contender": name, "absent": "the run's time budget was spent"} for name in names(case)}
    if time.monotonic() > deadline:
        return rows
    found, absent = contenders(case)
    for name, reason in absent.items():
        rows.setdefault(name, {**base, "contender": name})["absent"] = reason
    ours = next(name for name in found if name in ("cpu", "triton", "cuda", "eager"))
    for name in [name for name in found if name in ("cpu", "triton", "cuda")]:
        if reason := wrong(case, found[name]):
            rows[name]["absent"] = rows[name]["wrong"] = f"not timed, its numbers are wrong: {reason}"
            del found[name]
    inputs = Inputs(case)
    synchronize = torch.cuda.synchronize if case.device == "cuda" else lambda: None
    for name in [name for name in found if name not in ("cpu", "triton", "cuda")]:
        try:
            sample(found[name], [inputs], 1, synchronize)
        except Exception as error:  # another's failure fails nothing of ours
            rows[name]["absent"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            del found[name]
    timed = interleave(found, [inputs], seconds, synchronize, settle=True)
    for name, (samples, calls) in timed.items():
        quartiles = statistics.quantiles(samples, n=4)
        median = statistics.median(samples)
        rows[name].pop("absent", None)
        rows[name].update(
            samples=samples,
            calls=calls,
            default=name == ours,
            rounds=len(samples),
            median_ms=median * 1e3,
            iqr_ms=(quartiles[2] - quartiles[0]) * 1e3,
            ns_per_number=median * 1e9 / inputs.numel,
            slower=ratios(timed, name, ours),
        )
    return rows


clock = Clock()


def pytest_generate_tests(metafunc):
    cases = [case._replace(device=metafunc.config.getoption("bench_device")) for case in CASES]
    rows = [(case, name) for case in cases for name in names(case)]
    metafunc.parametrize("case, contender", rows, ids=[f"{case.shape}, {case.label}, {name}" for case, name in rows])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.benchmark(timer=clock)
def test_quantizer(case, contender, quantizers_results, benchmark):
    if (case.shape, case.label) in quantizers_results.kept:
        pytest.skip("measured in an earlier run")
    rows = measured(case, quantizers_results.deadline, quantizers_results.seconds)
    quantizers_results.add(rows)
    row = rows[contender]
    if "wrong" in row:
        pytest.fail(row["absent"], pytrace=False)
    if "absent" in row:
        pytest.skip(row["absent"])
    benchmark.group = f"{case.shape}, {case.label}"
    benchmark.extra_info.update({k: v for k, v in row.items() if k != "samples"})
    benchmark.pedantic(clock.replay(row["samples"]), rounds=len(row["samples"]))


@pytest.fixture(scope="session")
def quantizers_results(results_of):
    return results_of(quantizers_report)
