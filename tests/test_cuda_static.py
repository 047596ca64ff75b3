"""The CUDA kernels as compiled for sm_90: no spills, 128-bit accesses, and few instructions for each weight. Needs nvcc, but no GPU.

At full bandwidth an H200 has time for 30 instructions per float32 weight that it reads, 15 per 16-bit one, and twice that where it writes too.
"""
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import sass

SOURCES = Path(__file__).parent.parent / "csrc"
TYPES = {"float32": ("f", 4), "bfloat16": ("13__nv_bfloat16", 2), "float16": ("6__half", 2)}
IN_FLIGHT = 4               # 128-bit loads of each array at a time

# instructions per weight of a full tile: float32, 16 bit
READ = {
    "LInfReader": (2, 3),                           # and 2 more where the batch holds a new maximum
    "MarginReader": (6, 7),
    "SoftReader<false>": (11.5, 12.5),
    "SoftReader<true>": (15.5, 16.5),
    "MomentsReader": (9, 10),
}
# DKM: instructions per weight (float32, 16 bit) of the passes by interval, where every lane has bins of its own; float4 additions in them; arrays read
SUMS = {"UpdateSums": (40, 40, 1, 1), "UpstreamSums": (44, 45, 1, 2), "RecurSums<false>": (48, 48, .5, 1), "RecurSums<true>": (59, 59, .5, 2), "JacobianSums": (53, 53, 1.5, 1)}
OUTPUT, GRADIENT = (22.5, 23), (38, 39)          # the gradient for each iteration
# and by rows: of a pair of a row and a centroid, in the sweep that sums exponentials, where d = 1, 2, 4, 8
PAIRS = {"dkm_row_output": (12, 16, 25, 40), "dkm_row_gradient": (24, 34, 60, 105)}
WRITE = {"LInf": (7.5, 9), "Margin": (7.5, 9), "Soft<false>": (11.5, 13), "Soft<true>": (11.5, 13), "Kure": (6.5, 8)}


def find_nvcc():
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which("nvcc", path=os.pathsep.join(f"{home}/bin" for home in homes if home)) or shutil.which("nvcc")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    nvcc, cuobjdump = find_nvcc(), sass.find_cuobjdump()
    if nvcc is None or cuobjdump is None:
        pytest.skip("no nvcc was found" if nvcc is None else "no cuobjdump was found")
    found = {}
    for source in sorted((SOURCES / "cuda").glob("*.cu")):
        cubin = tmp_path_factory.mktemp("cubin") / f"{source.stem}.cubin"
        subprocess.run([nvcc, "-std=c++17", "-O3", "-DR2_WITH_CUDA", "-arch=sm_90", "-cubin", "-o", cubin, source], check=True, timeout=600)
        found.update(sass.kernels(cubin, cuobjdump))
    return found


def find(kernels, kind, name, dtype, add=None):
    """The one kernel with these template arguments, by its mangled name."""
    name, _, flag = name.rstrip(">").partition("<")
    argument = {"": "", "false": "ILb0E", "true": "ILb1E"}[flag]
    pattern = rf"{kind}I.*\d{name}(Op)?{argument}E+{TYPES[dtype][0]}" + ("" if add is None else f"Lb{add:d}E") + "EEv"
    found = [kernel for mangled, kernel in kernels.items() if re.search(pattern, mangled)]
    assert len(found) == 1, pattern
    return found[0]


def test_nothing_spills(kernels):
    assert len(kernels) > 50
    assert [k.name for k in kernels.values() if k.spills or k.stack] == []


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("reader", READ)
def test_forward(kernels, reader, dtype):
    kernel, size = find(kernels, "partial_kernel", reader, dtype), TYPES[dtype][1]
    loop = kernel.main_loop()
    assert kernel.count("LDG", "128", loop) == kernel.count("LDG", path=loop) == IN_FLIGHT
    assert kernel.per_weight(size) <= READ[reader][size == 2]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("formula", WRITE)
def test_backward(kernels, formula, dtype, add):
    kernel, size = find(kernels, "map_kernel", formula, dtype, add), TYPES[dtype][1]
    loop, arrays = kernel.main_loop(), 1 + add
    assert kernel.count("LDG", "128", loop) == kernel.count("LDG", path=loop) == IN_FLIGHT * arrays
    assert kernel.count("STG", "128", loop) == kernel.count("STG", path=loop) == IN_FLIGHT
    assert kernel.per_weight(size, arrays) <= WRITE[formula][size == 2] + 3 * add


def by_interval(kernels, kind, name, dtype):
    found = [kernel for mangled, kernel in kernels.items() if re.search(rf"dkm_{kind}_kernelI.*{name}E?{TYPES[dtype][0]}EEv", mangled)]
    assert len(found) == 1
    return found[0]


def loops(kernel, opcode):
    """The ways round the loops of a kernel, the one with the most of these instructions last."""
    paths = [path for path in map(kernel._cycle, {to for i, to in kernel.targets.items() if to <= i}) if path]
    return sorted(paths, key=lambda path: kernel.count(opcode, path=path))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op", SUMS)
def test_dkm_sums(kernels, op, dtype):
    """Bins are read and written in 128 bits (64 for two numbers), once for each weight; tables in 32 bits, from other banks."""
    *most, additions, arrays = SUMS[op]
    kernel, size = by_interval(kernels, "sums", re.sub("<(.).*", lambda m: f"ILb{int(m[1] == 't')}E", op), dtype), TYPES[dtype][1]
    loop = kernel.main_loop()
    assert kernel.count("LDG", "128", loop) == kernel.count("LDG", path=loop) == max(size // 2, 1) * arrays
    assert kernel.count("STS", "128", loop) + .5 * kernel.count("STS", "64", loop) == 8 * additions
    assert kernel.count("MUFU", path=loop) == 16
    assert kernel.per_weight(size, arrays) <= most[size == 2]


@pytest.mark.parametrize("dtype", TYPES)
def test_dkm_maps(kernels, dtype):
    output, size = by_interval(kernels, "output", "", dtype), TYPES[dtype][1]
    assert output.count("STG", "128", output.main_loop()) == max(size // 2, 1)
    assert output.per_weight(size) <= OUTPUT[size == 2]
    gradient = by_interval(kernels, "gradient", "Lb1", dtype)
    assert gradient.count("STG", "128") == max(size // 2, 1)
    step = loops(gradient, "MUFU")[-1]
    assert gradient.count("MUFU", path=step) == 16 and gradient.count("LDG", path=step) == 0
    assert len(step) / 8 <= GRADIENT[size == 2]


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize(("d", "most"), enumerate(zip(*PAIRS.values(), strict=True)))
def test_dkm_rows(kernels, kind, d, most):
    kernel = next(k for mangled, k in kernels.items() if f"{kind}_kernelILi{2**d}Ef" in mangled)
    sweep = max((path for path in loops(kernel, "MUFU") if kernel.count("LDS", path=path) and not kernel.count("LDG", path=path)), key=lambda path: len(path))
    assert len(sweep) / kernel.count("MUFU.EX2", path=sweep) <= most[list(PAIRS).index(kind)]
