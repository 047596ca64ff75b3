"""The predictions for an H200: what is read from a loop, and the arithmetic."""

import sys
from pathlib import Path

import pytest
import sass


@pytest.fixture(scope="module")
def predict():
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import predict

    sys.path.pop(0)
    return predict


LOOP = [
    "LDG.E.128.CONSTANT",
    "LDG.E.128.CONSTANT",
    "LDG.E.U8",
    "MUFU.EX2",
    "FADD",
    "LDS.128",
    "LDS",
    "STS.64",
    "STG.E.128",
    "STG.E.128",
    "STG.E.U16",
    "BRA",
]


def test_a_loop(predict):
    """Eight float32 weights: two loads and stores of 128 bits, 12 instructions, one of them special; for a warp
    4 + 1 + 2 wavefronts. Of a thread 16 + 16 + 1 bytes are under way."""
    operands = ["R4, [R2.64]", "R8, [R2.64]", "R12, [R2.64]"] + [""] * (len(LOOP) - 3)
    kernel = sass.Kernel("k", 64, 0, 0, [("", *of) for of in zip(LOOP, operands, strict=True)], {len(LOOP) - 1: 0})
    found = predict.row("cuda", "op", "float", kernel, kernel.main_loop(), 1)
    assert found == {
        "backend": "cuda",
        "op": "op",
        "dtype": "float32",
        "registers": 64,
        "spills": False,
        "bytes": (32 + 34) / 8,
        "instructions": 12 / 8,
        "mufu": 1 / 8,
        "shared": 7 / 8 / 32,
        "in flight": 32 * 32 * 33 / 1024,
        "warps": 32,
        "latency": 12 / (32 * 32 * 8),
    }
    assert predict.row("cuda", "op", "bf16", kernel, kernel.main_loop(), 2)["bytes"] == (32 + 34) / 8
    assert predict.row("cuda", "op", "float", kernel, [3, 4], 1) is None


CHAIN = [
    ("", "LDG.E.128.CONSTANT", "R4, [R2.64]"),
    ("", "CCTL.E.PF2", "[R2]"),
    ("", "BAR.SYNC.DEFER_BLOCKING", "0x0"),
    ("", "LDS.64", "R8, [R4]"),
    ("", "FSETP.GT.AND", "P0, PT, R9, R5, PT"),
    ("@P0", "FADD", "R8, R8, R6"),
    ("", "STS.64", "[R4], R8"),
    ("", "BRA", "0x0"),
]


def test_a_chain(predict):
    """Each instruction waits for what it reads: the load from memory (fetched ahead into the second cache), the second
    of the two numbers from shared memory, the predicate, the sum. The other warp of the bins adds from the barrier to
    the store."""
    kernel = sass.Kernel("k", 128, 0, 0, CHAIN, {len(CHAIN) - 1: 0})
    loop = kernel.main_loop()
    assert loop == kernel.main_loop_through(("STS.64",)) == list(range(len(CHAIN)))
    *times, lap = sass.alone(kernel, loop)
    assert times == [1, 2, 3, 301, 331, 336, 341, 342] and lap == 342
    found = predict.row("cuda", "op", "float", kernel, loop, 1, 12, 0.5)
    assert found["warps"] == 12
    assert found["latency"] == (342 + (341 - 3) + 2 * 0.5 * 4 * predict.TURN) / (12 * 32 * 4)


@pytest.mark.parametrize(
    ("cost", "limit", "seconds"),
    [
        ({"bytes": 8}, "memory", 8 / 4.8e12),
        ({"bytes": 4, "instructions": 60}, "instructions", 60 / (132 * 128 * 1.9e9)),
        ({"bytes": 2, "mufu": 2}, "MUFU", 2 / (132 * 16 * 1.9e9)),
        ({"bytes": 4, "shared": 0.5}, "shared memory", 0.5 / (132 * 1.9e9)),
        ({"bytes": 4, "latency": 0.5}, "latency", 0.5 / (132 * 1.9e9)),
    ],
)
def test_the_dearest_decides(predict, cost, limit, seconds):
    found = {"bytes": 0, "instructions": 0, "mufu": 0, "shared": 0, "latency": 0, **cost}
    microseconds, what, part = predict.predicted(found, 1000)
    assert (
        what == limit
        and microseconds == pytest.approx(1e9 * seconds)
        and part == pytest.approx(found["bytes"] / 4.8e12 / seconds)
    )


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("void partial_kernel<SoftReader<false>, float>(r2::List, r2::Forward)", "Soft<false> forward"),
        ("void map_kernel<Kure, __nv_bfloat16, true>(r2::List, r2::Backward)", "Kure backward, adding"),
        ("void map_kernel<SoftOp<true>, float, false>(r2::List, r2::Backward)", "Soft<true> backward"),
        ("void dkm_output_kernel<float>(r2::List, r2::Clusters, r2::Pass)", "dkm output"),
    ],
)
def test_labels(predict, name, label):
    assert predict.label(name) == label
