"""LSQ, EWGS, PACT, DoReFa as a user calls them.

Values by hand, gradients by finite differences, peers, parameters, errors, torch.compile.
"""

import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import r2kernels as r2
from r2kernels import ops, reference

CALLS = {
    "lsq": lambda x, **more: r2.lsq(x, 0.3, 3, **more),
    "ewgs": lambda x, **more: r2.ewgs(x, -1.0, 1.5, 3, delta=0.1, **more),
    "pact": lambda x, **more: r2.pact(x, 1.2, 3, **more),
    "dorefa": lambda x, **more: r2.dorefa(x, 3, **more),
}
FUNCTIONS = pytest.mark.parametrize("name", CALLS)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("x", "bits", "signed", "expected"),
    [
        ([-9, -4.2, -1.5, -0.5, 0.5, 1.5, 2.5, 3.4, 9], 3, True, [-4, -4, -2, 0, 0, 2, 2, 3, 3]),
        ([-1, 0.4, 0.6, 6.5, 7.5, 9], 3, False, [0, 0, 1, 6, 7, 7]),
        ([-3, -0.1, 0.0, 0.1, 3], 1, True, [-1, -1, 1, 1, 1]),
        ([-1, 0.4, 0.6, 3], 1, False, [0, 0, 1, 1]),
    ],
)
def test_lsq_by_hand(x, bits, signed, expected):
    """A step of 2: half to even, clipped to its codes."""
    assert r2.lsq(2 * double(*x), 2.0, bits, signed=signed).tolist() == [2.0 * e for e in expected]


def test_lsq_gradients_by_hand():
    x = double(-9, -1.25, 0.75, 3, 3.25, 9).requires_grad_()
    s = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    y = r2.lsq(x, s, 3)
    assert y.tolist() == [-4, -1, 1, 3, 3, 3]
    y.backward(double(1, 2, 4, 8, 16, 32))
    assert x.grad.tolist() == [0, 2, 4, 8, 0, 0]  # within [-4, 3], before rounding
    assert s.grad.item() == pytest.approx((-4 * 1 + 0.25 * 2 + 0.25 * 4 + 0 * 8 + 3 * 16 + 3 * 32) / math.sqrt(6 * 3))


def test_ewgs_by_hand():
    """Two bits between -1 and 2: z of 0, 0.1, 0.4, 0.8, 1 over levels of a third."""
    x = double(-1.5, -0.7, 0.2, 1.4, 2.5).requires_grad_()
    low, high = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-1.0, 2.0))
    y = r2.ewgs(x, low, high, 2, delta=0.5)
    assert_close(y, double(-1, -1, -1 / 3, 1 / 3, 1))
    y.backward(double(1, 1, -1, 1, 1))
    g = double(0, 2 + 0.5 * 2 * 0.1, -2 + 0.5 * 2 * (0.4 - 1 / 3), 2 + 0.5 * 2 * (0.8 - 2 / 3), 0)
    assert_close(x.grad, g / 3)
    assert_close(low.grad, (g * (x.detach() - 2)).sum() / 9)
    assert_close(high.grad, -(g * (x.detach() + 1)).sum() / 9)
    assert_close(r2.ewgs(x, -1.0, 2.0, 2, signed=False), double(0, 0, 1 / 3, 2 / 3, 1))


def test_pact_by_hand():
    x = double(-1, 0, 0.4, 1.6, 3, 5).requires_grad_()
    alpha = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    y = r2.pact(x, alpha, 2)
    assert y.tolist() == [0, 0, 0, 2, 3, 3]
    g = double(1, 2, 4, 8, 16, 32)
    y.backward(g, retain_graph=True)
    assert x.grad.tolist() == [0, 2, 4, 8, 0, 0] and alpha.grad.item() == 48
    alpha.grad = None
    r2.pact(x, alpha, 2, plus=True).backward(g)
    assert alpha.grad.item() == pytest.approx(48 + (4 * -0.4 + 8 * 0.4) / 3)


def test_dorefa_by_hand():
    w = double(-2, -0.3, 0.1, 1, 2).requires_grad_()
    t = w.detach().tanh()
    m = t.max()
    y = r2.dorefa(w, 2)
    assert_close(y, 2 * (3 * (t / (2 * m) + 0.5)).round() / 3 - 1)
    assert y.tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1, 1])
    g = double(1, 2, 3, 4, 5)
    y.backward(g)
    slope = 1 - t**2
    expected = g * slope / m
    expected[[0, -1]] -= t[[0, -1]].sign() * slope[[0, -1]] / m**2 * (g * t).sum() / 2
    assert_close(w.grad, expected)
    w.grad = None
    r2.dorefa(w, 2, detach_max=True).backward(g)
    assert_close(w.grad, g * slope / m)
    one = r2.dorefa(double(-2, 0, 1), 1)
    assert one.tolist() == [-1, 1, 1]
    assert r2.dorefa(torch.zeros(4), 3).tolist() == pytest.approx([1 / 7] * 4)


def surrogate(name, x, p, residual):
    """What straight-through differentiates: rounding replaced by the addition of what it added."""
    if name == "lsq":
        v = (x / p[0]).clamp(-4, 3)
        return p[0] * (v + (v.round() - v if residual is None else residual)), v.round() - v
    if name == "ewgs":
        v = 7 * ((x - p[0]) / (p[1] - p[0])).clamp(0, 1)
        return (2 * (v + (v.round() - v if residual is None else residual)) - 7) / 7, v.round() - v
    v = x.clamp(min=0).minimum(p[0]) / (p[0] / 7)
    return p[0] / 7 * (v + (v.round() - v if residual is None else residual)), v.round() - v


@pytest.mark.parametrize(("name", "start"), [("lsq", [0.31]), ("ewgs", [-0.9, 1.3]), ("pact", [1.07])])
def test_finite_differences(name, start):
    g = torch.Generator().manual_seed(0)
    x, grad = torch.randn(400, generator=g, dtype=torch.float64), torch.randn(400, generator=g, dtype=torch.float64)
    p = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in start]
    x.requires_grad_()
    more = {"plus": True} if name == "pact" else {}
    y = getattr(r2, name)(x, *p, 3, **more)
    y.backward(grad)
    residual = surrogate(name, x.detach(), [q.detach() for q in p], None)[1]
    scale = 1 / math.sqrt(400 * 3) if name == "lsq" else 1
    step = 1e-6

    def value(x, p):
        return (surrogate(name, x, p, residual)[0] * grad).sum().item()

    for i, q in enumerate(p):
        values = [q.detach().clone() for q in p]
        differences = []
        for sign in (1, -1):
            values[i] = q.detach() + sign * step
            differences.append(value(x.detach(), values))
        # numbers beside an edge of the clipping change sides within the step; none here
        assert q.grad.item() == pytest.approx(
            scale * (differences[0] - differences[1]) / (2 * step), rel=1e-6, abs=1e-6
        )
    for j in range(0, 400, 37):
        moved = [x.detach().clone(), x.detach().clone()]
        moved[0][j] += step
        moved[1][j] -= step
        found = (value(moved[0], [q.detach() for q in p]) - value(moved[1], [q.detach() for q in p])) / (2 * step)
        assert x.grad[j].item() == pytest.approx(found, abs=1e-7)


def test_pytorchs_own_lsq():
    """At points off the half steps, where it masks before and after rounding alike."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    v = x / 0.11
    x = x[((v - v.floor() - 0.5).abs() > 1e-3) & ((v + 8).abs() > 0.51) & ((v - 7).abs() > 0.51)]
    found = []
    for function in (
        lambda x, s: r2.lsq(x, s, 4),
        lambda x, s: torch._fake_quantize_learnable_per_tensor_affine(
            x, s, torch.zeros(1), -8, 7, 1 / math.sqrt(x.numel() * 7)
        ),
    ):
        x_, s = x.clone().requires_grad_(), torch.tensor([0.11], requires_grad=True)
        y = function(x_, s.reshape(()) if not found else s)
        y.backward(torch.linspace(-1, 1, len(x)))
        found.append((y.detach(), x_.grad, s.grad))
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)


@FUNCTIONS
def test_strides_and_kinds_are_kept(name):
    x = torch.randn(2, 4, 5, 6)
    for view in (
        x.to(memory_format=torch.channels_last),
        x.permute(3, 1, 0, 2),
        x[0, 0, 0, 0],
        x[:, ::2],
        x[:1].expand(3, 4, 5, 6),
    ):
        y = CALLS[name](view)
        assert y.shape == view.shape and y.dtype == view.dtype
        assert y.stride() == torch.empty_like(view).stride()
        assert_close(y, CALLS[name](view.contiguous()))
    ys = CALLS[name]([x, x[0].double().float()])
    assert isinstance(ys, list) and [y.shape for y in ys] == [x.shape, x[0].shape]
    assert CALLS[name](x.bfloat16()).dtype == torch.bfloat16


def test_channels():
    w = [torch.randn(4, 3, 2, 2).requires_grad_(), torch.randn(5, 4).requires_grad_()]
    steps = [torch.rand(4).add(0.1).requires_grad_(), torch.rand(5).add(0.1).requires_grad_()]
    ys = r2.lsq(w, steps, 4, axis=0)
    torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    for x, s, y in zip(w, steps, ys, strict=True):
        for c in range(len(s)):
            x_, s_ = x[c].detach().requires_grad_(), s[c].detach().requires_grad_()
            y_ = r2.lsq(x_, s_, 4)
            y_.sum().backward()
            assert_close(y[c], y_)
            assert_close(x.grad[c], x_.grad)
            assert_close(s.grad[c], s_.grad)
    last = r2.lsq(w[0], torch.rand(2).add(0.1), 4, axis=-1)
    assert last.shape == w[0].shape
    assert_close(r2.lsq(w, [0.1, torch.tensor(0.2)], 4, axis=0)[1], r2.lsq(w[1], 0.2, 4))


@pytest.mark.parametrize(
    "value",
    [
        0.2,
        torch.tensor(0.2),
        torch.tensor([0.2, 0.3]),
        [0.2, 0.3],
        [torch.tensor(0.2), 0.3],
        torch.tensor([0.2, 0.3]).bfloat16(),
    ],
)
def test_parameters_of_every_form(value):
    xs = [torch.randn(9), torch.randn(3, 3)]
    if isinstance(value, torch.Tensor):
        value = value.clone().requires_grad_()
    ys = r2.lsq(xs, value, 4)
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        one = value if isinstance(value, float) or (isinstance(value, torch.Tensor) and value.dim() == 0) else value[i]
        assert torch.equal(y, r2.lsq(x, one.item() if isinstance(one, torch.Tensor) else one, 4))
    if isinstance(value, torch.Tensor):
        sum(y.sum() for y in ys).backward()
        assert value.grad.shape == value.shape and value.grad.dtype == value.dtype


def test_learned_numbers_of_a_list_get_their_gradients():
    xs = [torch.randn(9), torch.randn(3, 3)]
    steps = [torch.tensor(0.2, requires_grad=True), torch.tensor(0.3, requires_grad=True)]
    sum(y.sum() for y in r2.lsq(xs, steps, 4)).backward()
    for x, s in zip(xs, steps, strict=True):
        alone = s.detach().requires_grad_()
        r2.lsq(x, alone, 4).sum().backward()
        assert_close(s.grad, alone.grad)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: r2.lsq(x, 0.1, 0), ValueError, r"bits must be an int in 1..8, got 0"),
        (lambda x: r2.lsq(x, 0.1, 9), ValueError, r"bits must be an int in 1..8, got 9"),
        (lambda x: r2.pact(x, 0.1, 2.0), TypeError, r"bits must be an int in 1..8, got 2.0"),
        (lambda x: r2.dorefa(x, True), TypeError, r"bits must be an int in 1..8, got True"),
        (lambda x: r2.lsq(x, 0.0, 4), ValueError, r"step must be a finite number > 0, got 0"),
        (lambda x: r2.lsq(x, -0.5, 4), ValueError, r"step must be a finite number > 0, got -0.5"),
        (lambda x: r2.lsq(x, math.inf, 4), ValueError, r"step must be a finite number > 0, got inf"),
        (lambda x: r2.lsq(x, "a", 4), TypeError, r"step must be a number or a tensor, got str"),
        (lambda x: r2.lsq(x, torch.ones(3), 4), ValueError, r"step has shape \(3,\); allowed are"),
        (
            lambda x: r2.lsq(x, torch.ones(3), 4, axis=0),
            ValueError,
            r"step has shape \(3,\); allowed is \(\) or \(4,\)",
        ),
        (lambda x: r2.lsq([x, x], [0.1, 0.0], 4), ValueError, r"step\[1\] must be a finite number > 0, got 0"),
        (
            lambda x: r2.lsq([x, x], [0.1], 4, axis=0),
            ValueError,
            r"step has 1 values; allowed is one for each of the 2 tensors",
        ),
        (lambda x: r2.lsq(x, torch.ones((), dtype=torch.int64), 4), TypeError, r"step has dtype torch.int64"),
        (lambda x: r2.lsq(x, torch.ones((), device="meta"), 4), ValueError, r"step is on meta but"),
        (lambda x: r2.lsq(x, 0.1, 4, axis=2), ValueError, r"axis=2 does not exist: x has shape \(4, 5\)"),
        (lambda x: r2.lsq([x, x[0]], 0.1, 4, axis=1), ValueError, r"axis=1 does not exist: x\[1\] has shape \(5,\)"),
        (lambda x: r2.lsq(x, 0.1, 4, axis=0.5), TypeError, r"axis must be an int or None, got 0.5"),
        (lambda x: r2.ewgs(x, 1.0, 1.0, 4), ValueError, r"lower must be below upper, got lower=1 and upper=1"),
        (
            lambda x: r2.ewgs([x, x], [0.0, 2.0], 1.0, 4),
            ValueError,
            r"lower must be below upper, got lower=2 and upper=1",
        ),
        (lambda x: r2.ewgs(x, 0.0, 1.0, 4, delta=-1), ValueError, r"delta must be a finite number >= 0, got -1"),
        (
            lambda x: r2.ewgs(x, 0.0, 1.0, 4, delta=torch.tensor(0.1, requires_grad=True)),
            ValueError,
            r"delta requires grad",
        ),
        (lambda x: r2.pact(x, -1, 4), ValueError, r"alpha must be a finite number > 0, got -1"),
        (lambda x: r2.dorefa(x.long(), 4), TypeError, r"w has dtype torch.int64"),
        (
            lambda x: r2.lsq([x, x.double()], 0.1, 4),
            TypeError,
            r"x\[1\] has dtype torch.float64 but x\[0\] has torch.float32",
        ),
        (lambda x: r2.pact([], 1.0, 4), ValueError, r"x is an empty sequence"),
        (lambda x: r2.ewgs(x[:0], 0.0, 1.0, 4), ValueError, r"x is empty \(shape \(0, 5\)\)"),
        (
            lambda x: r2.lsq(3.0, 0.1, 4),
            TypeError,
            r"x must be a floating-point tensor or a sequence of them, got float",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(4, 5))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_what_a_tensor_holds_is_not_read(bad):
    p = torch.tensor(bad)
    assert r2.lsq(torch.randn(5), p, 4).isnan().all() and r2.pact(torch.randn(5), p, 4).isnan().all()
    assert r2.ewgs(torch.randn(5), torch.tensor(1.0), 1 + p if bad != 0 else torch.tensor(1.0), 4).isnan().all()


@FUNCTIONS
def test_nan_and_one_element(name):
    x = torch.tensor([0.3, math.nan, 0.7])
    y = CALLS[name](x)
    assert y[1].isnan() and (name == "dorefa" or not y[[0, 2]].isnan().any())
    assert CALLS[name](torch.tensor(0.4)).shape == ()


@FUNCTIONS
def test_nothing_is_saved_but_x_and_numbers(name):
    x = torch.randn(1000, requires_grad=True)
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        CALLS[name](x)
    assert {t.data_ptr() for t in saved if t.numel() > 8} == {x.data_ptr()}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("lsq", (torch.tensor([0.3, 0.2]), 3, True, None, "lsq")),
        ("lsq", (torch.rand(7).add(0.1), 2, True, 0, "seq")),
        ("ewgs", (*torch.tensor([[-1.0, -2], [1, 2], [0.1, 0]]), 4, True)),
        ("pact", (torch.tensor([1.0, 0.8]), 2, True)),
        ("pact", (torch.tensor([1.0, -0.8]), 2, True, True)),
        ("rescale", (torch.tensor([1.0, -0.8]), True)),
        ("dorefa", (torch.tensor([[1.5, 1.0], [1.7, 2.0]]), 2, False)),
    ],
)
def test_opcheck(name, arguments):
    xs = [torch.randn(4, 5), torch.randn(3, 2, 2)]
    torch.library.opcheck(ops.op[name + "_fwd"], (xs, *arguments))
    torch.library.opcheck(ops.op[name + "_bwd"], ([torch.randn_like(x) for x in xs], xs, *arguments))


@FUNCTIONS
def test_compiled_in_one_graph(name):
    x = torch.randn(6, 7, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(lambda x: CALLS[name](x).square().sum(), fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(x), x)[0]
    assert_close(found, torch.autograd.grad(CALLS[name](x).square().sum(), x)[0])


def test_compiled_with_a_learned_step():
    x, s = torch.randn(6, 7, requires_grad=True), torch.tensor(0.2, requires_grad=True)

    def loss(x, s):
        return sum(y.square().sum() for y in r2.lsq([x, 2 * x], s, 4))

    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, s), (x, s))
    for a, b in zip(found, torch.autograd.grad(loss(x, s), (x, s)), strict=True):
        assert_close(a, b)


numbers = st.floats(-50, 50, width=32)


@settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(numbers, min_size=1, max_size=40), st.floats(2**-6, 4, width=32), st.integers(1, 8), st.booleans())
def test_lsq_properties(values, step, bits, signed):
    """Within the range at most half a step away; on its levels nothing moves; the reference agrees to the bit."""
    x, s = torch.tensor(values), torch.tensor(step)
    y = r2.lsq(x, s, bits, signed=signed)
    assert torch.equal(y, reference.lsq(x, s, bits, signed=signed))
    assert torch.equal(r2.lsq(y, s, bits, signed=signed), y) or bits == 1
    low, high = (
        (-1, 1) if bits == 1 and signed else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    )
    inside = (x >= low * s) & (x <= high * s)
    most = 1.0 if bits == 1 and signed else 0.5
    assert ((y - x).abs()[inside] <= most * s * (1 + 1e-5)).all()
    assert (y >= low * s).all() and (y <= high * s).all()
