"""Every backend, held to the reference by the budget of budget.py, and to what the contract promises beside accuracy."""

import os

import budget
import cases
import pytest
import torch

import r2kernels as r2
from r2kernels import ops, reference
from r2kernels.lists import carve_gradients, is_dense
from r2kernels.reference.columns import accumulator

pytestmark = pytest.mark.usefixtures("nan_filled", "one_thread")

ONE_EACH = [
    cases.BY_LABEL[label] for label in ("l_inf", "margin-fraction", "soft_min_max", "soft_extrema-negative", "kure")
]
GEOMETRIES = [(d, layout) for d in (2, 3, 4) for layout in ("output", "contiguous")]
QUICK = [name for name in cases.INPUTS if name not in ("several chunks", "outliers", "mixed list")]
STRIDED = ["below a vector", "channels last", "transposed", "every second", "expanded", "unaligned"]

every_op = pytest.mark.parametrize("op", cases.OPS, ids=lambda op: op.label)
one_each = pytest.mark.parametrize("op", ONE_EACH, ids=lambda op: op.function)
every_dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda dtype: str(dtype)[6:])


def first(name, chosen, values, ids=None):
    """Parametrizes a test over the values; those beside the chosen ones are marked as exhaustive."""
    return pytest.mark.parametrize(
        name, [v if v in chosen else pytest.param(v, marks=pytest.mark.exhaustive) for v in values], ids=ids
    )


def first_dtypes(*chosen):
    return first("dtype", chosen, cases.DTYPES, lambda dtype: str(dtype)[6:])


def first_ops(*chosen, among=ONE_EACH):
    return first("op", [op for op in among if op.function in chosen], among, lambda op: op.function)


def within_budget(draws, variants):
    failures = budget.check(draws, variants)
    assert not failures, "\n" + failures


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", cases.INPUTS)
@every_dtype
@every_op
def test_budget(op, dtype, name, device, variants):
    within_budget(budget.draws(op, [name], dtype, device), variants)


@first_dtypes(torch.float32, torch.bfloat16)
@one_each
def test_budget_over_inputs(op, dtype, device, variants):
    within_budget(budget.draws(op, QUICK, dtype, device), variants)


@first_dtypes(torch.float32)
@pytest.mark.parametrize("label", ["soft_min_max", "soft_min_max-negative", "soft_extrema"])
def test_alpha_without_gradient(label, dtype, device, variants):
    """Nothing is computed for it then: another kernel."""
    draws = budget.draws(cases.BY_LABEL[label], QUICK, dtype, device)
    within_budget([one._replace(learned=False) for one in draws], variants)


@one_each
def test_the_budget_itself(op, plain):
    """It lets the reference pass, and nothing that is off by 1e-6 of a quantity's scale."""
    own, wrong = budget.Pool(), {quantity: budget.Pool() for quantity in ("loss", "dW", "dparameter")}
    for one in budget.draws(op, ["below a vector", "transposed"], torch.float32):
        exact, scale = budget.truth(one)
        with plain.chosen():
            result = budget.evaluate(one)
        own.add(budget.errors(result, exact, scale))
        off = {
            "loss": result.loss + 1e-6 * scale.loss,
            "weights": [g + 1e-6 * s for g, s in zip(result.weights, scale.weights, strict=True)],
        }
        off["parameter"] = None if result.parameter is None else result.parameter + 1e-6 * scale.parameter
        for field, quantity in (("loss", "loss"), ("weights", "dW"), ("parameter", "dparameter")):
            wrong[quantity].add(budget.errors(result._replace(**{field: off[field]}), exact, scale))
    assert not budget.exceeded(own, {"reference": own}, torch.float32)
    for quantity, pool in wrong.items():
        failures = budget.exceeded(own, {"off": pool}, torch.float32)
        assert f"off: {quantity} errs" in failures if quantity in own.rms() else not failures


@first("geometry", [(2, "contiguous"), (3, "output")], GEOMETRIES, str)
@first_dtypes(torch.float32)
@first_ops("soft_extrema", among=[op for op in ONE_EACH if op.columns])
def test_columns(op, dtype, geometry, device, variants):
    within_budget(budget.draws(op, STRIDED, dtype, device, geometry=geometry), variants)


@pytest.mark.exhaustive
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("op", [op for op in ONE_EACH if op.columns], ids=lambda op: op.label)
def test_columns_of_a_list(op, geometry, device, variants):
    within_budget(
        budget.draws(op, ["mixed list", "several chunks"], torch.float32, device, geometry=geometry), variants
    )


@pytest.mark.parametrize("geometry", [(1, "output"), (3, "contiguous")], ids=str)
@first_dtypes(torch.bfloat16)
@first_ops("soft_min_max")
def test_gradients_are_added_to_out(op, dtype, geometry, device, variants):
    if geometry[0] > 1 and not op.columns:
        geometry = (1, "output")
    within_budget(budget.draws(op, STRIDED, dtype, device, geometry=geometry, accumulate=True), variants)


@pytest.mark.exhaustive
@pytest.mark.parametrize("value", [-1e-3, 1e-30, 1e-6, 1e6, 1e30])
def test_extreme_alpha(value, device, variants):
    for function in ("soft_min_max", "soft_extrema"):
        op = cases.Op("extreme", function, "alpha", value * cases.SCALE)
        within_budget(budget.draws(op, ["a chunk and one", "outliers", "ties"], torch.float32, device), variants)


@every_dtype
def test_weight_stats(dtype, device, variants):
    names, narrow = (
        [name for name in cases.INPUTS if name not in ("several chunks", "mixed list")],
        dtype == torch.float64,
    )
    own, pools = budget.Pool(), {v: budget.Pool() for v in variants}

    def errors(rows, exact):
        scale = torch.where(torch.arange(6, device=device) == 2, exact[:, 5:], exact.abs())
        return dict(
            zip(r2.WeightStats._fields, budget.relative((rows.double() - exact).abs(), scale).unbind(1), strict=False)
        )

    for seed in range(4):
        ws = [w for name in names for w in cases.make(name, dtype, device, seed)]
        exact = reference.weight_stats_fwd([w.double() for w in ws])
        rounded = [w.float() for w in ws] if narrow else ws
        own.add(errors(reference.weight_stats_fwd(rounded), reference.weight_stats_fwd([w.double() for w in rounded])))
        for v in variants:
            with v.chosen():
                stats, alone = r2.weight_stats(ws), r2.weight_stats(ws[-1])
            assert (
                stats.numel == tuple(w.numel() for w in ws) and alone.numel == ws[-1].numel() and alone.std.shape == ()
            )
            assert {row.dtype for row in stats[:6]} == {accumulator(dtype)}
            assert all(
                torch.equal(getattr(stats, name).double(), exact[:, i])
                for name, i in (("min", 0), ("max", 1), ("abs_max", 5))
            ), f"{v}: these are exact"
            pools[v].add(errors(torch.stack(stats[:6], 1), exact))
    failures = budget.exceeded(own, pools, accumulator(dtype), narrow)
    assert not failures, "\n" + failures


def bits(result):
    return [result.loss, *result.weights, *([] if result.parameter is None else [result.parameter])]


@first_dtypes(torch.float32, torch.bfloat16)
@one_each
def test_same_bits_for_any_number_of_threads(op, dtype, device, variant):
    for name in ("a chunk and one", "mixed list"):
        one = budget.draw(op, name, dtype, device)
        first = bits(budget.evaluate(one))
        for threads in (1, 2, 3) if variant.backend == "cpu" else (1,):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(first, bits(budget.evaluate(one)), strict=True)), threads


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
        assert one.parameter is None or torch.equal(alone.parameter, together.parameter[i])


@pytest.mark.parametrize("name", ["scalar", "channels last", "transposed", "every second", "expanded"])
@first("geometry", [(1, "output")], [(1, "output"), (2, "output"), (3, "contiguous")], str)
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
@pytest.mark.parametrize("op", [op for op in ONE_EACH if op.parameter], ids=lambda op: op.function)
def test_wide_parameters_beside_16_bits(op, wide, dtype, device, variant):
    """The values are rounded to float32, whatever their dtype; the gradient has theirs."""
    one = budget.draw(op, "mixed list", dtype, device)
    expected = budget.evaluate(one)
    result = budget.evaluate(one._replace(parameter=one.parameter.to(wide)))
    assert result.parameter.dtype == wide and result.parameter.shape == one.parameter.shape
    assert torch.equal(result.loss, expected.loss) and torch.equal(result.parameter.float(), expected.parameter)


SPECIALS = {
    "nan": [float("nan")],
    "inf": [float("inf")],
    "-inf": [float("-inf")],
    "both": [float("inf"), float("-inf")],
    "nan and inf": [float("nan"), float("inf")],
}


@first("place", ["last", "only"], ["first", "last", "only"])
@pytest.mark.parametrize("special", SPECIALS)
@one_each
def test_nan_and_inf_in_weights(op, special, place, device, variant):
    """What the reference gives: the same NaN and inf in the same places, never a hang."""
    for dtype in (torch.float32, torch.float16):
        one = budget.draw(op, "unaligned", dtype, device)
        values = torch.tensor(SPECIALS[special], dtype=dtype, device=device)
        w = (
            values
            if place == "only"
            else torch.cat([values, one.weights[0]] if place == "first" else [one.weights[0], values])
        )
        _same_special_values(one._replace(weights=[w, *cases.make("below a vector", dtype, device)], **_twice(one)))


def _twice(one):
    """The gradient and parameter of a list of one, for a list of two."""
    return {
        "grad": torch.cat([one.grad, one.grad], -1),
        "parameter": None if one.parameter is None else torch.cat([one.parameter, one.parameter]),
    }


def _same_special_values(one):
    with r2.use_backend("reference"):
        expected = bits(budget.evaluate(one))
    for name, a, b in zip(
        ("loss", *["dW"] * len(one.weights), "dparameter"), bits(budget.evaluate(one)), expected, strict=False
    ):
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            here, there = kind(a), kind(b)
            assert (here == there).all(), (
                f"{kind.__name__} of {name}: {here.sum().item()} here, {there.sum().item()} in the reference"
            )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("op", [op for op in ONE_EACH if op.parameter], ids=lambda op: op.function)
def test_nan_and_inf_in_parameters(op, value, device, variant):
    one = budget.draw(op, "mixed list", torch.float32, device)
    one.parameter[2] = value
    _same_special_values(one)


def test_k_of_no_use_gives_nan(device, variant):
    w = torch.randn(100, device=device)
    losses = r2.margin([w] * 4, 0.1, k=torch.tensor([0.0, -1.0, float("nan"), 2.0], device=device))
    assert torch.isnan(losses).tolist() == [True, True, True, False]


@one_each
def test_gradcheck(op, device, variant):
    g = torch.Generator().manual_seed(3)
    ws = [
        (torch.randn(shape, generator=g, dtype=torch.float64)).to(device).requires_grad_()
        for shape in ((3,), (2, 1, 2), (1,))
    ]
    options = {k: v for k, v in op.options.items() if k != "k"}
    parameter = torch.tensor([0.7, 1.1, -0.6], dtype=torch.float64, device=device, requires_grad=True)

    def loss(*inputs):
        extra = {op.parameter: inputs[3]} if op.parameter else {}
        return getattr(r2, op.function)(inputs[:3], **options, **extra)

    assert torch.autograd.gradcheck(loss, [*ws, parameter] if op.parameter else ws)


def crossed(one, first, second):
    """The forward of one backend and the backward of another."""
    function = one.op.function
    grad, parameters = budget.contract(one)
    flag = (True,) if function in ("soft_min_max", "soft_extrema") else ()
    geometry = one.geometry if one.op.columns else ()
    with first.chosen():
        loss, saved = ops.op[function + "_fwd"](one.weights, *parameters, *flag, *geometry)
    with second.chosen():
        result = ops.op[function + "_bwd"](grad, one.weights, *parameters, saved, *geometry)
    buffers, g = result if isinstance(result, tuple) else (result, None)
    assert all(b.isfinite().all() for b in buffers), "a number of the gradients' memory was not written"
    gradients = carve_gradients(buffers, one.weights, *one.geometry)
    return budget.Result(loss.reshape(one.grad.shape), gradients, None if g is None else g.reshape(one.parameter.shape))


@pytest.mark.parametrize("writer", ["backend", "reference"])
@first_dtypes(torch.float32)
@one_each
def test_saved_serves_every_backward(op, dtype, writer, device, variants, plain):
    """A loss may be computed on one backend and differentiated on another."""
    own, pools, narrow = budget.Pool(), {v: budget.Pool() for v in variants}, dtype == torch.float64
    for one in budget.draws(op, STRIDED, dtype, device):
        exact, scale = budget.truth(one)
        rounded = one.to(torch.float32) if narrow else one
        own.add(budget.errors(crossed(rounded, plain, plain), *budget.truth(rounded)))
        for v, pool in pools.items():
            pool.add(budget.errors(crossed(one, *((v, plain) if writer == "backend" else (plain, v))), exact, scale))
    failures = budget.exceeded(own, pools, dtype, narrow)
    assert not failures, "\n" + failures


def _available_memory(device):
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.exhaustive
def test_more_than_two_to_the_31(device, variants):
    """Offsets are 64 bits wide: the extremes lie past 2^31."""
    if _available_memory(device) < 12e9:
        pytest.skip(f"needs 12 GB of memory, {_available_memory(device) / 1e9:.1f} are available")
    torch.use_deterministic_algorithms(False)  # 4 GB are not to be filled
    torch.set_num_threads(os.cpu_count())
    w = torch.zeros(2**31 + 7, dtype=torch.bfloat16, device=device)
    w[-6:] = torch.tensor([3, -3, 2, 0, 1, 3.0])
    w.requires_grad_()
    with variants[-1].chosen():
        for loss, value, expected in (
            (r2.l_inf, 3, [1 / 3, -1 / 3, 0, 0, 0, 1 / 3]),
            (lambda w: r2.margin(w, 1.0, k=2), 4.5, [0.5, -0.5, 0.5, 0, 0, 0.5]),
        ):
            out = loss(w)
            assert out.item() == value
            (g,) = torch.autograd.grad(out, w)
            assert g[-6:].tolist() == torch.tensor(expected).bfloat16().tolist()
            assert g.count_nonzero() == 3 + (value == 4.5)
            del g
