"""Lists of any make-up: shapes, strides, dtypes, rows.

To the bit where the mathematics is exact, else by the budget over at least 50 tensors.
"""

import budget
import cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import build, dtypes, examples, lists, rows

import r2kernels as r2

pytestmark = pytest.mark.usefixtures("nan_filled", "one_thread")


def results(function, ws, **options):
    ws = [w.detach().requires_grad_() for w in ws]
    learned = [p for p in options.values() if isinstance(p, torch.Tensor) and p.requires_grad]
    loss = getattr(r2, function)(ws, **options)
    return loss, torch.autograd.grad(loss.sum(), [*ws, *learned])


@examples(40)
@given(lists, dtypes, rows)
def test_l_inf_is_exact(device, variants, makeup, dtype, geometry):
    d, layout = geometry
    ws = build(makeup, dtype, device, d)
    with r2.use_backend("reference"):
        expected, gradients = results("l_inf", ws, cluster_dim=d, layout=layout)
        if dtype != torch.float64:
            expected = results("l_inf", [w.double() for w in ws], cluster_dim=d, layout=layout)[
                0
            ].float()  # at most 4 numbers: a sum without error
    for v in variants:
        with v.chosen():
            loss, found = results("l_inf", ws, cluster_dim=d, layout=layout)
        assert torch.equal(loss, expected) or (dtype == torch.float64 and d > 2), v
        assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True)), v


@examples(40)
@given(lists, dtypes, rows, st.sampled_from([1, 2, 4]), st.sampled_from([0.0, 0.05, -0.1, 1.0]))
def test_margin_counts_exactly(device, variants, makeup, dtype, geometry, k, start):
    """Its gradients are signs and counts over k, a power of two."""
    d, layout = geometry
    ws = build(makeup, dtype, device, d)
    M = torch.full(
        (len(ws), d), start, dtype=torch.promote_types(dtype, torch.float32), device=device, requires_grad=True
    )
    with r2.use_backend("reference"):
        _, gradients = results("margin", ws, M=M, k=k, cluster_dim=d, layout=layout)
    for v in variants:
        with v.chosen():
            _, found = results("margin", ws, M=M, k=k, cluster_dim=d, layout=layout)
        assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True)), v


@pytest.mark.exhaustive
@examples(60)
@given(lists, dtypes, rows, st.sampled_from(cases.LOSSES))
def test_budget(device, variants, makeup, dtype, geometry, op):
    """Ten lists of this make-up and enough tensors for fifty."""
    d, layout = geometry if op.columns else (1, "output")
    build(makeup, dtype, device, d)
    draws, g = [], torch.Generator().manual_seed(makeup[0].seed)
    for seed in range(max(10, -(-budget.DRAWS // len(makeup)))):
        ws = [recipe.build(dtype, device, 1000 * seed) for recipe in makeup]
        one = budget.with_weights(op, ws, g, (d, layout))
        draws.append(one)
    budget.hold(draws, variants)


@examples(15)
@given(lists, st.sampled_from([torch.float64, torch.float32]), rows, st.integers(-20, 20))
def test_scaling_by_a_power_of_two_is_exact(device, variants, makeup, dtype, geometry, power):
    """In W and what has its unit: every product and sum scales with it."""
    d, layout = geometry
    c, columns = 2.0**power, dict(cluster_dim=d, layout=layout)
    ws, larger = build(makeup, dtype, device, d), [recipe.build(dtype, device, times=c) for recipe in makeup]
    for v in variants:
        with v.chosen():
            assert torch.equal(r2.l_inf(larger, **columns), r2.l_inf(ws, **columns) * c), v
            assert torch.equal(
                r2.margin(larger, 0.0625 * c, k=3, **columns), r2.margin(ws, 0.0625, k=3, **columns) * c
            ), v
            small, large = r2.soft_extrema(ws, 32.0, **columns), r2.soft_extrema(larger, 32.0 / c, **columns)
            assert torch.equal(large[0], small[0] * c) and torch.equal(large[1], small[1] * c), v


@examples(25)
@given(lists, dtypes, rows, st.sampled_from(["l_inf", "margin", "soft_min_max"]))
def test_a_list_is_its_tensors(device, variants, makeup, dtype, geometry, function):
    """To the bit. On a GPU, where chunks and loads follow the whole list, this is not promised."""
    variants = [v for v in variants if v.backend == "cpu"] or pytest.skip("a promise of the CPU's backend alone")
    ws = build(makeup, dtype, device, geometry[0])
    options = {"l_inf": {}, "margin": {"M": 0.05}, "soft_min_max": {"alpha": 20.0}}[function]
    options.update(cluster_dim=geometry[0], layout=geometry[1])
    for v in variants:
        with v.chosen():
            loss, gradients = results(function, ws, **options)
            for i, w in enumerate(ws):
                alone, (g,) = results(function, [w], **options)
                assert torch.equal(alone[0], loss[i]) and torch.equal(g, gradients[i]), v


@examples(30)
@given(lists, dtypes)
def test_extremes_of_weight_stats_are_exact(device, variants, makeup, dtype):
    ws = build(makeup, dtype, device, 1)
    for v in variants:
        with v.chosen():
            stats = r2.weight_stats(ws)
        for i, w in enumerate(ws):
            assert (stats.min[i], stats.max[i], stats.abs_max[i]) == (w.min(), w.max(), w.abs().max()), v
            assert stats.numel[i] == w.numel() and (stats.std[i] == 0) == (w.min() == w.max()), v
            assert 0 <= stats.kurtosis[i] <= max(w.numel(), 1) and stats.min[i] <= stats.mean[i] <= stats.max[i], v
