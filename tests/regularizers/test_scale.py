"""Weights of any size: results and gradients are those of the same weights at scale 1, scaled.

By a power of two to the bit, as long as nothing is subnormal; else by the budget of budget.py.
"""

import budget
import cases
import pytest
import torch
from parametrize import first_dtypes

import r2kernels as r2
from r2kernels.reference.columns import accumulator

pytestmark = pytest.mark.usefixtures("nan_filled", "one_thread")

STEP, UPSTREAM = 37.0, 4096.0
# Powers of two; at 2^50 squares of float32 have room, but not their sums, at 2^60 neither.
POWERS = {
    torch.float64: (-230, 230),
    torch.float32: (-110, 50, 60, 116),
    torch.bfloat16: (-110, 116),
    torch.float16: (-14, 5),
}
TERMS = {
    "kure": lambda step: {},
    "bin_reg": lambda step: {"step": step.detach(), "bits": 3},
    "msqe": lambda step: {"step": step, "bits": 3},
    "partial_l2": lambda step: {"fraction": 0.6},
}
POWER = {"min": 1, "max": 1, "mean": 1, "std": 1, "abs_max": 1, "kurtosis": 0}


def whole(n, seed):
    """Whole numbers that 16 bits hold, most within 200 of 10; the largest last, behind zeros in front."""
    w = (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 60 + 10).round().clamp(-200, 200)
    w[: n // 3] = 0
    w[-1] = 255
    return w


def results(ws, step, functions):
    """name -> (a result, the power of the scale that it has)"""
    found = {name: (value, POWER[name]) for name, value in r2.weight_stats(ws)._asdict().items() if name != "numel"}
    ws = [w.detach().requires_grad_() for w in ws]
    step = torch.tensor(step, dtype=accumulator(ws[0].dtype), device=ws[0].device, requires_grad=True)
    for name, loss in functions(ws, step).items():
        gradients = torch.autograd.grad(UPSTREAM * loss.sum(), [*ws, step], retain_graph=True, allow_unused=True)
        found[name] = loss.detach(), 0 if name == "kure" else 2
        found.update({f"d{name}/dW[{i}]": (g, -1 if name == "kure" else 1) for i, g in enumerate(gradients[:-1])})
        if name == "msqe":
            found["dmsqe/dstep"] = gradients[-1], 1
    return found


def apart(ws, step):
    return {name: getattr(r2, name)(ws, **options(step)) for name, options in TERMS.items()}


def together(ws, step):
    return r2.weight_terms(ws, {name: options(step) for name, options in TERMS.items()})


def check_scaled(found, at_one, k):
    for name, (value, power) in found.items():
        limits = torch.finfo(value.dtype)
        base = at_one[name][0].double()
        exact = base * 2.0 ** (power * k)
        near = (value.double() - exact).abs() <= limits.smallest_normal * limits.eps
        right = (value == exact.to(value.dtype)) | ((exact.abs() < limits.smallest_normal) & near)
        rounded = (base != 0) & (base.abs() < limits.smallest_normal) | base.isinf()  # itself no exact multiple
        assert (right | rounded).all(), (name, k, value, exact)


@pytest.mark.parametrize("functions", [apart, together])
@first_dtypes(torch.float32, torch.float16)
def test_powers_of_two(functions, dtype, device, variant):
    ws = [whole(n, n).to(device, dtype) for n in (4500, 35)]
    at_one = results(ws, STEP, functions)
    for k in POWERS[dtype]:
        check_scaled(results([w * 2.0**k for w in ws], STEP * 2.0**k, functions), at_one, k)


@first_dtypes(torch.float32, torch.bfloat16)
def test_statistics_of_subnormal_weights(dtype, device, variant):
    k = {torch.float64: -1074, torch.float32: -149, torch.bfloat16: -133, torch.float16: -24}[dtype]
    ws = [whole(n, n).to(device, torch.float64) for n in (4500, 35)]
    tiny = [(w * 2.0**k).to(dtype) for w in ws]
    if dtype != torch.float64:
        assert all(torch.equal(t.double(), w * 2.0**k) for t, w in zip(tiny, ws, strict=True))
    at_one, found = (r2.weight_stats(x)._asdict() for x in ([w.to(dtype) for w in ws], tiny))
    check_scaled({n: (found[n], p) for n, p in POWER.items()}, {n: (at_one[n], p) for n, p in POWER.items()}, k)
    assert (found["kurtosis"] == at_one["kurtosis"]).all() and not (found["kurtosis"] == 0).any()


def drawn(name, ws, seed, power, step=None):
    """A draw of these weights times 10^power, whose step, if any, has the same factor, or is as given."""
    g = torch.Generator().manual_seed(seed)
    one = budget.with_weights(cases.BY_LABEL[name], [w * 10.0**power for w in ws], g, bits=2 + seed % 7)
    if name in ("bin_reg", "msqe"):
        one = one._replace(
            parameter=one.parameter * 10.0**power if step is None else torch.full_like(one.parameter, step)
        )
    return one


def normal(seed, device, sizes=(300,) * 5):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, generator=g) * cases.SCALE).to(device) for n in sizes]


LISTS = range(budget.DRAWS // 5)


@pytest.mark.parametrize("name", TERMS)
def test_powers_of_ten(name, device, variants):
    """Where float32 has a place for the result, and not for the fourth powers, the squares or their sum on the way."""
    for power in (-30, 30) if name == "kure" else (-15, 19):
        budget.hold([drawn(name, normal(s, device), s, power) for s in LISTS], variants)


@pytest.mark.parametrize("name", TERMS)
def test_sizes_far_apart(name, device, variants):
    """Zeros, then small weights, then large ones, and the other way round."""
    draws = []
    for s in LISTS:
        ws = normal(s, device, (4200, 60, 60, 60, 60))
        for i, w in enumerate(ws):
            w[: len(w) // 9], w[len(w) // 9 : -5] = 0, w[len(w) // 9 : -5] * 10.0 ** -((5 * s + i) % 25)
            ws[i] = w if (s + i) % 2 else w.flip(0)
        draws.append(drawn(name, ws, s, 0))
    budget.hold(draws, variants)


@pytest.mark.parametrize("name", ["bin_reg", "msqe"])
@pytest.mark.parametrize("step", [1e-38, 1e-30, 1e12, 1e38])
def test_steps_far_from_the_weights(name, step, device, variants):
    budget.hold([drawn(name, normal(s, device, (40,) * 5), s, 0, step) for s in LISTS], variants)


@pytest.mark.parametrize("place", ["first", "last", "only"])
@pytest.mark.parametrize("special", cases.SPECIALS)
@first_dtypes(torch.float32, torch.bfloat16)
def test_statistics_of_what_is_not_finite(special, place, dtype, device, variant):
    """The mean is that of the sum; std and kurtosis are NaN."""
    values, w = torch.tensor(cases.SPECIALS[special], dtype=dtype), whole(5000, 1).to(dtype)
    w = {"first": torch.cat([values, w]), "last": torch.cat([w, values]), "only": values.repeat(2)}[place].to(device)
    stats = r2.weight_stats([w, whole(9, 2).to(device, dtype)])
    expected = torch.stack([w.amin(), w.amax(), w.double().mean(), w.abs().amax()]).double()
    found = torch.stack([stats.min[0], stats.max[0], stats.mean[0], stats.abs_max[0]]).double()
    assert torch.equal(found.nan_to_num(-1, 2, -2), expected.nan_to_num(-1, 2, -2))
    assert stats.std[0].isnan() and stats.kurtosis[0].isnan() and r2.kure(w).isnan()
    assert all(value[1].isfinite() for value in stats[:6])
