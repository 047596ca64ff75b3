"""The specification of the range losses: values worked out by hand, identities that the equations imply."""

import math

import pytest
import torch
from torch.testing import assert_close

import r2kernels
from r2kernels import reference

L, E = math.log(2), math.exp

# function, arguments, W, value, dL/dW, dL/dparameter
LITERALS = [
    ("l_inf", {}, [1, -3, 2], 3, [0, -1, 0], None),
    ("l_inf", {}, [3, -3, 1, 3], 3, [1 / 3, -1 / 3, 0, 1 / 3], None),
    ("l_inf", {}, [0, 0], 0, [0, 0], None),
    ("margin", {"M": 1}, [1, -3, 2], 1 + (2 + 1), [0, -1, 1], 1 - 2),
    ("margin", {"M": -1}, [1, -3, 2], 1 + (2 + 1), [0, -1, 1], -(1 - 2)),
    ("margin", {"M": 0}, [1, -3, 2], 1 + 3 + 2, [1, -1, 1], 0),
    ("margin", {"M": 1, "k": 2}, [1, -3, 2], 1 + (2 + 1) / 2, [0, -1 / 2, 1 / 2], 1 - 2 / 2),
    ("margin", {"M": 1, "k": 0.5}, [1, -3, 2], 1 + (2 + 1) / 1.5, [0, -1 / 1.5, 1 / 1.5], 1 - 2 / 1.5),
    ("margin", {"M": 5}, [1, -3, 2], 5, [0, 0, 0], 1),
    # p = (1, 2) / 3, q = (2, 1) / 3: s_max = 2/3, s_min = 1/3, both variances 2/9;
    # dL/dw0 = (1 - 2 L / 3) / 3 - 2 (1 + L / 3) / 3
    (
        "soft_min_max",
        {"alpha": L},
        [0, 1],
        2 / 3 - 1 / 3 + 1 / 2,
        [-1 / 3 - 4 * L / 9, 1 / 3 + 4 * L / 9],
        2 / 9 + 2 / 9 - 1 / 2,
    ),
    (
        "soft_min_max",
        {"alpha": -L},
        [0, 1],
        1 / 3 - 2 / 3 + 2,
        [1 / 3 + 4 * L / 9, -1 / 3 - 4 * L / 9],
        2 / 9 + 2 / 9 - 2,
    ),
    ("soft_min_max", {"alpha": 0}, [0, 1], 1, [0, 0], 1 / 4 + 1 / 4 - 1),
    ("soft_min_max", {"alpha": 3}, [7], E(-3), [0], -E(-3)),
    ("soft_min_max", {"alpha": 3}, [7, 7, 7], E(-3), [0, 0, 0], -E(-3)),
    ("soft_min_max", {"alpha": 1000}, [-2, 0, 5], 7, [-1, 0, 1], 0),
    # rows of two: the columns are (1, 2) and (3, 4), or contiguous (1, 3) and (2, 4)
    ("l_inf", {"cluster_dim": 2}, [[1, 2], [3, 4]], 2 + 4, [[0, 1], [0, 1]], None),
    ("l_inf", {"cluster_dim": 2, "layout": "contiguous"}, [[1, 2], [3, 4]], 3 + 4, [[0, 0], [1, 1]], None),
    # three rows of one column each, of which W.transpose(0, -1) = ((1, 3, 5), (2, 4, 6)) makes (1, 2), (3, 4), (5, 6)
    ("l_inf", {"cluster_dim": 3}, [[1, 2], [3, 4], [5, 6]], 2 + 4 + 6, [[0, 1], [0, 1], [0, 1]], None),
    ("l_inf", {"cluster_dim": 2}, [1, -5, 2, 3, 9], 2 + 5, [0, -1, 1, 0, 0], None),
    (
        "margin",
        {"M": 1, "cluster_dim": 2, "k": 2},
        [1, -5, 2, 3, 9],
        (1 + 1 / 2) + (1 + (4 + 2) / 2),
        [0, -1 / 2, 1 / 2, 1 / 2, 0],
        (1 - 1 / 2) + (1 - 2 / 2),
    ),
    ("soft_min_max", {"alpha": 0, "cluster_dim": 2}, [1, 2, 3, 4], 1 + 1, [0, 0, 0, 0], (1 + 1 - 1) + (1 + 1 - 1)),
]


@pytest.mark.parametrize("layer", [reference, r2kernels], ids=["reference", "r2kernels"])
@pytest.mark.parametrize(("function", "options", "w", "value", "dw", "dparameter"), LITERALS, ids=lambda x: str(x))
def test_literal(function, options, w, value, dw, dparameter, layer):
    w = torch.tensor(w, dtype=torch.float64, requires_grad=True)
    learned = [name for name in ("alpha", "M") if name in options]
    options = {
        k: torch.tensor(v, dtype=torch.float64, requires_grad=True) if k in learned else v for k, v in options.items()
    }
    loss = getattr(layer, function)(w, **options)
    loss.backward()
    assert_close(loss.item(), float(value))
    # autograd through relu and abs takes the slope 0 at 0 and at |M|
    assert_close(w.grad, torch.tensor(dw, dtype=torch.float64))
    for name in learned:
        assert_close(options[name].grad.item(), float(dparameter))


def test_soft_extrema_by_hand():
    w = torch.tensor([0.0, 1.0])
    for layer in (reference, r2kernels):
        for alpha, expected in ((L, (1 / 3, 2 / 3)), (-L, (2 / 3, 1 / 3)), (0, (1 / 2, 1 / 2)), (200, (0.0, 1.0))):
            low, high = layer.soft_extrema(w, alpha)
            assert_close((low.item(), high.item()), expected)
        low, high = layer.soft_extrema(torch.tensor([0.0, 5, 1, 5]), torch.tensor([L, 3.0]), cluster_dim=2)
        assert_close(low, torch.tensor([1 / 3, 5.0]))
        assert_close(high, torch.tensor([2 / 3, 5.0]))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_minimised_over_m_the_margin_is_the_mean_of_the_k_largest():
    w = normal(50)
    for k in (1, 3, 25, 0.2):
        count = k if k >= 1 else int(k * 50)
        losses = torch.stack([reference.margin(w, m, k=k) for m in w.abs()])
        assert_close(losses.min(), w.abs().topk(count).values.mean())


def test_limits_of_soft_min_max():
    w = normal(40, 25)
    assert_close(reference.soft_min_max(w, 1e5), w.max() - w.min())
    slope = (reference.soft_min_max(w, 1e-5) - math.exp(-1e-5)) / 1e-5
    assert_close(slope, 2 * w.var(correction=0))
    assert reference.soft_min_max(w, 0) == 1


def test_a_translation_changes_no_soft_range():
    w = normal(300).requires_grad_()
    for alpha in (-0.7, 0.0, 0.1, 5.0):
        loss = reference.soft_min_max(w, alpha)
        assert_close(loss, reference.soft_min_max(w + 2, alpha))
        (g,) = torch.autograd.grad(loss, w)
        assert_close(g.sum(), torch.zeros_like(g.sum()))
        for s in reference.soft_extrema(w, alpha):
            (g,) = torch.autograd.grad(s, w, retain_graph=True)
            assert_close(g.sum(), torch.ones_like(g.sum()))


def test_merging_two_tensors():
    """How the results of parts make the result of the whole: what lets chunks and shards be merged."""
    a, b, alpha = normal(30), normal(70, seed=1) * 2 + 1, 1.3
    both = torch.cat([a, b])
    assert reference.l_inf(both) == torch.maximum(reference.l_inf(a), reference.l_inf(b))
    assert_close(reference.margin(both, 0.5), reference.margin(a, 0.5) + reference.margin(b, 0.5) - 0.5)
    za, zb = (alpha * a).exp().sum(), (alpha * b).exp().sum()
    assert_close(
        reference.soft_extrema(both, alpha)[1],
        (za * reference.soft_extrema(a, alpha)[1] + zb * reference.soft_extrema(b, alpha)[1]) / (za + zb),
    )


def test_columns():
    """The rows of DKM, and back."""
    for shape in ((7,), (4, 6), (6, 5), (3, 4, 5), (5, 3, 3, 2)):
        w = normal(*shape)
        for d in (1, 2, 3, 4):
            for layout in ("output", "contiguous"):
                rows = (
                    (w.transpose(0, -1) if layout == "output" and d > 1 else w)
                    .reshape(-1)[: w.numel() // d * d]
                    .reshape(-1, d)
                )
                x = reference.columns(w, d, layout)
                assert torch.equal(x, rows.t())
                back = reference.from_columns(x, w, d, layout)
                assert torch.equal(reference.columns(back, d, layout), x)
                assert (back != w).sum() == w.numel() % d and back[back != w].abs().sum() == 0
