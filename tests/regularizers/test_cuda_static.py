"""The CUDA kernels of bin_reg, msqe, partial_l2 and terms as compiled for sm_90: no spills, 128-bit accesses, few
instructions for each weight. Needs nvcc, but no GPU."""

import re

import pytest
import sass
from sass import TYPES

IN_FLIGHT = 4  # 128-bit loads of each array at a time

# Instructions per weight of a full tile: float32, 16 bit. A true division costs 9 of them, an addition in a bin 6.
READ = {"MsqeReader": (19, 20), "PartialL2Reader": (4, 5.5), "bins": (25, 26.5)}
WRITE = {"Msqe": (18, 20.5), "PartialL2": (4.5, 6.5), "bins": (26, 28)}
ADD = 3
DIGITS = (6.5, 7.5)


@pytest.fixture(scope="module")
def kernels():
    return sass.compiled("regularizers_terms.cu")


def find(kernels, pattern, dtype, add=None):
    found = [
        kernel
        for mangled, kernel in kernels.items()
        if re.search(pattern + TYPES[dtype][0] + ("" if add is None else f"Lb{add:d}E") + "E", mangled)
    ]
    assert len(found) == 1, pattern
    return found[0]


def test_nothing_spills(kernels):
    others = [sass.compiled(f"regularizers_{name}.cu") for name in ("rank", "sample")]
    found = kernels | others[0] | others[1]
    assert len(found) > 40
    assert [k.name for k in found.values() if k.spills or k.stack] == []


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("reader", READ)
def test_forward(kernels, reader, dtype):
    pattern = r"bins_kernelI" if reader == "bins" else rf"partial_kernelI.*\d{reader}E"
    kernel, size = find(kernels, pattern, dtype), TYPES[dtype][1]
    loop = kernel.main_loop()
    assert kernel.count("LDG", "128", loop) == kernel.count("LDG", path=loop) == IN_FLIGHT
    assert kernel.per_weight(size) <= READ[reader][size == 2]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("formula", WRITE)
def test_backward(kernels, formula, dtype, add):
    pattern = r"bins_map_kernelI" if formula == "bins" else rf"map_kernelI.*\d{formula}(Op)?E+"
    kernel, size = find(kernels, pattern, dtype, add), TYPES[dtype][1]
    loop, arrays = kernel.main_loop(), 1 + add
    assert kernel.count("LDG", "128", loop) == kernel.count("LDG", path=loop) == IN_FLIGHT * arrays
    assert kernel.count("STG", "128", loop) == kernel.count("STG", path=loop) == IN_FLIGHT
    assert kernel.per_weight(size, arrays) <= WRITE[formula][size == 2] + ADD * add


@pytest.mark.parametrize("dtype", TYPES)
def test_a_bin_is_read_and_written_at_once(kernels, dtype):
    """Count and sum together, in 64 bits."""
    kernel, size = find(kernels, "bins_kernelI", dtype), TYPES[dtype][1]
    loop = kernel.main_loop()
    weights = IN_FLIGHT * 16 // size
    assert kernel.count("LDS", path=loop) <= weights and kernel.count("STS", path=loop) <= weights
    assert kernel.count("LDS.64") >= weights and kernel.count("STS.64") >= weights


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_terms_read_and_write_once(kernels, dtype, add):
    """The weights stay in registers while the gradients of all terms are summed."""
    kernel, size = find(kernels, "terms_map_kernelI", dtype, add), TYPES[dtype][1]
    packs = 2 if size == 4 else 1
    assert kernel.count("LDG", "128") == packs * (1 + add) and kernel.count("STG", "128") == packs


@pytest.mark.parametrize("digit", ["Digit", "GivenDigit"])
@pytest.mark.parametrize("dtype", TYPES)
def test_digits(dtype, digit):
    """Of a search, and of `digits`, which reads all that has 16 bits as bfloat16."""
    read = "bfloat16" if digit == "GivenDigit" and dtype == "float16" else dtype
    name, size = TYPES[read]
    pattern = rf"digits_kernelI{name}.*\d{digit}E"
    (kernel,) = [k for mangled, k in sass.compiled("regularizers_rank.cu").items() if re.search(pattern, mangled)]
    loop = kernel.main_loop()
    assert kernel.count("LDG", "128", loop) == kernel.count("LDG", path=loop) == IN_FLIGHT
    assert kernel.per_weight(size) <= DIGITS[size == 2]
