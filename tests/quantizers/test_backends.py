"""The quantizers of every backend: what is to be the reference's bits is, gradients are held to it by budget.py."""

import math

import budget
import cases
import pytest
import torch
from parametrize import first, first_dtypes
from quantizers.calls import call, channels_last, dorefa_scale, expected, gradients, many_axes, mixed, numbers, truth

import r2kernels as r2
from r2kernels.reference import quantizers as formulas
from r2kernels.reference.columns import accumulator

pytestmark = pytest.mark.usefixtures("nan_filled", "one_thread")

OPS = [op.function for op in cases.of("quantizers")]
EXACT = [op for op in OPS if op != "dorefa"]  # forward the bits of the reference; lsq and pact backward too
BITS = range(1, 9)

SPECIALS = [math.nan, math.inf, -math.inf]

every_op = pytest.mark.parametrize("op", OPS)
every_flag = pytest.mark.parametrize("flag", [True, False], ids=["flag", "plain"])


def same(a, b):
    """Equal numbers, NaN where NaN is."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def at_half_steps(one, dtype):
    """The call with its first 2,000 numbers and more at, and next to, the borders of LSQ's codes."""
    step = one.parameters[0].double()
    x = (torch.arange(-600, 600, dtype=torch.float64, device=step.device) / 2 * step[8]).to(dtype)
    far = torch.full_like(x, math.inf)
    x = (
        torch.cat([x, torch.nextafter(x, far), torch.nextafter(x, -far)])
        if dtype in (torch.float32, torch.float64)
        else x
    )
    return one._replace(xs=[*one.xs[:8], x, *one.xs[9:]], gs=[*one.gs[:8], torch.ones_like(x), *one.gs[9:]])


@first_dtypes(torch.float32, torch.bfloat16)
@first("bits", (1, 2, 4, 8), BITS)
@every_flag
@pytest.mark.parametrize("op", EXACT)
def test_the_bits_of_the_reference(op, flag, bits, dtype, device, variants):
    one = call(op, mixed(dtype, device), bits, flag)
    if op == "lsq":
        one = at_half_steps(one, dtype)
    ys, gradients, _ = expected(one)
    for v in variants:
        with v.chosen():
            for x, y, e in zip(one.xs, one.forward(), ys, strict=True):
                assert same(y, e), (v, tuple(x.shape), (y.double() - e.double()).abs().max())
            assert op == "ewgs" or all(map(same, one.backward()[0], gradients)), v
            assert all(b.isfinite().all() for b in one.backward()[0]), (
                f"{v}: a number of the gradients' memory was not written"
            )


@first_dtypes(torch.float32, torch.bfloat16)
@first("bits", (1, 3), BITS)
@pytest.mark.parametrize("form", [lambda xs: xs, channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels(axis, form, bits, dtype, device, variants):
    xs = form(many_axes(dtype, device))
    one = call("lsq", xs, bits, True, axis)
    ys, gradients, (g_step,) = expected(one)
    for v in variants:
        with v.chosen():
            found, (step,) = one.backward()
            assert all(map(same, one.forward(), ys)) and all(map(same, found, gradients)), v
        assert step.shape == g_step.shape and step.dtype == g_step.dtype
        assert ((step - g_step).abs() <= 64 * torch.finfo(step.dtype).eps * (1 + g_step.abs())).all(), v


LEVELS = [("ternary", 2), ("seq", 2), ("seq", 4), ("seq", 1)]


@first_dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize(("kind", "bits"), LEVELS)
def test_levels(kind, bits, dtype, device, variants):
    """Of tensors, of channels of any place, of groups of one to 130 numbers, and with NaN, inf and steps of no use."""
    sizes = [(70, 1), (33, 7), (40, 16), (19, 32), (600, 128), (5, 130)]
    groups = [numbers(shape, dtype, device, i) for i, shape in enumerate(sizes)]
    special = call("lsq", [numbers((9, 33), dtype, device)], bits, True, 0, kind=kind)
    special.xs[0][:3, 4] = torch.tensor(SPECIALS, dtype=dtype)
    special.parameters[0][5:8] = torch.tensor([0, -1, math.nan])
    for one in (
        at_half_steps(call("lsq", mixed(dtype, device), bits, True, kind=kind), dtype),
        *[call("lsq", many_axes(dtype, device), bits, True, axis, kind=kind) for axis in (0, 1, -1)],
        call("lsq", groups, bits, True, 0, kind=kind),
        special,
    ):
        ys, gradients, (g_step,) = expected(one)
        for v in variants:
            with v.chosen():
                found, (step,) = one.backward()
                assert all(map(same, one.forward(), ys)) and all(map(same, found, gradients)), v
            close = (step - g_step).abs() <= 64 * torch.finfo(step.dtype).eps * (1 + g_step.abs())
            assert (close | (step.isnan() & g_step.isnan()) | (step == g_step)).all(), v


@first_dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize(("kind", "bits"), LEVELS[:3])
def test_budget_of_levels(kind, bits, dtype, device, variants):
    draws = [call("lsq", mixed(dtype, device, 100 * seed), bits, True, seed=seed, kind=kind) for seed in range(4)]
    budget.hold(draws, variants, gradients, truth)


@first_dtypes(torch.float32)
@pytest.mark.parametrize("value", [1e-40, 1e-30, 1e-19, 3e17, 1e19, 1e30, 3e38])
def test_steps_of_any_size(value, dtype, device, variants):
    """Quotients that are subnormal, infinite or rounded twice elsewhere."""
    xs = [
        x * 4 * value
        for x in (
            numbers((5000,), dtype, device),
            numbers((999,), dtype, device, 1) * 1e9,
            numbers((999,), dtype, device, 2) * 1e-9,
        )
    ]
    for op in EXACT:
        one = call(op, xs, 3, True)
        scale = torch.full_like(one.parameters[0], value)
        parameters = {"lsq": [scale], "ewgs": [-scale, scale, scale / value], "pact": [scale]}[op]
        one = one._replace(parameters=parameters)
        ys = expected(one)[0]
        for v in variants:
            with v.chosen():
                assert all(map(same, one.forward(), ys)), (v, op)


def scaled(x, bits):
    """n (t / (2 m) + 1/2) of DoReFa in float64."""
    t = x.double().tanh()
    return (2**bits - 1) * (t / (2 * formulas.dorefa_scale(x.double().abs().amax(), bits)) + 0.5)


@first_dtypes(torch.float32, torch.float16)
@first("bits", (1, 2, 8), BITS)
@pytest.mark.parametrize("spread", [1e-4, 0.1, 1.0, 30.0])
def test_dorefa(spread, bits, dtype, device, variants):
    """A code may be another where rounding decides, and only there."""
    one = call("dorefa", [(x * spread) for x in mixed(dtype, device)], bits, False)
    one = one._replace(parameters=[dorefa_scale(one.xs, bits)])
    ys = expected(one)[0]
    for v in variants:
        with v.chosen():
            found = one.forward()
        for x, y, e in zip(one.xs, found, ys, strict=True):
            assert y.shape == e.shape and y.dtype == e.dtype
            differs = y != e
            if bits > 1 and differs.any():
                z = scaled(x, bits)[differs]
                assert ((z - z.floor() - 0.5).abs() <= 4 * 2**bits * torch.finfo(accumulator(dtype)).eps).all(), v
            else:
                assert not differs.any(), v


@first_dtypes(torch.float32, torch.bfloat16)
@first("bits", (3,), (1, 2, 3, 8))
@every_flag
@every_op
def test_budget(op, flag, bits, dtype, device, variants):
    draws = [call(op, mixed(dtype, device, 100 * seed), bits, flag, seed=seed) for seed in range(4)]
    budget.hold(draws, variants, gradients, truth)


@pytest.mark.parametrize("op", EXACT)
def test_sums_of_many(op, device, variant):
    """300,000 terms of one sign: no long chain of additions."""
    x = numbers((300_001,), torch.float32, device)
    one = call(op, [x], 4, op != "lsq")
    one = one._replace(gs=[torch.full_like(x, 0.1)])
    exact, scales = truth(one)
    for i, a in enumerate(one.backward()[1]):
        name = f"dparameter {i}"
        assert (a.double() - exact[name]).abs() <= 8 * torch.finfo(torch.float32).eps * scales[name]


@first_dtypes(torch.float32, torch.float16)
@pytest.mark.parametrize("place", ["x", "g"])
@every_op
def test_nan_and_inf(op, place, dtype, device, variant):
    """What the reference gives, number by number."""
    for flag in (True, False):
        for bits in (1, 4):
            xs = [numbers((n,), dtype, device, n) for n in (5, 70, 4100) for _ in SPECIALS]
            one = call(op, xs, bits, flag)
            for i, t in enumerate(one.xs if place == "x" else one.gs):
                t[-1] = t[2] = SPECIALS[i % 3]
            if op == "dorefa":
                one = one._replace(parameters=[dorefa_scale(one.xs, bits)])
            same_specials(one, op)


def same_specials(one, op):
    ys, gradients, of_parameters = expected(one)
    found, own = one.backward()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert all(
            torch.equal(kind(a), kind(b))
            for a, b in zip([*one.forward(), *found, *own], [*ys, *gradients, *of_parameters], strict=True)
        ), kind.__name__
    if op in EXACT:
        assert all(map(same, one.forward(), ys))
    if op in ("lsq", "pact"):
        assert all(map(same, found, gradients))


@pytest.mark.parametrize("op", EXACT)
def test_steps_of_no_use_give_nan(op, device, variant):
    """And leave their neighbours alone."""
    values = [1.0, 0.0, -1.0, math.nan, math.inf, 1.0]
    one = call(op, [numbers((n,), torch.float32, device, n) for n in (3, 40, 5000, 7, 8, 9)], 3, True)
    bad = torch.tensor(values, device=device)
    same_specials(one._replace(parameters=[bad] if len(one.parameters) == 1 else [-bad, bad * 0.5, bad * 0]), op)
    ys = one._replace(parameters=[bad] if len(one.parameters) == 1 else [-bad, bad * 0.5, bad * 0]).forward()
    assert (
        [y[0].isnan().item() or y.isnan().all().item() for y in ys[1:4]] == [True] * 3
        and not ys[0].isnan().any()
        and not ys[5].isnan().any()
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_a_channel_of_no_use_gives_nan(axis, device, variant):
    x = numbers((9, 9), torch.float32, device)
    step = torch.tensor([0.1, 0, 0.2, -1, math.nan, 0.3, 0.1, 0.1, 0.1], device=device)
    for one in (call("lsq", [x], 3, True, axis), call("lsq", [x.t().contiguous().t()], 3, True, axis)):
        same_specials(one._replace(parameters=[step]), "lsq")


@first_dtypes(torch.float32)
@every_op
def test_the_same_bits_each_time(op, dtype, device, variant):
    """And for any number of threads."""
    for axis in (None, 0, 1) if op == "lsq" else (None,):
        xs = (
            mixed(dtype, device) + [numbers((300, 401), dtype, device)]
            if axis is None
            else [*many_axes(dtype, device), numbers((300, 401), dtype, device)]
        )
        one = call(op, xs, 4, False, axis)
        before = one.forward(), *one.backward()
        for threads in (1, 2, 3) if variant.backend == "cpu" else (1,):
            torch.set_num_threads(threads)
            again = one.forward(), *one.backward()
            assert all(
                torch.equal(a, b)
                for part, other in zip(before, again, strict=True)
                for a, b in zip(part, other, strict=True)
            ), threads


@pytest.mark.parametrize("ties", [1, 2, 5])
@first("detach", (False,), (False, True))
def test_maxima_share_the_correction(ties, detach, device, variant):
    x = numbers((20_000,), torch.float64, device).clamp(-2, 2)
    x[torch.arange(ties) * 3999] = torch.tensor([3.0, -3.0, 3.0, 3.0, -3.0], dtype=torch.float64, device=device)[:ties]
    one = call("dorefa", [x], 4, detach)
    assert one.parameters[0][0, 1] == ties
    error = (one.backward()[0][0] - expected(one)[1][0]).abs().max()
    assert error <= 1e-12 * one.gs[0].abs().sum()


@pytest.mark.parametrize("function", OPS)
def test_public_functions(function, device, variant):
    """Strides are kept; an expanded gradient, and a list, do as well as anything."""
    arguments = {"lsq": (0.3,), "ewgs": (-1.0, 1.5), "pact": (1.2,), "dorefa": ()}[function]
    x = numbers((4, 6, 5, 3), torch.float32, device).contiguous(memory_format=torch.channels_last)
    for w in (x, x[:, ::2], x[0, 0, 0, 0], x[:1].expand(3, 6, 5, 3)):
        single, many = (
            w.detach().clone().requires_grad_(),
            [w.detach().requires_grad_(), numbers((5,), torch.float32, device).requires_grad_()],
        )
        y = getattr(r2, function)(single, *arguments, 3)
        ys = getattr(r2, function)(many, *arguments, 3)
        assert y.shape == w.shape and torch.equal(y, ys[0])
        if w is x:
            assert y.stride() == x.stride()
        y.sum().backward()
        (ys[0].sum() + ys[1].sum()).backward()
        with r2.use_backend("reference"):
            other = w.detach().clone().requires_grad_()
            getattr(r2, function)(other, *arguments, 3).sum().backward()
        for found in (single.grad, many[0].grad):
            assert torch.allclose(found, other.grad, rtol=1e-5, atol=1e-5)


@every_op
def test_gradcheck_of_the_parameters(op, device, variant):
    """Autograd through the public functions in float64, against the reference's own."""
    leaves = {"lsq": [0.3], "ewgs": [-1.0, 1.5], "pact": [1.2], "dorefa": []}[op]
    results = []
    for layer in (r2, r2.reference):
        x = numbers((40, 33), torch.float64, device).requires_grad_()
        parameters = [torch.tensor(v, dtype=torch.float64, device=device, requires_grad=True) for v in leaves]
        y = getattr(layer, op)(x, *parameters, 4)
        results.append(torch.autograd.grad(y, [x, *parameters], numbers((40, 33), torch.float64, device, 5)))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(*results, strict=True))
