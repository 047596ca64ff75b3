"""bin_reg, msqe, partial_l2 and several terms from one read: every backend, held to the reference by the budget of budget.py.

The natural scales: of an error w - Q it is |w| + |Q|, so of bin_reg and msqe the loss with one of its two factors replaced by that, the gradient likewise;
of partial_l2 the value itself; of terms the sum of the scales of all.
"""

import itertools
from typing import NamedTuple

import budget
import cases
import pytest
import torch

import r2kernels as r2
from r2kernels import ops
from r2kernels.lists import carve_gradients
from r2kernels.reference.columns import accumulator
from r2kernels.reference.quantizers import code

pytestmark = pytest.mark.usefixtures("nan_filled", "one_thread")

NAMES = ("bin_reg", "msqe", "partial_l2")
SMALL = [name for name in cases.INPUTS if name not in ("several chunks", "outliers", "mixed list")]
RANGE = {op.function: op for op in (cases.BY_LABEL[label] for label in ("l_inf", "margin", "soft_min_max", "kure"))}
every_name = pytest.mark.parametrize("name", NAMES)


def first(name, chosen, values, ids=str):
    """Parametrizes a test over the values; those beside the chosen ones are marked as exhaustive."""
    return pytest.mark.parametrize(
        name, [v if v in chosen else pytest.param(v, marks=pytest.mark.exhaustive) for v in values], ids=ids
    )


def dtypes(*chosen):
    return first("dtype", chosen, cases.DTYPES)


class Call(NamedTuple):
    """`parameter` is (L, 1): the step, M, alpha or target; `rank` is (L,)."""

    name: str
    weights: list
    grad: torch.Tensor
    parameter: torch.Tensor | None
    bits: int = 0
    rank: torch.Tensor | None = None

    def to(self, dtype):
        wide = accumulator(dtype)
        parameter = None if self.parameter is None else self.parameter.to(wide)
        return self._replace(weights=[w.to(dtype) for w in self.weights], grad=self.grad.to(wide), parameter=parameter)

    def tensors(self):
        if self.name == "partial_l2":
            return [self.rank]
        return (
            []
            if self.parameter is None
            else [self.parameter, torch.ones_like(self.parameter)]
            if self.name == "margin"
            else [self.parameter]
        )


def call_of(name, ws, seed, bits=4):
    g = torch.Generator().manual_seed(seed)
    wide, device = accumulator(ws[0].dtype), ws[0].device
    factor = 0.8 + 0.4 * torch.rand((len(ws), 1), generator=g, dtype=torch.float64)
    grad = torch.randn(len(ws), generator=g, dtype=torch.float64).to(device, wide)
    coded, numels = name in ("bin_reg", "msqe"), torch.tensor([w.numel() for w in ws])
    size = (
        3 * cases.SCALE / 2**bits if coded else {"margin": 1.5 * cases.SCALE, "soft_min_max": 2 / cases.SCALE}.get(name)
    )
    parameter = (
        None
        if name in ("l_inf", "partial_l2")
        else torch.full_like(factor, budget.TARGET)
        if name == "kure"
        else factor * size
    )
    rank = (0.8 * factor[:, 0] * numels).ceil().long().clamp(max=numels).to(device)
    return Call(name, ws, grad, None if parameter is None else parameter.to(device, wide), bits if coded else 0, rank)


def draws(name, inputs, dtype, device, bits=range(1, 9)):
    rounds, bits = -(-budget.DRAWS // len(inputs)), list(bits)
    return [
        call_of(name, cases.make(of, dtype, device, seed), seed, bits[(3 * seed + 5 * i) % len(bits)])
        for i, of in enumerate(inputs)
        for seed in range(rounds)
    ]


def evaluate(call, base=None):
    """Through the op, as one term alone is; with `base` added to a copy of that."""
    extra = (call.bits,) if call.bits else ()
    geometry = (1, "output") if call.name in ("l_inf", "margin", "soft_min_max") else ()
    flag = (True,) if call.name == "soft_min_max" else ()
    loss, saved = ops.call[call.name + "_fwd"](call.weights, *call.tensors(), *extra, *flag, *geometry)
    into = {} if base is None else {"out": [b.clone() for b in base]}
    result = ops.call[call.name + "_bwd"](call.grad, call.weights, *call.tensors(), saved, *extra, *geometry, **into)
    buffers, g = result if isinstance(result, tuple) else (result, None)
    gradients = into["out"] if into else carve_gradients(buffers, call.weights)
    return budget.Result(loss, list(gradients), None if g is None else g.reshape(-1))


def scales(call, exact):
    if call.name in RANGE:
        draw = budget.Draw(
            RANGE[call.name], call.weights, None if call.name in ("l_inf", "kure") else call.parameter[:, 0], call.grad
        )
        return budget.truth(draw)[1]
    losses, weights, parameters = list(exact.loss), [], []
    for i, w in enumerate(call.weights):
        g = call.grad[i].abs()
        if call.name == "partial_l2":
            weights.append(exact.weights[i].square().mean().sqrt())
            continue
        s, x = call.parameter[i, 0], w.reshape(-1)
        c = code(x / s, call.bits, True)
        error, size = (x - s * c).abs(), x.abs() + (s * c).abs()
        share = torch.full_like(x, 1 / x.numel())
        if call.name == "bin_reg":
            share = (
                1 / (c[:, None] == c[None, :]).sum(1)
                if x.numel() < 500
                else (1 / c.unique(return_counts=True)[1])[c.unique(return_inverse=True)[1]]
            )
        losses[i] = (share * error * size).sum()
        weights.append((2 * g * share * size).square().mean().sqrt())
        parameters.append(2 * g * (share * size * c.abs()).sum())
    return budget.Result(torch.stack(losses), weights, torch.stack(parameters) if call.name == "msqe" else None)


def truth(call):
    wide = call.to(torch.float64)
    with r2.use_backend("reference"):
        exact = evaluate(wide)
    return exact, scales(wide, exact)


def check(calls, variants, plain, run=evaluate, judge=truth):
    own, pools, dtype = budget.Pool(), {v: budget.Pool() for v in variants}, calls[0].weights[0].dtype
    narrow = dtype == torch.float64
    for call in calls:
        exact, scale = judge(call)
        rounded = call.to(torch.float32) if narrow else call
        with plain.chosen():
            own.add(budget.errors(run(rounded), *(judge(rounded) if narrow else (exact, scale))))
        for v, pool in pools.items():
            with v.chosen():
                pool.add(budget.errors(run(call), exact, scale))
    failures = budget.exceeded(own, pools, dtype, narrow)
    assert not failures, "\n" + failures


@dtypes(torch.float32, torch.bfloat16)
@every_name
def test_budget(name, dtype, device, variants, plain):
    check(draws(name, SMALL, dtype, device), variants, plain)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@every_name
def test_budget_of_large_inputs(name, dtype, device, variants, plain):
    check(draws(name, ["several chunks", "outliers", "mixed list"], dtype, device)[::3], variants, plain)


@first("bits", [1, 2, 5], range(1, 9))
@pytest.mark.parametrize("name", ["bin_reg", "msqe"])
def test_bits(name, bits, device, variants, plain):
    check(
        draws(name, ["below a vector", "a chunk and one", "ties", "transposed"], torch.float32, device, [bits]),
        variants,
        plain,
    )


@every_name
def test_the_budget_itself(name, device, plain):
    """It lets nothing pass that is off by 1e-5 of a quantity's scale (the reference adds up bins one weight after the other)."""
    own, pools = budget.Pool(), {quantity: budget.Pool() for quantity in ("loss", "dW", "dparameter")}
    for call in draws(name, ["below a vector", "transposed"], torch.float32, device):
        exact, scale = truth(call)
        with plain.chosen():
            result = evaluate(call)
        own.add(budget.errors(result, exact, scale))
        off = {
            "loss": result.loss + 1e-5 * scale.loss,
            "weights": [g + 1e-5 * s for g, s in zip(result.weights, scale.weights, strict=True)],
        }
        off["parameter"] = None if result.parameter is None else result.parameter + 1e-5 * scale.parameter
        for field, quantity in (("loss", "loss"), ("weights", "dW"), ("parameter", "dparameter")):
            pools[quantity].add(budget.errors(result._replace(**{field: off[field]}), exact, scale))
    for quantity, pool in pools.items():
        assert quantity not in own.rms() or f"off: {quantity} errs" in budget.exceeded(
            own, {"off": pool}, torch.float32
        )


def bits_of(result):
    return [result.loss, *result.weights, *([] if result.parameter is None else [result.parameter])]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(bits_of(a), bits_of(b), strict=True))


@dtypes(torch.float32)
@pytest.mark.parametrize("bits", [2, 4])
@every_name
def test_same_bits_for_any_number_of_threads(name, bits, dtype, device, variant):
    ws = [*cases.make("mixed list", dtype, device), *cases.make("several chunks", dtype, device)]
    call = call_of(name, ws, 0, bits)
    expected = evaluate(call)
    for threads in (1, 2, 3) if variant.backend == "cpu" else (1,):
        torch.set_num_threads(threads)
        assert same(evaluate(call), expected), threads


@every_name
def test_a_list_is_its_tensors(name, device, variant):
    if device == "cuda":
        pytest.skip("chunks follow the size of the whole list there")
    call = call_of(name, cases.make("mixed list", torch.float32, device), 1)
    together = evaluate(call)
    for i in range(len(call.weights)):
        parameter = None if call.parameter is None else call.parameter[i : i + 1]
        alone = evaluate(
            call._replace(
                weights=call.weights[i : i + 1],
                grad=call.grad[i : i + 1],
                parameter=parameter,
                rank=call.rank[i : i + 1],
            )
        )
        assert torch.equal(alone.loss, together.loss[i : i + 1]) and torch.equal(alone.weights[0], together.weights[i])


@dtypes(torch.bfloat16)
@every_name
def test_gradients_are_added_to_out(name, dtype, device, variant):
    for inputs in ("unaligned", "mixed list", "channels last", "transposed"):
        call = call_of(name, cases.make(inputs, dtype, device), 2)
        base = [
            torch.empty_like(w).copy_(torch.randn(w.shape))
            if w.is_contiguous() or inputs != "mixed list"
            else torch.randn_like(w)
            for w in call.weights
        ]
        added, alone = evaluate(call, base), evaluate(call.to(accumulator(dtype)))
        for a, b, g in zip(added.weights, base, alone.weights, strict=True):
            torch.testing.assert_close(a, (b.to(g.dtype) + g).to(dtype))


SPECIALS = [
    [float("nan")],
    [float("inf")],
    [float("-inf")],
    [float("inf"), float("-inf")],
    [float("nan"), float("inf")],
]


def same_special_values(call):
    with r2.use_backend("reference"):
        expected = bits_of(evaluate(call))
    for a, b in zip(bits_of(evaluate(call)), expected, strict=True):
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert (kind(a) == kind(b)).all(), (kind.__name__, a, b)


@first("special", SPECIALS[3:], SPECIALS)
@pytest.mark.parametrize("bits", [1, 3])
@every_name
def test_nan_and_inf_in_weights(name, bits, special, device, variant):
    for dtype in (torch.float32, torch.float16):
        values = torch.tensor(special, dtype=dtype, device=device)
        (w,) = cases.make("unaligned", dtype, device)
        ws = [torch.cat([w, values]), values, torch.cat([values, w[:9]]), *cases.make("below a vector", dtype, device)]
        same_special_values(call_of(name, ws, 3, bits))


@pytest.mark.parametrize("name", ["bin_reg", "msqe"])
def test_a_step_that_is_not_positive_gives_nan(name, device, variant):
    for bits in (1, 2, 8):
        call = call_of(name, cases.make("mixed list", torch.float32, device), 4, bits)
        call.parameter[:, 0] = torch.tensor([1, 0, -1, float("nan"), 0.1, 1e-3, float("inf")])
        result = evaluate(call)
        assert result.loss[:6].isnan().tolist() == [False, True, True, True, False, False]
        assert all(g.isnan().all() for g in result.weights[1:4]) and not result.weights[0].isnan().any()
        same_special_values(call)


def spread(kind, n, dtype, device):
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=g, dtype=torch.float64)
    found = {
        "normal": x,
        "ties": (3 * x).round(),
        "equal": torch.full_like(x, -0.5),
        "rising": torch.linspace(-1, 3, n),
        "tiny": x * 1e-6,
        "nan": torch.where(x > 1, torch.nan, x),
        "far apart": x.sign() * 10 ** (4 * x),
    }[kind]
    return found.to(device, dtype)


@dtypes(torch.float32)
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "rising", "tiny", "nan", "far apart"])
def test_ranks_are_exact(kind, dtype, device, variant):
    """At 1, at N, where values tie, below 1, in tensors of one chunk and of several."""
    for n in (1, 2, 33, 4097, 50_000):
        w = spread(kind, n, dtype, device)
        ranks = sorted({0, 1, min(2, n), n // 3 + 1, n // 2 + 1, max(n - 1, 1), n})
        _, saved = ops.call["partial_l2_fwd"]([w] * len(ranks), torch.tensor(ranks, device=device))
        ordered = w.abs().to(saved.dtype).sort().values
        expected = torch.stack([ordered[r - 1] if r else ordered.new_tensor(float("nan")) for r in ranks])
        assert torch.equal(saved.reshape(-1).nan_to_num(-1), expected.nan_to_num(-1)), n


def test_codes_at_ties_are_those_of_a_true_division(device, variant):
    """Half to even of w / step, where a product with 1 / step would round otherwise: seen in which bin a weight is counted."""
    g = torch.Generator().manual_seed(0)
    steps = torch.rand(64, 1, generator=g) * 0.1 + 0.01
    w = ((torch.arange(-10, 11) + 0.5) * steps).to(device)
    w = torch.cat([w, w.nextafter(torch.zeros_like(w)), w.nextafter(2 * w)], 1)
    _, saved = ops.call["bin_reg_fwd"](list(w), steps.to(device), 4)
    expected = torch.stack(
        [
            torch.bincount((code(x / s, 4, True) + 8).long(), minlength=16)
            for x, s in zip(w, steps.to(device), strict=True)
        ]
    )
    assert torch.equal(saved[:, 0].long(), expected)


class Terms(NamedTuple):
    calls: list

    @property
    def weights(self):
        return self.calls[0].weights

    def to(self, dtype):
        return Terms([call.to(dtype) for call in self.calls])


def evaluate_terms(terms):
    """One result: the losses and parameters of all, one after the other."""
    names = [c.name for c in terms.calls]
    arguments = (
        terms.weights,
        names,
        [t for c in terms.calls for t in c.tensors()],
        [c.bits for c in terms.calls],
        [n == "soft_min_max" for n in names],
    )
    losses, saved = ops.call["terms_fwd"](*arguments)
    buffers, learned = ops.call["terms_bwd"]([c.grad for c in terms.calls], *arguments, saved)
    return budget.Result(
        torch.cat(losses),
        list(carve_gradients(buffers, terms.weights)),
        torch.cat([g.reshape(-1) for g in learned]) if learned else None,
    )


def truth_of_terms(terms):
    exact, scale = zip(*[truth(call) for call in terms.calls], strict=True)

    def joined(results):
        learned = [r.parameter for r in results if r.parameter is not None]
        return budget.Result(
            torch.cat([r.loss for r in results]),
            [sum(parts) for parts in zip(*[r.weights for r in results], strict=True)],
            torch.cat(learned) if learned else None,
        )

    return joined(exact), joined(scale)


ALL = ("l_inf", "margin", "soft_min_max", "kure", "bin_reg", "msqe", "partial_l2")
SUBSETS = [
    *itertools.combinations(ALL, 1),
    *itertools.combinations(ALL, 2),
    ("soft_min_max", "kure", "msqe", "bin_reg", "margin"),
    ALL,
    ALL[::-1],
]


@first("names", SUBSETS[-2:], SUBSETS, "+".join)
def test_terms(names, device, variants, plain):
    inputs = ["below a vector", "unaligned", "transposed", "two elements"]
    sets = [
        Terms(
            [
                call_of(name, cases.make(of, torch.float32, device, seed), seed, 2 + i % 3)
                for i, name in enumerate(names)
            ]
        )
        for of in inputs
        for seed in range(13)
    ]
    check(sets[::3] if len(names) < 3 else sets, variants, plain, evaluate_terms, truth_of_terms)


@dtypes(torch.bfloat16)
def test_terms_of_lists(dtype, device, variants, plain):
    sets = [
        Terms([call_of(name, cases.make("mixed list", dtype, device, seed), seed, 1 + i) for i, name in enumerate(ALL)])
        for seed in range(8)
    ]
    check(sets, variants, plain, evaluate_terms, truth_of_terms)


def test_terms_have_the_same_bits(device, variant):
    terms = Terms([call_of(name, cases.make("mixed list", torch.float32, device), 5, 3) for name in ALL])
    expected = evaluate_terms(terms)
    for threads in (1, 2, 3) if variant.backend == "cpu" else (1,):
        torch.set_num_threads(threads)
        assert same(evaluate_terms(terms), expected)


def test_weight_terms_and_their_functions(device, variant):
    """Also through autograd: a learned alpha, M and step, a term that is not used, one that is used twice."""
    w = [x.detach().requires_grad_() for x in cases.make("mixed list", torch.float32, device)]
    alpha, M, step = (torch.tensor(v, device=device, requires_grad=True) for v in (10.0, 0.05, 0.02))
    terms = {
        "soft_min_max": {"alpha": alpha},
        "margin": {"M": M, "k": 0.1},
        "msqe": {"step": step, "bits": 3},
        "bin_reg": {"step": 0.03, "bits": 2},
        "partial_l2": {"fraction": 0.3},
        "kure": {},
    }
    results = []
    for losses in (
        r2.weight_terms(w, terms),
        {name: getattr(r2, name)(w, **options) for name, options in terms.items()},
    ):
        total = (
            sum((i + 1) * losses[name].sum() for i, name in enumerate(terms) if name != "kure")
            + losses["msqe"].square().sum()
        )
        results.append([*losses.values(), *torch.autograd.grad(total, [*w, alpha, M, step])])
    for together, apart in zip(*results, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-6)
