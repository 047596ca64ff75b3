"""The CUDA kernels as compiled for sm_90: no spills, 128-bit accesses, and few instructions for each weight. Needs
nvcc, but no GPU.

At full bandwidth an H200 has time for 30 instructions per float32 weight that it reads, 15 per 16-bit one, and twice
that where it writes too.
"""

import re

import pytest
import sass
from sass import TYPES

IN_FLIGHT = 4  # 128-bit loads of each array at a time

# instructions per weight of a full tile: float32, 16 bit
READ = {
    "LInfReader": (2, 3),  # and 2 more where the batch holds a new maximum
    "MarginReader": (6, 7),
    "SoftReader<false>": (11.5, 12.5),
    "SoftReader<true>": (15.5, 16.5),
    "MomentsReader": (9, 10),
}
WRITE = {"LInf": (7.5, 9), "Margin": (7.5, 9), "Soft<false>": (11.5, 13), "Soft<true>": (11.5, 13), "Kure": (6.5, 8)}


@pytest.fixture(scope="module")
def kernels():
    return {
        name: kernel
        for source in sorted(sass.SOURCES.glob("*.cu"))
        for name, kernel in sass.compiled(source.name).items()
    }


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


def loops_in_flight(kernel, size):
    """(128-bit loads, other loads, instructions per number read) of the loops with four loads or more."""
    for path in kernel.loops():
        wide = kernel.count("LDG", "128", path)
        single = kernel.count("LDG", path=path) - wide
        if wide + single >= IN_FLIGHT:
            yield wide, single, len(path) / (wide * 16 / size + single)


MOST_OF_COLUMNS = 20  # instructions per weight, however the rows of a column lie; and ADDING more
ADDING = 3


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("reader", [r for r in READ if r != "MomentsReader"])
def test_forward_of_columns(kernels, reader, dtype):
    """Columns that lie side by side and rows of short runs are read one by one, runs of packs in 128 bits."""
    kernel, size = find(kernels, "partial_kernel", reader, dtype), TYPES[dtype][1]
    loops = list(loops_in_flight(kernel, size))
    assert len([cost for wide, single, cost in loops if single and not wide]) >= 2
    assert len([cost for wide, single, cost in loops if wide and not single]) >= 2
    assert max(cost for *_, cost in loops) <= MOST_OF_COLUMNS


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("formula", [f for f in WRITE if f != "Kure"])
def test_backward_of_columns_and_of_gradients_out_of_step(kernels, formula, dtype, add):
    """And where weights and gradients are not aligned alike, four loads or more are in flight."""
    kernel, size = find(kernels, "map_kernel", formula, dtype, add), TYPES[dtype][1]
    loops = list(loops_in_flight(kernel, size))
    assert len([cost for wide, single, cost in loops if single and not wide]) >= 3
    assert len([cost for wide, single, cost in loops if wide and not single]) >= 2
    assert max(cost for *_, cost in loops) <= (MOST_OF_COLUMNS + ADDING) / (1 + add)
    assert all(single >= IN_FLIGHT * (1 + add) for _, single, _ in loops if single)
