"""Compiles the Triton kernels of DKM ahead of time, like aot_check.py, and prints what ptxas made of them, as JSON.

    python tests/static/aot_dkm.py [architecture ...]       default: 90 in every variant, 80 and 100 in a few

`per_weight`: instructions of the way once round the main loop for each weight that it reads, the rare branches aside;
of the gradient of scalars with one iteration, and `per_step` for each one more. `per_pair`: of the sums and maps over
rows, instructions of the innermost loop for a row and a centroid.
"""

import json
import os
import sys
import tempfile

import aot_check
import triton
from aot_check import DTYPES, accumulator, chunks, kernels

scalar, rows, sums = kernels("dkm_scalar_kernels"), kernels("dkm_rows_kernels"), kernels("dkm_sums_kernels")
TABLES = {
    "p_weights": "*i64",
    "p_grads": "*i64",
    "p_tensors": "*i64",
    "p_owner": "*i32",
    "p_clusters": "*i32",
    "p_codes": "*i64",
}


def cells_of(K):
    return "*u8" if K <= 256 else "*i16"


def types(dtype, aligned=True):
    return {"DT": DTYPES[dtype][0], "ACC": DTYPES[accumulator(dtype)][0], "ALIGNED": aligned}


def tables(dtype, K=16, gradient=True):
    bucket = scalar.bucket_of(K)
    constants = {
        "GRADIENT": gradient,
        "BUCKET": bucket,
        "CELLS": scalar.cells_of(bucket),
        "INTERVALS": scalar.INTERVALS,
        "LANES": scalar.LANES,
    }
    return scalar.interval_tables, {**TABLES, "p_cells": cells_of(K)}, {**constants, **types(dtype)}


def map_scalars(dtype, K=16, gradient=False, aligned=True):
    bucket = scalar.bucket_of(K)
    constants = {"GRADIENT": gradient, "BUCKET": bucket, "CELLS": scalar.cells_of(bucket), "BLOCK": scalar.BLOCK}
    pointers = {**TABLES, "p_cells": cells_of(K), "p_targets": "*i64"}
    return (
        scalar.map_scalars,
        pointers,
        {**constants, **types(dtype, aligned), **({} if gradient else {"p_grads": None})},
    )


def tile(dtype, d, K, summed):
    J, R = rows.tile_of_centroids(K, d, summed)
    return {"D": d, "J": J, "R": R, **types(dtype)}


def cluster_sums(dtype, mode, d=1, K=16, euclidean=True, last=False):
    constants = tile(dtype, d, K, True)
    mode = getattr(sums, mode)
    last = last or mode is sums.UPSTREAM
    planes = 0 if constants["J"] >= K else 2 if mode is not sums.RECUR else 3 + last * d
    absent = {**({} if last else {"p_grads": None}), **({} if planes else {"p_states": None})}
    more = {
        "MODE": mode,
        "PLANES": planes,
        "WITH_G": last,
        "EUCLIDEAN": euclidean,
        "SUMS": sums.sums_of_mode(mode.value, d, euclidean and d == 1),
    }
    return sums.cluster_sums, TABLES, {**constants, **more, **absent}


def row_states(dtype, d=1, K=64, mean=True, last=False):
    more = {
        "MEAN": mean,
        "WITH_G": last,
        "PLANES": 3 + last * d if mean else 2,
        "EUCLIDEAN": True,
        **({} if last else {"p_grads": None}),
    }
    return sums.row_states, TABLES, {**tile(dtype, d, K, False), **more}


def merge_sums(dtype, mode, d=1, K=16):
    fields = sums.sums_of_mode(getattr(sums, mode).value, d, d == 1)
    constants = {
        "MODE": getattr(sums, mode),
        "SIGNED": d == 1,
        "SUMS": fields,
        "COLUMNS": 8,
        "LANES": 128 if fields <= 5 else 32,
    }
    return (
        sums.merge_sums,
        {**TABLES, **({"p_out": "*fp64"} if mode == "JACOBIAN" else {})},
        {**constants, **tile(dtype, d, K, True)},
    )


def map_rows(dtype, d=1, K=16, gradient=False, euclidean=True):
    constants = {"GRADIENT": gradient, "EUCLIDEAN": euclidean, **({} if gradient else {"p_grads": None})}
    return (rows.map_rows, {**TABLES, "p_targets": "*i64"}, {**constants, **tile(dtype, d, K, False)})


def nearest(dtype, d=1, K=16):
    return rows.nearest_centroids, TABLES, tile(dtype, d, K, False)


def variants(everything):
    """(arguments of the function first named)"""
    modes = "UPDATE", "UPSTREAM", "RECUR"
    for dtype in DTYPES if everything else ("fp32", "bf16"):
        for gradient in (False, True):
            yield map_scalars, dtype, {"gradient": gradient}
        if dtype == accumulator(dtype):
            yield cluster_sums, dtype, {"mode": "UPDATE"}
            yield map_rows, dtype, {"gradient": True, "euclidean": False}
            yield tables, dtype, {}
            yield merge_sums, dtype, {"mode": "UPDATE"}
    if not everything:
        yield cluster_sums, "fp32", {"mode": "RECUR", "d": 4, "K": 64, "last": True}
        yield row_states, "fp32", {"d": 4, "last": True}
        yield nearest, "fp32", {"d": 4}
        return
    for K in (2, 256, 4096):
        yield map_scalars, "fp32", {"K": K}
    yield map_scalars, "fp32", {"K": 256, "gradient": True}
    yield map_scalars, "fp32", {"aligned": False}
    yield tables, "fp32", {"K": 4096, "gradient": False}
    for mode in (*modes[1:], "JACOBIAN"):
        yield cluster_sums, "fp32", {"mode": mode}
        yield merge_sums, "fp32", {"mode": mode}
    for d in (4, 8):
        for mode in modes:
            yield cluster_sums, "fp32", {"mode": mode, "d": d, "last": mode == "RECUR"}
        for gradient in (False, True):
            yield map_rows, "fp32", {"d": d, "gradient": gradient}
    yield cluster_sums, "fp32", {"mode": "UPDATE", "K": 64}
    yield cluster_sums, "fp32", {"mode": "UPDATE", "K": 1}
    yield cluster_sums, "fp32", {"mode": "UPDATE", "d": 16}
    yield merge_sums, "fp32", {"mode": "UPDATE", "d": 8}
    yield row_states, "fp32", {"mean": False}
    yield row_states, "fp32", {"d": 8, "last": True}
    yield map_rows, "bf16", {"d": 3}
    yield nearest, "fp32", {}
    yield nearest, "bf16", {"d": 8, "K": 256}


def spans(kernel):
    """The innermost loops as ranges of indices."""
    loops = [(start, end) for end, start in kernel.targets.items() if start < end]
    return [range(s, e + 1) for s, e in loops if not any((s, e) != (t, f) and s <= t and f <= e for t, f in loops)]


def step_loop(kernel):
    """Once round the loop over the iterations: it divides, but reads and writes no weights."""
    loops = [
        path
        for path in kernel.loops()
        if kernel.count("MUFU", "RCP", path) and not kernel.count("LDG", "128", path) + kernel.count("STG", "", path)
    ]
    return max(loops, key=len, default=[])


def check(make, dtype, change, architecture):
    kernel, pointers, constants = make(dtype, **change)
    options = {"maxnreg": scalar.most_registers(constants["GRADIENT"], dtype == "fp64")} if make is map_scalars else {}
    found = aot_check.disassemble(aot_check.compile_kernel(kernel, pointers, constants, dtype, architecture, **options))
    row = {
        "kernel": make.__name__,
        "dtype": dtype,
        "variant": " ".join(f"{k}={v}" for k, v in change.items()),
        "arch": architecture,
        "registers": found.registers,
        "stack": found.stack + found.local,
        "spills": found.count("LDL") + found.count("STL"),
    }
    if make is map_scalars:
        main = found.main_loop()
        weights = found.count("LDG", "128", main) * 16 // DTYPES[dtype][1] // (2 if change.get("gradient") else 1)
        steps = step_loop(found) if change.get("gradient") else []
        row.update(
            weights=weights,
            stores128=found.count("STG", "128", main),
            per_weight=round(len(main) / weights, 2) if weights else None,
            per_step=round(len(steps) / weights, 2) if weights else None,
        )
    elif make in (cluster_sums, map_rows, row_states, nearest):
        loop = max(spans(found), key=len, default=())
        row["per_pair"] = round(len(loop) / (constants["J"] * constants["R"] // (32 * chunks.WARPS)), 2)
    return row


if __name__ == "__main__":
    architectures = [int(a) for a in sys.argv[1:]] or [90, 80, 100]
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        assert not triton.knobs.runtime.interpret
        print(json.dumps([check(*variant, a) for a in architectures for variant in variants(a == 90)]))
