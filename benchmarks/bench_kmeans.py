"""k-means of groups of single numbers beside its peers: `pytest benchmarks/bench_kmeans.py`.

Inertia is compared before time: a row says how much more a contender leaves than ours, on the same groups. A slow peer
is given fewer groups. CPU time is of all threads.
"""

import functools
import statistics
import time

import kmeans_report
import pytest
import torch
from kmeans_contenders import (
    AGAINST_GROUPS,
    AGAINST_K,
    AGAINST_N,
    CONTENDERS,
    CUT,
    MEMORY,
    ROWS,
    TILES,
    GroupsCase,
    inertia,
    peak_beyond,
    timed,
)
from measure import Clock

PEERS = ("scikit-learn", "coremltools", "flash-kmeans' formula", "faiss")
ALL = (("scikit-learn, 10 restarts", 2), *((name, 8) for name in PEERS))
QUICK = tuple((name, 2) for name in PEERS)
CASES = (
    *(GroupsCase(CUT, groups, 2**21 // groups, 16) for groups in (1, 128, 4096)),
    *(GroupsCase(ROWS, 512, 4096, 16, dtype, ALL) for dtype in (torch.float32, torch.bfloat16)),
    GroupsCase(TILES, 4096, 512, 8, peers=ALL),
    GroupsCase(TILES, 4096, 512, 8, torch.bfloat16),
    GroupsCase(MEMORY, 1, 50_000_000, 16),
    GroupsCase(MEMORY, 12_208, 4096, 16, torch.bfloat16),
    *(GroupsCase(AGAINST_N, 1, 2**n, 16, peers=QUICK if n < 18 else ()) for n in (10, 12, 14, 16, 18, 20, 22)),
    *(GroupsCase(AGAINST_K, 64, 4096, k, peers=QUICK) for k in (2, 4, 16, 64, 256)),
    *(GroupsCase(AGAINST_GROUPS, 4**n, 512, 8, peers=((PEERS[2], min(4**n, 256)),)) for n in range(8)),
)
LEAST, MOST = 2, 15  # rounds


@functools.lru_cache(maxsize=1)
def measured(case, deadline, seconds):
    """name -> the row of that contender, with `samples` where it was measured and `absent` where not."""
    names = ["r2kernels", *dict(case.peers)]
    base = {"table": case.table, "case": case.label, "groups": case.groups, "n": case.n, "clusters": case.clusters}
    rows = {name: {**base, "contender": name, "absent": "the run's time budget was spent"} for name in names}
    if time.monotonic() > deadline:
        return rows
    w = case.weights()
    if case.table == MEMORY:
        CONTENDERS["r2kernels"](w[:1, :4096], case.clusters)
        rows["r2kernels"]["copies"] = peak_beyond(CONTENDERS["r2kernels"], w, case.clusters) / w.nbytes
    given, found = {name: w[: dict(case.peers).get(name, case.groups)] for name in names}, {}
    for name in names:
        try:
            found[name] = CONTENDERS[name](given[name], case.clusters)
        except Exception as error:  # another's failure fails nothing of ours
            if name == "r2kernels":
                raise
            rows[name]["absent"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    best = inertia(w, found["r2kernels"])
    samples, begin = {name: [] for name in found}, time.monotonic()
    least = 1 if case.table == MEMORY else LEAST
    while len(samples["r2kernels"]) < least or (
        time.monotonic() - begin < seconds and len(samples["r2kernels"]) < MOST
    ):
        for name in found:
            samples[name].append(timed(CONTENDERS[name], given[name], case.clusters)[:2])
    for name, centroids in found.items():
        row, count = rows[name], len(given[name])
        ratio = inertia(given[name], centroids) / best[:count].clamp(min=1e-300)
        del row["absent"]
        wall, cpu = (statistics.median(sample[i] for sample in samples[name]) for i in range(2))
        row.update(
            samples=[sample[0] for sample in samples[name]],
            default=name == "r2kernels",
            given=count,
            rounds=len(samples[name]),
            median_ms=wall * 1e3,
            us_per_group=wall * 1e6 / count,
            cpu_us_per_group=cpu * 1e6 / count,
            cpu_ns_per_weight=cpu * 1e9 / (count * case.n),
            inertia=ratio.mean().item(),
            least_inertia=ratio.min().item(),
        )
    return rows


clock = Clock()
TESTS = [(case, name) for case in CASES for name in ("r2kernels", *dict(case.peers))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize(("case", "contender"), TESTS, ids=[f"{c.table}, {c.label}, {name}" for c, name in TESTS])
def test_kmeans(case, contender, kmeans_results, benchmark):
    if (case.table, case.label) in kmeans_results.kept:
        pytest.skip("measured in an earlier run")
    rows = measured(case, kmeans_results.deadline, kmeans_results.seconds)
    kmeans_results.add(rows)
    row = rows[contender]
    if "absent" in row:
        pytest.skip(row["absent"])
    benchmark.group = f"{case.table}, {case.label}"
    benchmark.extra_info.update({k: v for k, v in row.items() if k != "samples"})
    benchmark.pedantic(clock.replay(row["samples"]), rounds=len(row["samples"]))
    assert row["least_inertia"] >= 1 - 1e-6, "ours leaves more inertia than another"


@pytest.fixture(scope="session")
def kmeans_results(results_of):
    return results_of(kmeans_report)
