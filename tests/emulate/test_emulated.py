"""The CUDA kernels on the host: that what is wrong is seen, and a selection of every family by the error budget, in
both orders of blocks and threads, whose results are the same bits. `make emulate` runs the whole."""

import ctypes

import budget
import cases
import pytest
import torch
from emulate import build, emulated

pytestmark = [
    pytest.mark.usefixtures("nan_filled", "one_thread"),
    pytest.mark.skipif(emulated.why_not() is not None, reason=f"cannot be built: {emulated.why_not()}"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INPUTS = ["below a vector", "unaligned", "every second", "mixed list"]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(scope="module")
def wrong():
    """name of a case of wrong.cu -> (what its launch says, 192 numbers)"""
    source = build.translate(build.HERE / "wrong.cu", "tests/emulate/wrong.cu")
    library = ctypes.CDLL(str(build.linked("wrong.so", [(source, build.DEVICE)])))
    library.run.restype = ctypes.c_char_p

    def run(name, falling=False):
        library.emulate_order(falling)
        memory = torch.zeros(196)
        out = memory[-memory.data_ptr() % 16 // 4 :][:192]
        return library.run(name.encode(), ctypes.c_void_p(out.data_ptr())).decode(), out

    return run


REPORTED = {
    "a thread has ended": "wrong.cu:32; 1 threads, from 5 on, ended",
    "barriers apart": "wrong.cu:38; 32 threads, from 32 on, at the block's meeting point",
    "lanes apart": "32 threads, from 0 on, at the warp's meeting point tests/emulate/wrong.cu:47; 32 threads, from 1 on, ",
    "outside of the mask": "a lane reads of one that is not in the mask",
    "misaligned": "a misaligned access",
    "misaligned in shared memory": "a misaligned access",
    "index": "an index out of bounds",
    "overrun": "a block wrote behind an array in shared memory",
    "overrun of dynamic memory": "a block wrote",
    "dynamic memory beyond 48 KB": "49168 bytes of dynamic shared memory, of which 49152 are allowed",
    "both beyond 48 KB": "8192 + 41984 bytes of shared memory, of which 49152 are allowed",
    "beyond the machine": "invalid value",
    "no blocks": "a grid of 0 blocks of 64 threads",
}


@pytest.mark.parametrize("case", REPORTED)
def test_what_is_wrong_is_reported(case, wrong):
    for falling in (False, True):
        said, _ = wrong(case, falling)
        assert REPORTED[case] in said, said
        assert wrong("right", falling)[0] == "no error"


def test_what_is_right_is_not(wrong):
    for falling in (False, True):
        said, out = wrong("right", falling)
        sums = [float(sum(range(1, 33))), float(sum(range(33, 64)))]
        assert said == "no error" and torch.equal(out.view(3, 2, 32), torch.tensor(sums).view(2, 1).expand(3, 2, 32))
    assert wrong("opted in")[0] == "no error"


@pytest.mark.parametrize("case", ["without a barrier", "order of blocks"])
def test_dependence_on_an_order_shows(case, wrong):
    rising, falling = (wrong(case, falling)[1] for falling in (False, True))
    assert not torch.equal(rising.nan_to_num(-1), falling.nan_to_num(-1))


def test_shared_memory_is_nan_at_first(wrong):
    assert wrong("uninitialised")[1][:64].isnan().all()


def both(run):
    """The result of the kernels, of which both orders give the same bits."""
    results = []
    for order in emulated.ORDERS:
        with order.chosen():
            results.append(run())
    return results


@dtypes
@pytest.mark.parametrize("op", cases.ONE_EACH, ids=lambda op: op.function)
def test_losses(op, dtype):
    draws = budget.draws(op, INPUTS, dtype)
    budget.hold(draws[:: len(draws) // 12], emulated.ORDERS)
