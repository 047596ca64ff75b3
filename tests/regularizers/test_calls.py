"""What the regularizers take and how they are a part of torch: forms of arguments, errors, opcheck, torch.compile."""

import re

import cases
import pytest
import torch
from torch.testing import assert_close

import r2kernels as r2
from r2kernels import ops, reference

LAYERS = pytest.mark.parametrize("layer", [reference, r2], ids=["reference", "r2kernels"])


def drawn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


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
