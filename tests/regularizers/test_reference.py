"""bin_reg, msqe, partial_l2 and weight_terms as a user calls them: values worked out by hand, identities, derivatives, wrong arguments, torch's machinery."""

import math
import re

import cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import dtypes, examples, lists
from torch.testing import assert_close

import r2kernels as r2
from r2kernels import ops, reference
from r2kernels.reference.quantizers import code

LAYERS = pytest.mark.parametrize("layer", [reference, r2], ids=["reference", "r2kernels"])

# function, arguments, W, value, dL/dW, dL/dstep
LITERALS = [
    # codes 0, -1, 1 (clipped), 0 (half to even); errors 0.2, 0.3, 2, 0.5
    (
        "msqe",
        {"step": 1, "bits": 2},
        [0.2, -0.7, 3, 0.5],
        (0.04 + 0.09 + 4 + 0.25) / 4,
        [0.1, 0.15, 1, 0.25],
        -2 / 4 * (-0.3 + 2),
    ),
    # codes 1, -1, 1: 0 is positive
    ("msqe", {"step": 1, "bits": 1}, [0, -0.5, 2], (1 + 0.25 + 1) / 3, [-2 / 3, 1 / 3, 2 / 3], -2 / 3 * (-1 - 0.5 + 1)),
    # codes -2 (clipped), 1, 1 of 1.5 (clipped from 2)
    ("msqe", {"step": 2, "bits": 2}, [-6, 2, 3], (4 + 0 + 1) / 3, [-4 / 3, 0, 2 / 3], -2 / 3 * (4 + 0 + 1)),
    ("msqe", {"step": 0.5, "bits": 8}, [1, -1.25, 0.75], (0.0625 * 2) / 3, [0, -1 / 6, -1 / 6], -2 / 3 * (0.5 - 0.5)),
    ("msqe", {"step": 3, "bits": 4}, [0, 0], 0, [0, 0], 0),
    ("bin_reg", {"step": 1, "bits": 2}, [0.2, -0.7, 3, 0.5], (0.04 + 0.25) / 2 + 0.09 + 4, [0.2, 0.6, 4, 0.5], None),
    ("bin_reg", {"step": 1, "bits": 1}, [0, -0.5, 2], (1 + 1) / 2 + 0.25, [-1, 1, 1], None),
    ("bin_reg", {"step": 2, "bits": 8}, [5], 1, [2], None),
    ("partial_l2", {"fraction": 0.5}, [1, -3, 2], (1 + 4) / 3, [2 / 3, 0, 4 / 3], None),
    ("partial_l2", {"fraction": 1}, [1, -3, 2], 14 / 3, [2 / 3, -2, 4 / 3], None),
    ("partial_l2", {"fraction": 1e-9}, [1, -3, 2], 1 / 3, [2 / 3, 0, 0], None),
    ("partial_l2", {"fraction": 1 / 3}, [1, -1, 2], 2 / 3, [2 / 3, -2 / 3, 0], None),
    ("partial_l2", {"fraction": 0.1}, [-7], 49, [-14], None),
]


@LAYERS
@pytest.mark.parametrize(("function", "options", "w", "value", "dw", "dstep"), LITERALS, ids=str)
def test_literal(function, options, w, value, dw, dstep, layer):
    w = torch.tensor(w, dtype=torch.float64, requires_grad=True)
    if dstep is not None:
        options = {**options, "step": torch.tensor(options["step"], dtype=torch.float64, requires_grad=True)}
    loss = getattr(layer, function)(w, **options)
    loss.backward()
    assert_close(loss.item(), float(value))
    assert_close(w.grad, torch.tensor(dw, dtype=torch.float64))
    if dstep is not None:
        assert_close(options["step"].grad.item(), float(dstep))


def drawn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@LAYERS
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_bin_reg_is_the_sum_of_squared_offsets_and_variances(bits, layer):
    """As its paper writes it."""
    w, step = drawn(40, 25), 0.4
    c = code(w / step, bits, True)
    bins = [w[c == v] for v in c.unique()]
    expected = sum((b.mean() - step * v).square() + b.var(correction=0) for b, v in zip(bins, c.unique(), strict=True))
    assert_close(layer.bin_reg(w, step, bits), expected)


@LAYERS
@pytest.mark.parametrize("fraction", [0.001, 0.07, 0.3, 0.5, 0.999, 1.0])
def test_partial_l2_against_kthvalue(fraction, layer):
    for n in (1, 10, 100, 5000):
        w = drawn(n, seed=n)
        theta = w.abs().kthvalue(max(1, math.ceil(round(fraction * n, 9)))).values
        assert_close(layer.partial_l2(w, fraction), torch.where(w.abs() <= theta, w * w, 0).sum() / n)


def test_partial_l2_never_takes_one_too_many():
    """0.07 * 100 is a rounding above 7."""
    w = torch.arange(1.0, 101, dtype=torch.float64)
    assert r2.partial_l2(w, 0.07).item() == sum(k * k for k in range(1, 8)) / 100


def test_gradcheck():
    w, v, step = (
        drawn(7, 3).requires_grad_(),
        drawn(5, seed=1).requires_grad_(),
        torch.tensor([0.4, 0.7], dtype=torch.float64, requires_grad=True),
    )
    for bits in (1, 2, 4):
        assert torch.autograd.gradcheck(lambda w, v, s, bits=bits: r2.msqe([w, v], s, bits), (w, v, step))
        assert torch.autograd.gradcheck(lambda w, v, bits=bits: r2.bin_reg([w, v], 0.5, bits), (w, v))
    assert torch.autograd.gradcheck(lambda w, v: r2.partial_l2([w, v], 0.4), (w, v))
    alpha = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def terms(w, v, step, alpha):
        found = r2.weight_terms(
            [w, v],
            {
                "msqe": {"step": step, "bits": 3},
                "soft_min_max": {"alpha": alpha},
                "partial_l2": {"fraction": 0.5},
                "kure": {},
            },
        )
        return tuple(found.values())

    assert torch.autograd.gradcheck(terms, (w, v, step, alpha))


STEPS = [
    0.3,
    torch.tensor(0.3),
    torch.tensor(0.3, dtype=torch.float64),
    [0.3, 0.3],
    (0.3, 0.3),
    torch.tensor([0.3, 0.3]),
    torch.tensor([[0.3], [0.3]]),
]


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_forms_of_a_step(step):
    ws = [drawn(9, dtype=torch.float32), drawn(4, 5, dtype=torch.float32, seed=1)]
    for name in ("bin_reg", "msqe"):
        assert_close(getattr(r2, name)(ws, step, 3), torch.stack([getattr(r2, name)(w, 0.3, 3) for w in ws]))
    assert_close(r2.weight_terms(ws, {"msqe": {"step": step, "bits": 2}})["msqe"], r2.msqe(ws, 0.3, 2))


@pytest.mark.parametrize("fraction", [0.25, torch.tensor(0.25), [0.25, 0.25], torch.tensor([0.25, 0.25])], ids=str)
def test_forms_of_a_fraction(fraction):
    ws = [drawn(9, dtype=torch.float32), drawn(4, 5, dtype=torch.float32, seed=1)]
    for found in (
        r2.partial_l2(ws, fraction),
        r2.weight_terms(ws, {"partial_l2": {"fraction": fraction}})["partial_l2"],
    ):
        assert_close(found, torch.stack([r2.partial_l2(w, 0.25) for w in ws]))


@pytest.mark.parametrize("shape", [(), (2,), (2, 1)], ids=str)
def test_the_gradient_of_a_step_has_its_shape(shape):
    ws = [drawn(9, dtype=torch.bfloat16), drawn(4, 5, dtype=torch.bfloat16, seed=1)]
    for dtype in (torch.float32, torch.float64):
        step = torch.full(shape, 0.3, dtype=dtype, requires_grad=True)
        for loss in (r2.msqe(ws, step, 3), r2.weight_terms(ws, {"msqe": {"step": step, "bits": 3}})["msqe"]):
            (g,) = torch.autograd.grad(loss.sum(), step)
            assert g.shape == step.shape and g.dtype == dtype


W = torch.randn(4, 6)
LEARNED = torch.tensor(0.1, requires_grad=True)
ERRORS = [
    (lambda f: f.bin_reg(W, 0.1, 2.0), TypeError, "bits must be an int in 1..8, got 2.0"),
    (lambda f: f.msqe(W, 0.1, True), TypeError, "bits must be an int in 1..8, got True"),
    (lambda f: f.msqe(W, 0.1, 0), ValueError, "bits must be an int in 1..8, got 0"),
    (lambda f: f.bin_reg(W, 0.1, 9), ValueError, "bits must be an int in 1..8, got 9"),
    (lambda f: f.bin_reg(W, 0, 2), ValueError, "step must be a finite number > 0, got 0"),
    (lambda f: f.msqe(W, float("inf"), 2), ValueError, "step must be a finite number > 0, got inf"),
    (lambda f: f.msqe([W, W], [0.1, -1.0], 2), ValueError, "step[1] must be a finite number > 0, got -1"),
    (
        lambda f: f.bin_reg([W, W], [0.1], 2),
        ValueError,
        "step has 1 values; allowed is one number, or 2, one for each tensor of W",
    ),
    (lambda f: f.msqe(W, "0.1", 2), TypeError, "step must be a number or a tensor, got str"),
    (lambda f: f.msqe(W, torch.ones(3), 2), ValueError, "step has shape (3,); allowed are (), (1,)"),
    (lambda f: f.msqe(W, torch.tensor(1), 2), TypeError, "step has dtype torch.int64; allowed are"),
    (lambda f: f.bin_reg(W, LEARNED, 2), ValueError, "step requires grad, but no gradient is defined for it"),
    (lambda f: f.partial_l2(W, 0), ValueError, "fraction must be a number in (0, 1], got 0"),
    (lambda f: f.partial_l2(W, 1.5), ValueError, "fraction must be a number in (0, 1], got 1.5"),
    (lambda f: f.partial_l2(W, None), TypeError, "fraction must be a number or a tensor, got NoneType"),
    (lambda f: f.partial_l2(W, LEARNED), ValueError, "fraction requires grad, but no gradient is defined for it"),
    (lambda f: f.msqe([], 0.1, 2), ValueError, "W is an empty sequence"),
    (lambda f: f.partial_l2(W.int(), 0.5), TypeError, "W has dtype torch.int32"),
    (lambda f: f.bin_reg([W, W.half()], 0.1, 2), TypeError, "W[1] has dtype torch.float16 but W[0] has torch.float32"),
    (lambda f: f.weight_terms(W, []), TypeError, "terms must be a dict of name -> keyword arguments, got list"),
    (lambda f: f.weight_terms(W, {}), ValueError, "terms is empty; allowed are ('l_inf', "),
    (lambda f: f.weight_terms(W, {"l2": {}}), ValueError, "terms has 'l2'; allowed are ('l_inf', "),
    (
        lambda f: f.weight_terms(W, {"kure": 1.8}),
        TypeError,
        "terms['kure'] must be a dict of keyword arguments, got float",
    ),
    (
        lambda f: f.weight_terms(W, {"msqe": {"bits": 2}}),
        ValueError,
        "terms['msqe'] has ('bits',); it needs ('step', 'bits') and allows ('step', 'bits')",
    ),
    (
        lambda f: f.weight_terms(W, {"l_inf": {"cluster_dim": 2}}),
        ValueError,
        "terms['l_inf'] has ('cluster_dim',); it needs () and allows ()",
    ),
]


@LAYERS
@pytest.mark.parametrize(("call", "error", "says"), ERRORS, ids=[says for *_, says in ERRORS])
def test_errors(call, error, says, layer):
    with pytest.raises(error, match=re.escape(says)):
        call(layer)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"msqe": {"step": -1, "bits": 2}}, "terms['msqe']['step'] must be a finite number > 0, got -1"),
        ({"bin_reg": {"step": 1, "bits": 0}}, "terms['bin_reg']['bits'] must be an int in 1..8, got 0"),
        ({"bin_reg": {"step": LEARNED, "bits": 2}}, "terms['bin_reg']['step'] requires grad"),
        ({"partial_l2": {"fraction": 2}}, "fraction must be a number in (0, 1], got 2"),
        ({"margin": {"M": 1, "k": 0}}, "k must be an int >= 1, or a fraction in (0, 1), got 0"),
    ],
    ids=str,
)
def test_errors_name_the_term(options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        r2.weight_terms(W, options)


def test_values_of_tensors_that_are_not_allowed_give_nan():
    bad = torch.tensor([0.0, -1.0, float("nan"), 0.5])
    ws = [drawn(9, dtype=torch.float32).requires_grad_() for _ in bad]
    for loss in (r2.msqe(ws, bad, 2), r2.bin_reg(ws, bad, 2), r2.partial_l2(ws, bad)):
        assert loss.isnan().tolist() == [True, True, True, False]
        assert [g.isnan().all().item() for g in torch.autograd.grad(loss.sum(), ws)] == [True, True, True, False]


def test_second_derivatives_raise():
    w = drawn(6).requires_grad_()
    for loss in (
        r2.msqe(w, 0.1, 2),
        r2.bin_reg(w, 0.1, 2),
        r2.partial_l2(w, 0.5),
        r2.weight_terms(w, {"kure": {}})["kure"],
    ):
        with pytest.raises(RuntimeError, match=r"second derivatives .* are not implemented"):
            torch.autograd.grad(loss, w, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_opcheck(dtype, device):
    ws = [w for name in ("below a vector", "transposed", "every second") for w in cases.make(name, dtype, device)]
    wide = torch.promote_types(dtype, torch.float32)
    step, grad, rank = (
        torch.full((3, 1), 0.05, dtype=wide, device=device),
        torch.ones(3, dtype=wide, device=device),
        torch.tensor([3, 9, 200], device=device),
    )
    for name, parameter, bits in (("bin_reg", step, (2,)), ("msqe", step, (4,)), ("partial_l2", rank, ())):
        torch.library.opcheck(ops.op[name + "_fwd"], (ws, parameter, *bits))
        saved = ops.op[name + "_fwd"](ws, parameter, *bits)[1]
        torch.library.opcheck(ops.op[name + "_bwd"], (grad, ws, parameter, saved, *bits))
    terms = (
        ws,
        ["msqe", "soft_min_max", "partial_l2", "bin_reg"],
        [step, step, rank, step],
        [3, 0, 0, 2],
        [False, True, False, False],
    )
    torch.library.opcheck(ops.op["terms_fwd"], terms)
    saved = ops.op["terms_fwd"](*terms)[1]
    torch.library.opcheck(ops.op["terms_bwd"], ([grad] * 4, *terms, saved))


TERMS = {
    "soft_min_max": {"alpha": 10.0},
    "bin_reg": {"step": 0.05, "bits": 2},
    "partial_l2": {"fraction": 0.5},
    "margin": {"M": 0.1},
}
COMPILED = {
    "bin_reg": lambda ws, step: r2.bin_reg(ws, 0.05, 2).sum() * step,
    "msqe": lambda ws, step: r2.msqe(ws, step, 4).sum(),
    "partial_l2": lambda ws, step: r2.partial_l2(ws, 0.3).sum() * step,
    "weight_terms": lambda ws, step: sum(
        loss.sum() for loss in r2.weight_terms(ws, {**TERMS, "msqe": {"step": step, "bits": 3}}).values()
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_equals_eager(name, device):
    torch._dynamo.reset()
    ws = [w.requires_grad_() for w in cases.make("mixed list", torch.float32, device)[:4]]
    step = torch.tensor(0.03, device=device, requires_grad=True)
    results = []
    for function in (COMPILED[name], torch.compile(COMPILED[name], fullgraph=True, backend="aot_eager")):
        loss = function(ws, step)
        results.append([loss, *torch.autograd.grad(loss, [*ws, step])])
    for eager, fused in zip(*results, strict=True):
        assert_close(fused, eager)


@examples(25)
@given(lists, dtypes, st.integers(1, 8), st.floats(0.01, 1.0))
def test_any_list(device, makeup, dtype, bits, fraction):
    """Between bounds that hold for every weight; and terms give what their functions give."""
    ws = [recipe.build(dtype, device).detach().requires_grad_() for recipe in makeup]
    step = cases.SCALE / bits
    losses = {
        "bin_reg": r2.bin_reg(ws, step, bits),
        "msqe": r2.msqe(ws, step, bits),
        "partial_l2": r2.partial_l2(ws, fraction),
    }
    together = r2.weight_terms(
        ws,
        {
            "bin_reg": {"step": step, "bits": bits},
            "msqe": {"step": step, "bits": bits},
            "partial_l2": {"fraction": fraction},
        },
    )
    for name, loss in losses.items():
        assert_close(together[name], loss, rtol=1e-5, atol=1e-9)
    for i, w in enumerate(ws):
        x = w.detach().reshape(-1).double()
        reach = step * (2 ** (bits - 1) + (bits == 1)) + x.abs().max()
        assert 0 <= losses["msqe"][i] <= reach**2 and 0 <= losses["bin_reg"][i] <= 2**bits * reach**2
        assert losses["partial_l2"][i] <= x.square().mean() * (1 + 1e-5)
    gradients = torch.autograd.grad(sum(loss.sum() for loss in losses.values()), ws)
    assert all(
        g.shape == w.shape and g.dtype == w.dtype and g.isfinite().all() for g, w in zip(gradients, ws, strict=True)
    )
