"""DKM's CUDA kernels as compiled for sm_90: how they use shared memory, and few instructions for each weight. Needs
nvcc, but no GPU."""

import re

import pytest
import sass
from sass import TYPES

from r2kernels import lists

# By interval: instructions per weight where each lane has bins of its own (float32, 16 bit), and where two warps share
# them; float4 additions in bins, arrays read.
SUMS = {
    "UpdateSums": (36.5, 36.5, 62.5, 1, 1),
    "UpstreamSums": (40, 41, 66, 1, 2),
    "RecurSums<false>": (44, 44, 70.5, 0.5, 1),
    "RecurSums<true>": (53, 54, 80, 0.5, 2),
    "JacobianSums": (47, 47, 73, 1.5, 1),
}
OUTPUT, GRADIENT = (22.5, 23), (38, 39)  # the gradient for each iteration
# By rows: instructions for a pair of a row and a centroid in the sweep that sums exponentials, d = 1, 2, 4, 8.
PAIRS = {"output": (12, 16, 25, 40), "gradient": (24, 34, 60, 105)}


@pytest.fixture(scope="module")
def scalar():
    return sass.compiled("dkm_scalar.cu")


def find(kernels, kind, name, dtype, own=True):
    name = re.sub("<(.).*", lambda m: f"ILb{int(m[1] == 't')}E", name)
    found = [
        kernel
        for mangled, kernel in kernels.items()
        if re.search(rf"dkm_{kind}_kernelI(.*{name}E+(Lb{own:d}ELb0E)?)?{TYPES[dtype][0]}EEv", mangled)
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op", SUMS)
def test_sums(scalar, op, dtype):
    """A weight's bin is read and written in 128 bits, of two numbers in 64, and two weights wait together for it."""
    *most, _, additions, arrays = SUMS[op]
    kernel, size = find(scalar, "sums", op, dtype), TYPES[dtype][1]
    loop = kernel.main_loop()
    assert kernel.count("LDG", "128", loop) == kernel.count("LDG", path=loop) == max(size // 2, 1) * arrays
    assert kernel.count("STS", "128", loop) + kernel.count("STS", "64", loop) / 2 == 8 * additions
    assert kernel.count("MUFU", path=loop) == 16
    assert kernel.per_weight(size, arrays) <= most[size == 2]
    assert kernel.registers <= 128 and not kernel.spills  # 16 warps


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op", SUMS)
def test_sums_of_two_warps(scalar, op, dtype):
    """Lanes that share bins ask each other first, three times for a weight; all of it without a branch to make sure
    that the warp is together, and 12 warps are resident."""
    *_, most, additions, arrays = SUMS[op]
    kernel = find(scalar, "sums", op, dtype, own=False)
    loop = kernel.main_loop_through(("STS.128", "STS.64"))
    assert kernel.count("LDG", path=loop) == max(TYPES[dtype][1] // 2, 1) * arrays
    assert kernel.count("STS", "128", loop) + kernel.count("STS", "64", loop) / 2 == 8 * additions
    assert kernel.count("SHFL", path=loop) == 24 and kernel.count("REDUX", path=loop) == 1
    assert kernel.count("BRA.DIV", path=loop) == 0
    assert len(loop) / 8 <= most
    assert kernel.registers <= 168 and not kernel.spills


@pytest.mark.parametrize("dtype", TYPES)
def test_output(scalar, dtype):
    kernel, size = find(scalar, "output", "", dtype), TYPES[dtype][1]
    assert kernel.count("STG", "128", kernel.main_loop()) == max(size // 2, 1)
    assert kernel.per_weight(size) <= OUTPUT[size == 2]


@pytest.mark.parametrize("dtype", TYPES)
def test_gradient(scalar, dtype):
    """All iterations in registers, written once."""
    kernel, size = find(scalar, "gradient", "Lb1", dtype), TYPES[dtype][1]
    assert kernel.count("STG", "128") == max(size // 2, 1)
    step = max(kernel.loops(), key=lambda path: kernel.count("MUFU", path=path))
    assert (
        kernel.count("MUFU", path=step) == 16 and kernel.count("LDG", path=step) == kernel.count("STG", path=step) == 0
    )
    assert len(step) / 8 <= GRADIENT[size == 2]


@pytest.mark.parametrize(
    ("rows", "chunk", "chunks"),
    [
        ([11_678_912], 11 * 1024, 1037),
        ([2**26], 63 * 1024, 1041),
        ([1000], 1024, 1),
        ([50 * 1024 + 1] * 21, 1024, 1071),  # three waves of chunks of 1024 rows, or two of 2048
        ([48 * 1024 + 1] * 22, 3 * 1024, 374),  # one wave of chunks of 3072 rows, or three of 1024
        ([3000 * 1024 + 1] * 3, 9 * 1024, 1002),
    ],
)
def test_chunks_make_whole_waves(rows, chunk, chunks):
    assert lists._whole_waves(rows) == chunk
    assert sum([-(-n // chunk) for n in rows]) == chunks


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("d", [1, 2, 4, 8])
def test_rows(kind, d):
    kernel = next(
        kernel
        for mangled, kernel in sass.compiled("dkm_rows.cu").items()
        if f"dkm_row_{kind}_kernelILi{d}Ef" in mangled
    )
    sweeps, at_once = [], 4 if d <= 2 else 2
    for path in kernel.loops():
        if (
            kernel.count("MUFU.EX2", path=path) == at_once
            and kernel.count("LDS", path=path)
            and not kernel.count("LDG", path=path)
        ):
            sweeps.append(len(path) / at_once)
    assert sweeps and max(sweeps) <= PAIRS[kind][(1, 2, 4, 8).index(d)], sweeps
