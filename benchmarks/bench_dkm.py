"""DKM, k-means and assignment beside their peers: `pytest benchmarks/bench_dkm.py`.

A case is a number of weights, of clusters, a row's length, a metric and a kind of work. All its contenders are
measured together, round by round (measure.py), at the first test that asks for one of them; each test reports one
contender's samples through pytest-benchmark by replaying them.
"""

import functools
import statistics
import time

import dkm_report
import pytest
import torch
from dkm_contenders import ASSIGN, DKM, KMEANS, STEP, Case, Inputs, attention_unit, contenders, errors, saved_bytes
from measure import Clock, extra_memory, interleave, ratios, sample

EAGER, ALL, FEW = ("eager",), ("eager", "torch.compile", "checkpointing", "coremltools"), ("eager", "coremltools")
SQUARED = "sqeuclidean"
LARGE, MIDDLE, SMALL = 2_400_000, 600_000, 150_000  # weights: what eager needs for K = 16, 64, 256 fits into memory
CASES = (
    Case(LARGE, 16, peers=ALL),
    Case(SMALL, 256, peers=ALL),
    Case(11_678_912, 16, work=KMEANS),
    Case(LARGE, 16, work=KMEANS, peers=("scikit-learn",)),
    Case(100_000, 16, work=KMEANS, peers=("coremltools",)),
    *(Case("ResNet-18", 4, metric=metric, work=STEP, peers=("coremltools",)) for metric in ("euclidean", SQUARED)),
    Case(LARGE, 2),
    Case(LARGE, 4, peers=EAGER),
    Case(LARGE, 64),
    Case(LARGE, 256),
    Case(MIDDLE, 64, peers=EAGER),
    *(Case("ResNet-18", k) for k in (4, 16, 256)),
    Case(LARGE, 16, metric=SQUARED, peers=ALL),
    Case(SMALL, 256, metric=SQUARED, peers=FEW),
    Case(LARGE, 4, metric=SQUARED, peers=EAGER),
    Case(MIDDLE, 64, metric=SQUARED, peers=EAGER),
    *(Case(LARGE, 16, metric=metric, dtype=torch.bfloat16, peers=EAGER) for metric in ("euclidean", SQUARED)),
    *(Case(LARGE, 16, d, SQUARED, peers=FEW) for d in (2, 4, 8)),
    Case(LARGE, 16, 4, peers=EAGER),
    *(Case(MIDDLE, 256, d, SQUARED, peers=EAGER) for d in (4, 8)),
    *(Case(LARGE, k, d, work=ASSIGN, peers=EAGER) for k, d in ((16, 1), (256, 4), (4096, 8))),
)
SLOW = ("eager", "torch.compile", "checkpointing", "coremltools", "scikit-learn")


@functools.lru_cache(maxsize=1)
def measured(case, deadline, seconds):
    """name -> the row of that contender, with `samples` where it was measured and `absent` where not."""
    found, absent = contenders(case)
    base = {
        "table": case.table,
        "case": case.label,
        "clusters": case.clusters,
        "weights": case.weights,
        "work": case.work,
    }
    rows = {
        name: {**base, "contender": name, "absent": absent.get(name, "the run's time budget was spent")}
        for name in [*found, *absent]
    }
    if time.monotonic() > deadline:
        return rows
    ours = next(iter(found), None)
    synchronize = torch.cuda.synchronize if case.device == "cuda" else lambda: None
    inputs, wrong = Inputs(case), {}
    for name in [name for name in found if name in SLOW]:
        try:
            sample(found[name], [inputs], 1, synchronize)
        except Exception as error:  # another's failure fails nothing of ours
            rows[name]["absent"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            del found[name]
    if case.work == DKM:
        exact = errors(case, {**found, "eager": contenders(case._replace(peers=("eager",)))[0]["eager"]})
        limit = [2 * e + torch.finfo(case.dtype).eps for e in exact["eager"]]
        for name, error in exact.items():
            if name in rows:
                rows[name]["errors"] = error
                if name not in SLOW and not all(e <= most for e, most in zip(error, limit, strict=True)):
                    wrong[name] = (
                        f"errs by {error[0]:.2g} and {error[1]:.2g} of W_hat and dL/dW, "
                        f"allowed are {limit[0]:.2g} and {limit[1]:.2g}"
                    )
    for name in wrong:
        del found[name]
    slow = any(name in SLOW for name in found)
    timed = interleave(found, [inputs], seconds, synchronize, **({"least_rounds": 3, "tries": 1} if slow else {}))
    for name, (samples, calls) in timed.items():
        row, quartiles = rows[name], statistics.quantiles(samples, n=4)
        del row["absent"]
        median = statistics.median(samples)
        row.update(
            samples=samples,
            calls=calls,
            default=name == ours,
            rounds=len(samples),
            median_ms=median * 1e3,
            iqr_ms=(quartiles[2] - quartiles[0]) * 1e3,
            ns_per_weight=median * 1e9 / inputs.numel,
            faster=ratios(timed, name, ours),
        )
        if case.work == STEP:
            row["copies"] = extra_memory(found[name], inputs) / inputs.bytes
        if case.work == DKM:
            row["saved_per_weight"] = saved_bytes(found[name], inputs)
            row["extra_per_weight"] = (
                max(extra_memory(found[name], inputs) - 2 * inputs.bytes, 0) / inputs.numel
            )  # beyond W_hat and dL/dW
            row["sharpness"] = attention_unit(case)
    for name, reason in wrong.items():
        rows[name]["absent"] = rows[name]["wrong"] = f"not timed, its numbers are wrong: {reason}"
    return rows


clock = Clock()


def pytest_generate_tests(metafunc):
    device = metafunc.config.getoption("bench_device")
    cases = [case._replace(device=device) for case in CASES]
    ours = ("cuda", "triton") if device == "cuda" else ("cpu",)
    rows = [(case, name) for case in cases for name in (*ours, *case.peers)]
    metafunc.parametrize("case, contender", rows, ids=[f"{case.table}, {case.label}, {name}" for case, name in rows])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.benchmark(timer=clock)
def test_dkm(case, contender, dkm_results, benchmark):
    if (case.table, case.label) in dkm_results.kept:
        pytest.skip("measured in an earlier run")
    rows = measured(case, dkm_results.deadline, dkm_results.seconds)
    dkm_results.add(rows)
    row = rows[contender]
    if "wrong" in row:
        pytest.fail(row["absent"], pytrace=False)
    if "absent" in row:
        pytest.skip(row["absent"])
    benchmark.group = f"{case.table}, {case.label}"
    benchmark.extra_info.update({k: v for k, v in row.items() if k != "samples"})
    benchmark.pedantic(clock.replay(row["samples"]), rounds=len(row["samples"]))


@pytest.fixture(scope="session")
def dkm_results(results_of):
    return results_of(dkm_report)
