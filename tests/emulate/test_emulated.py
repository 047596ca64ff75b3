"""The CUDA kernels on the host: that what is wrong is seen, and a selection of every family by the error budget, in
both orders of blocks and threads, whose results are the same bits. `make emulate` runs the whole."""

import ctypes
import itertools

import budget
import cases
import pytest
import torch
from dkm import test_backends as dkm
from dkm.problems import draw, made, solve, truth
from emulate import build, emulated
from quantizers import calls
from quantizers import test_backends as quantizers
from regularizers import test_terms as terms

import r2kernels as r2
from r2kernels import ops, reference
from r2kernels.functional.regularizers import sampled_std

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
    "lanes apart": "from 0 on, at the warp's meeting point tests/emulate/wrong.cu:47; 32 threads, from 1 on, ended",
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


def the_same_bits(run):
    """What `run` gives, a list of tensors, in both orders."""
    rising, falling = (in_order(order, run) for order in emulated.ORDERS)
    assert all(map(quantizers.same, rising, falling))
    return rising


def in_order(order, run):
    with order.chosen():
        return run()


@dtypes
@pytest.mark.parametrize("op", cases.ONE_EACH, ids=lambda op: op.function)
def test_losses(op, dtype):
    """And the kernels that add to the gradients of others."""
    draws = budget.draws(op, INPUTS, dtype)[::4]
    budget.hold(draws, emulated.ORDERS)
    the_same_bits(lambda: [t for one in draws[-1:] for t in budget.evaluate(one).tensors])
    if op.columns or op.function == "kure":
        budget.hold(budget.draws(op, INPUTS[:3], dtype, accumulate=True)[::6], emulated.ORDERS)


@pytest.mark.parametrize("op", [op for op in cases.ONE_EACH if op.columns], ids=lambda op: op.function)
@pytest.mark.parametrize("geometry", [(2, "output"), (3, "contiguous")], ids=str)
def test_losses_of_columns(geometry, op):
    draws = budget.draws(op, ["unaligned", "transposed", "mixed list"], torch.bfloat16, geometry=geometry)[::4]
    budget.hold(draws, emulated.ORDERS)


@dtypes
def test_terms(dtype):
    names = ("l_inf", "margin", "soft_min_max", "kure", "bin_reg", "msqe", "partial_l2")
    draws = [
        terms.drawn(names, inputs, seed, [3 if n in ("bin_reg", "msqe") else 0 for n in names], dtype, "cpu")
        for inputs in ("unaligned", "mixed list")
        for seed in range(4)
    ]
    budget.hold(draws, emulated.ORDERS, terms.evaluate, terms.truth)
    the_same_bits(lambda: terms.evaluate(draws[-1]).tensors)


@dtypes
def test_statistics(dtype):
    ws = cases.make("mixed list", dtype)
    with r2.use_backend("reference"):
        exact = [*r2.weight_stats([w.double() for w in ws])[:-1], sampled_std([w.double() for w in ws])]
    found = the_same_bits(lambda: [*r2.weight_stats(ws)[:-1], sampled_std(ws)])
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-7, equal_nan=True)


@dtypes
def test_digits(dtype):
    ws = [*cases.make("mixed list", dtype), *cases.make("several chunks", dtype)]
    for place, prefix in ((0, 0), (1, 0x3C), (dtype.itemsize - 1, 0x3C if dtype.itemsize == 2 else 0x3C23D7)):
        prefix = torch.full((len(ws),), prefix)
        (found,) = the_same_bits(lambda p=prefix, place=place: [ops.call["digits_fwd"](ws, p, place)])
        assert torch.equal(found, reference.digits_fwd(ws, prefix, place))


@dtypes
@pytest.mark.parametrize("flag", [True, False], ids=["flag", "plain"])
@pytest.mark.parametrize("op", quantizers.OPS)
def test_quantizers(op, flag, dtype):
    draws = [calls.call(op, calls.mixed(dtype, "cpu", seed), 3, flag, seed=seed) for seed in (0, 100)]
    budget.hold(draws, emulated.ORDERS, calls.gradients, calls.truth)
    ys, *_ = calls.expected(draws[0])
    found = the_same_bits(lambda: [*draws[0].forward(), *itertools.chain(*draws[0].backward())])
    assert op == "dorefa" or all(map(quantizers.same, found, ys))


@dtypes
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels(axis, dtype):
    for xs in (calls.many_axes(dtype, "cpu"), calls.channels_last(calls.many_axes(dtype, "cpu"))):
        one = calls.call("lsq", xs, 3, True, axis)
        ys, gradients, (of_step,) = calls.expected(one)
        found = the_same_bits(lambda one=one: [*one.forward(), *one.backward()[0]])
        assert all(map(quantizers.same, found, [*ys, *gradients]))
        (own,) = the_same_bits(lambda one=one: list(one.backward()[1]))
        assert ((own - of_step).abs() <= 64 * torch.finfo(own.dtype).eps * (1 + of_step.abs())).all()


@pytest.mark.parametrize(("metric", "d", "layout"), dkm.PROBLEMS, ids=str)
def test_every_pass_of_dkm(metric, d, layout, plain):
    """In float64 to 1e-12, and in all dtypes the same bits."""
    for K, dtype in itertools.product((5, 40), DTYPES):
        ws = [
            calls.numbers(shape, torch.float64, "cpu", i).to(dtype)
            for i, shape in enumerate([(8, 7, 3), (d,), (3001,)])
        ]
        ws = [w[..., : w.shape[-1] // d * d] if w.numel() % d else w for w in ws]
        problem = draw(ws, K, 0.3, metric, d, layout)
        the_same_bits(lambda problem=problem: [t for found in dkm.passes(problem).values() for t in found])
        if dtype == torch.float64:
            dkm.compare(problem, plain, emulated.RISING)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("metric", "d", "layout"), dkm.PROBLEMS[:4], ids=str)
def test_budget_of_dkm(metric, d, layout, dtype):
    drawn = [
        draw(made(name, dtype, "cpu", d, seed), K, sharpness, metric, d, layout, seed)
        for name, K, sharpness, seed in itertools.product(("ties", "unaligned"), (3, 16), (1, 0.03), range(1))
    ]
    budget.hold(drawn, emulated.ORDERS, solve, truth)


@pytest.mark.parametrize(("d", "K"), [(1, 5), (1, 300), (2, 16), (3, 700)])
def test_assign(d, K):
    ws = [calls.numbers((4099 // d * d,), torch.float32, "cpu"), calls.numbers((K, 5, d), torch.float32, "cpu", 1)]
    c = (
        calls.numbers((K, d), torch.float32, "cpu", 2).squeeze(1)
        if d == 1
        else calls.numbers((K, d), torch.float32, "cpu", 2)
    )
    with r2.use_backend("reference"):
        expected = r2.assign(ws, [c, c], cluster_dim=d)
    found = the_same_bits(lambda: list(r2.assign(ws, [c, c], cluster_dim=d)))
    assert all(map(torch.equal, found, expected))
