"""Every loss of the table, on every backend.

Held to the reference by budget.py, and to what the contract promises beside accuracy.
"""

import contextlib
import functools

import budget
import cases
import pytest
import torch
from parametrize import every_dtype, every_loss, first, first_dtypes, first_ops, learned_each, one_each

import r2kernels as r2
from r2kernels.lists import is_dense
from r2kernels.reference.columns import accumulator

pytestmark = pytest.mark.usefixtures("nan_filled", "one_thread")

LARGE = ["several chunks", "outliers", "mixed list"]
QUICK = [name for name in cases.INPUTS if name not in LARGE]
STRIDED = ["below a vector", "channels last", "transposed", "every second", "expanded", "unaligned"]
ADDED = [op for op in cases.ONE_EACH if op.family == "range_losses" or op.function == "kure"]  # by add_gradients_


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", cases.INPUTS)
@every_dtype
@every_loss
def test_budget(op, dtype, name, device, variants):
    budget.hold(budget.draws(op, [name], dtype, device), variants)


@first_dtypes(torch.float32, torch.bfloat16)
@one_each
def test_budget_over_inputs(op, dtype, device, variants):
    budget.hold(budget.draws(op, QUICK, dtype, device), variants)


@one_each
def test_the_budget_itself(op, plain):
    """It lets the reference pass, and nothing that is off by 1e-6 of a quantity's scale, or 1e-5: the reference adds up
    bins one weight after the other."""
    error = 1e-5 if op.function in ("bin_reg", "msqe", "partial_l2") else 1e-6
    own, wrong = budget.Pool(), {quantity: budget.Pool() for quantity in ("loss", "dW", "dparameter")}
    for one in budget.draws(op, ["below a vector", "transposed"], torch.float32):
        exact, scale = budget.truth(one)
        with plain.chosen():
            result = budget.evaluate(one)
        own.add(budget.errors(result, exact, scale))
        off = {
            "loss": result.loss + error * scale.loss,
            "weights": [g + error * s for g, s in zip(result.weights, scale.weights, strict=True)],
            "parameter": None if result.parameter is None else result.parameter + error * scale.parameter,
        }
        for field, quantity in (("loss", "loss"), ("weights", "dW"), ("parameter", "dparameter")):
            wrong[quantity].add(budget.errors(result._replace(**{field: off[field]}), exact, scale))
    assert not budget.exceeded(own, {"reference": own}, torch.float32)
    for quantity, pool in wrong.items():
        failures = budget.exceeded(own, {"off": pool}, torch.float32)
        assert f"off: {quantity} errs" in failures if quantity in own.rms() else not failures


@pytest.mark.parametrize("geometry", [(1, "output"), (3, "contiguous")], ids=str)
@first_dtypes(torch.bfloat16)
@first_ops("soft_min_max", among=ADDED)
def test_gradients_are_added_to_out(op, dtype, geometry, device, variants):
    if geometry[0] > 1 and not op.columns:
        geometry = (1, "output")
    budget.hold(budget.draws(op, STRIDED, dtype, device, geometry=geometry, accumulate=True), variants)


@first_dtypes(torch.float32, torch.bfloat16)
@one_each
def test_same_bits_for_any_number_of_threads(op, dtype, device, variant):
    for name in ("a chunk and one", "mixed list", "several chunks"):
        for bits in (2, 4) if "bits" in op.options else (None,):
            one = budget.draw(op, name, dtype, device, bits=bits)
            before = budget.evaluate(one)
            for threads in (1, 2, 3) if variant.backend == "cpu" else (1,):
                torch.set_num_threads(threads)
                assert before.equals(budget.evaluate(one)), threads


@first_dtypes(torch.float32)
@one_each
def test_a_list_is_its_tensors(op, dtype, device, variant):
    """To the bit; on a GPU, where chunks follow the size of the whole list, for a list of one."""
    one = budget.draw(op, "unaligned" if device == "cuda" else "mixed list", dtype, device)
    together = budget.evaluate(one)
    for i, w in enumerate(one.weights):
        at = (slice(None), i) if op.function == "soft_extrema" else i
        alone = budget.evaluate(
            one._replace(
                weights=[w],
                grad=one.grad[at],
                parameter=None if one.parameter is None else one.parameter[i],
                single=True,
            )
        )
        assert torch.equal(alone.loss, together.loss[at])
        assert torch.equal(alone.weights[0], together.weights[i])
        assert op.parameter is None or torch.equal(alone.parameter, together.parameter[i])


@pytest.mark.parametrize("name", ["scalar", "channels last", "transposed", "every second", "expanded"])
@first("geometry", [(1, "output")], [(1, "output"), (2, "output"), (3, "contiguous")])
@one_each
def test_form_of_gradients(op, geometry, name, device, variant):
    """dtype and shape are the weight's; so are the strides of a dense weight where a row is one number."""
    d = geometry[0] if op.columns else 1
    for dtype in (torch.float64, torch.float16):
        (w,) = cases.make(name, dtype, device)
        if w.numel() < d:
            assert name == "scalar"
            continue
        result = budget.evaluate(budget.draw(op, name, dtype, device, geometry=(d, geometry[1])))
        (g,) = result.weights
        assert (g.dtype, g.shape, result.loss.dtype) == (w.dtype, w.shape, accumulator(dtype))
        assert is_dense(g) and (d > 1 or not is_dense(w) or g.stride() == w.stride())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@learned_each
def test_wide_parameters_beside_16_bits(op, wide, dtype, device, variant):
    """The values are rounded to float32, whatever their dtype; the gradient has theirs."""
    one = budget.draw(op, "mixed list", dtype, device)
    expected = budget.evaluate(one)
    result = budget.evaluate(one._replace(parameter=one.parameter.to(wide)))
    assert result.parameter.dtype == wide and result.parameter.shape == one.parameter.shape
    assert torch.equal(result.loss, expected.loss) and torch.equal(result.parameter.float(), expected.parameter)


@first("place", ["last", "only"], ["first", "last", "only"])
@pytest.mark.parametrize("special", cases.SPECIALS)
@one_each
def test_nan_and_inf_in_weights(op, special, place, device, variant):
    """What the reference gives: the same NaN and inf in the same places, never a hang."""
    for dtype in (torch.float32, torch.float16):
        values = torch.tensor(cases.SPECIALS[special], dtype=dtype, device=device)
        for bits in (1, 3) if "bits" in op.options else (None,):
            one = budget.draw(op, "unaligned", dtype, device, bits=bits)
            w = {"first": [values, *one.weights], "last": [*one.weights, values], "only": [values]}[place]
            ws = [torch.cat(w), *cases.make("below a vector", dtype, device)]
            _same_special_values(one._replace(weights=ws, **_twice(one)))


def _twice(one):
    """The gradient and parameter of a list of one, for a list of two."""
    return {
        "grad": torch.cat([one.grad, one.grad], -1),
        "parameter": None if one.parameter is None else torch.cat([one.parameter, one.parameter]),
    }


def _same_special_values(one):
    with r2.use_backend("reference"):
        expected = budget.evaluate(one).tensors
    names = ("loss", *["dW"] * len(one.weights), "dparameter")
    for name, a, b in zip(names, budget.evaluate(one).tensors, expected, strict=False):
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            here, there = kind(a), kind(b)
            assert (here == there).all(), (
                f"{kind.__name__} of {name}: {here.sum().item()} here, {there.sum().item()} in the reference"
            )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@learned_each
def test_nan_and_inf_in_parameters(op, value, device, variant):
    one = budget.draw(op, "mixed list", torch.float32, device)
    one.parameter[2] = value
    _same_special_values(one)


@one_each
def test_gradcheck(op, device, variant):
    g = torch.Generator().manual_seed(3)
    ws = [
        torch.randn(shape, generator=g, dtype=torch.float64).to(device).requires_grad_()
        for shape in ((3,), (2, 1, 2), (1,))
    ]
    options = {name: value for name, value in op.arguments(1.0).items() if name not in ("k", op.parameter)}
    values = [0.7, 1.1, -0.6 if op.family == "range_losses" else 0.6]
    parameter = torch.tensor(values, dtype=torch.float64, device=device, requires_grad=True)

    def loss(*inputs):
        extra = {op.parameter: inputs[3]} if op.parameter else {}
        return getattr(r2, op.function)(inputs[:3], **options, **extra)

    assert torch.autograd.gradcheck(loss, [*ws, parameter] if op.parameter else ws)


@pytest.mark.parametrize("writer", ["backend", "reference"])
@first_dtypes(torch.float32)
@one_each
def test_saved_serves_every_backward(op, dtype, writer, device, variants, plain):
    """A loss may be computed on one backend and differentiated on another."""
    forward, backward = (plain.chosen, contextlib.nullcontext)[:: 1 if writer == "reference" else -1]
    crossed = functools.partial(budget.by_ops, forward=forward, backward=backward)
    budget.hold(budget.draws(op, STRIDED, dtype, device), variants, crossed)
