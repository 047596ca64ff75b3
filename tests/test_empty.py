"""Empty tensors in a list, as the local shards of a sharded model are: the others get what they get alone."""

import math

import pytest
import torch
from torch.testing import assert_close

import r2kernels as r2
from r2kernels import reference

pytestmark = pytest.mark.usefixtures("one_thread", "nan_filled")
LAYERS = pytest.mark.parametrize("layer", [r2, reference], ids=["r2kernels", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
TERMS = {
    "l_inf": {},
    "margin": {"M": [0.3, 0.4, -0.5, 0.6], "k": 0.1},
    "soft_min_max": {"alpha": [1.0, 2.0, 3.0, 4.0]},
    "kure": {},
    "bin_reg": {"step": 0.3, "bits": 3},
    "msqe": {"step": 0.3, "bits": 3},
    "partial_l2": {"fraction": 0.7},
}
# of no weights, with the parameters of the last tensor of the list, and its derivative in the parameter
VALUES = {
    "l_inf": (0, 0),
    "margin": (0.6, 1),
    "soft_min_max": (math.exp(-4), -math.exp(-4)),
    "kure": (0, 0),
    "bin_reg": (0, 0),
    "msqe": (0, 0),
    "partial_l2": (0, 0),
}
COLUMNS = ("margin", "l_inf", "soft_min_max")


def near(value):
    return pytest.approx(value, rel=1e-6, abs=0)


def some(device, dtype=torch.float32):
    """Empty ones in the middle and at the end, beside one of several chunks."""
    g = torch.Generator().manual_seed(2)
    shapes = (9000,), (0, 4), (6, 5), (3, 0, 2)
    return [torch.randn(shape, generator=g).to(device, dtype).requires_grad_() for shape in shapes]


def full(values):
    return [values[0], values[2]]


def given(options, count=None):
    """The options of some of the four tensors."""
    return {k: [v[i] for i in count] if isinstance(v, list) else v for k, v in options.items()}


@DTYPES
def test_losses(dtype, device, variant):
    for name, d in [(name, 1) for name in TERMS] + [(name, 2) for name in COLUMNS]:
        geometry = {"cluster_dim": d} if d > 1 else {}
        ws, function = some(device, dtype), getattr(r2, name)
        loss = function(ws, **TERMS[name], **geometry)
        alone = function(full(ws), **given(TERMS[name], [0, 2]), **geometry)
        assert torch.equal(loss[[0, 2]], alone)
        assert loss[3].item() == near(d * VALUES[name][0])
        gradients, expected = torch.autograd.grad(loss.sum(), ws), torch.autograd.grad(alone.sum(), full(ws))
        assert all(torch.equal(a, b) for a, b in zip(full(gradients), expected, strict=True))
        assert [g.shape for g in gradients] == [w.shape for w in ws]


@pytest.mark.parametrize("name", ["margin", "soft_min_max", "msqe"])
def test_gradients_of_parameters(name, device, variant):
    ws = some(device)
    key = next(iter(TERMS[name]))
    options = dict(TERMS[name])
    value = options.pop(key)
    value = value if isinstance(value, list) else [value] * 4
    learned = torch.tensor(value, device=device, requires_grad=True)
    (g,) = torch.autograd.grad(getattr(r2, name)(ws, **{key: learned}, **options).sum(), learned)
    alone = learned.detach()[[0, 2]].requires_grad_()
    (expected,) = torch.autograd.grad(
        getattr(r2, name)(full(ws), **{key: alone}, **given(options, [0, 2])).sum(), alone
    )
    assert torch.equal(g[[0, 2]], expected)
    assert g[3].item() == near(VALUES[name][1])


def test_all_terms_at_once(device, variant):
    ws = some(device)
    losses = r2.weight_terms(ws, TERMS)
    alone = r2.weight_terms(full(ws), {name: given(options, [0, 2]) for name, options in TERMS.items()})
    for name in TERMS:
        assert torch.equal(losses[name][[0, 2]], alone[name])
        assert losses[name][3].item() == near(VALUES[name][0])
    gradients = torch.autograd.grad(sum(x.sum() for x in losses.values()), ws)
    expected = torch.autograd.grad(sum(x.sum() for x in alone.values()), full(ws))
    assert all(torch.equal(a, b) for a, b in zip(full(gradients), expected, strict=True))


def test_extrema(device, variant):
    ws, alpha = some(device), torch.tensor([1.0, 2.0, 3.0, 4.0], device=device, requires_grad=True)
    for d in (1, 2):
        low, high = r2.soft_extrema(ws, alpha, cluster_dim=d)
        alone = r2.soft_extrema(full(ws), alpha[[0, 2]], cluster_dim=d)
        assert torch.equal(low[[0, 2]], alone[0]) and torch.equal(high[[0, 2]], alone[1])
        assert (low[[1, 3]] == 0).all() and (high[[1, 3]] == 0).all()
        gradients = torch.autograd.grad((high - 2 * low).sum(), [*ws, alpha])
        expected = torch.autograd.grad((alone[1] - 2 * alone[0]).sum(), [*full(ws), alpha])
        assert all(torch.equal(a, b) for a, b in zip([*full(gradients), gradients[4]], expected, strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"alpha_unit": "std", "alpha": 8.0}, {"loss": "margin"}, {"loss": "kure"}], ids=str
)
def test_a_regularizer(options, device, variant):
    """An empty weight changes nothing for the others; with `accumulate_grad_` neither."""
    found = []
    for count in (2, 3):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*[torch.nn.Linear(6, 5) for _ in range(count)]).to(device)
        if count == 3:
            model[2].weight = torch.nn.Parameter(torch.empty(0, 6, device=device))
        regularizer = r2.RangeRegularizer(model, include="*.weight", **options)
        parameters = [model[0].weight, model[1].weight]
        gradients = torch.autograd.grad(regularizer(), parameters)
        regularizer.accumulate_grad_()
        for w, g in zip(parameters, gradients, strict=True):
            assert_close(w.grad, g)
        found.append(gradients)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_statistics(device, variant):
    """What a merge of shards by their numbers does not change."""
    stats, alone = r2.weight_stats(some(device)), r2.weight_stats(full(some(device)))
    assert all(torch.equal(a[[0, 2]], b) for a, b in zip(stats[:6], alone[:6], strict=True))
    assert [x[1].item() for x in stats[:6]] == [math.inf, -math.inf, 0, 0, 0, 0]
    assert stats.numel == (9000, 0, 30, 0)


QUANTIZERS = {
    "lsq": {"step": [0.2, 0.3, 0.4, 0.5], "bits": 4},
    "ewgs": {"lower": -1.0, "upper": 1.5, "bits": 3, "delta": 0.1},
    "pact": {"alpha": 1.2, "bits": 3},
    "dorefa": {"bits": 3},
    "dorefa-1": {"bits": 1},
}


@DTYPES
def test_quantizers(dtype, device, variant):
    for name, options in QUANTIZERS.items():
        xs, function = some(device, dtype), getattr(r2, name.split("-")[0])
        ys, alone = function(xs, **options), function(full(xs), **given(options, [0, 2]))
        assert all(torch.equal(a, b) for a, b in zip(full(ys), alone, strict=True))
        assert [y.shape for y in ys] == [x.shape for x in xs]
        gradients = torch.autograd.grad(sum(y.square().sum() for y in ys), xs)
        expected = torch.autograd.grad(sum(y.square().sum() for y in alone), full(xs))
        assert all(torch.equal(a, b) for a, b in zip(full(gradients), expected, strict=True))


@pytest.mark.parametrize("axis", [None, 0, -1])
def test_empty_tensors_have_no_share_in_the_gradient_of_a_step(axis, device, variant):
    xs = [x.detach() for x in some(device)]
    sizes = [1 if axis is None else x.shape[axis] for x in xs]
    steps = [torch.full((n,), 0.3, device=device, requires_grad=True) for n in sizes]
    value = torch.cat(steps) if axis is None else steps
    for step, x, g in zip(
        steps, xs, torch.autograd.grad(sum(y.sum() for y in r2.lsq(xs, value, 4, axis=axis)), steps), strict=True
    ):
        assert g.shape == step.shape
        assert (g == 0).all() if x.numel() == 0 else (g != 0).any()


@pytest.mark.parametrize(
    "options", [{}, {"gradient": "implicit"}, {"iterations": "converge"}, {"cluster_dim": 2}], ids=str
)
def test_clustering(options, device, variant):
    """W_hat is empty, the centroids stay where they are, and have no gradient."""
    ws, d = some(device), options.get("cluster_dim", 1)
    shape = (3,) if d == 1 else (3, d)
    cs = [torch.linspace(-1, 1, 3 * d, device=device).reshape(shape).requires_grad_() for _ in ws]
    hats, fresh = r2.dkm(ws, cs, 0.3, **options)
    alone, fresh_alone = r2.dkm(full(ws), full(cs), 0.3, **options)
    assert all(torch.equal(a, b) for a, b in zip([*full(hats), *full(fresh)], [*alone, *fresh_alone], strict=True))
    assert hats[1].shape == ws[1].shape and torch.equal(fresh[3], cs[3])
    total = sum(y.square().sum() for y in [*hats, *fresh])
    gradients = torch.autograd.grad(total, [*ws, *cs], allow_unused=True)
    expected = torch.autograd.grad(
        sum(y.square().sum() for y in [*alone, *fresh_alone]), [*full(ws), *full(cs)], allow_unused=True
    )
    for a, b in zip([*full(gradients[:4]), *full(gradients[4:])], expected, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    codes = r2.assign(ws, cs, cluster_dim=d)
    assert [len(code) for code in codes] == [w.numel() // d for w in ws]
    assert torch.equal(codes[2], r2.assign(ws[2], cs[2], cluster_dim=d))


def test_a_list_of_empty_tensors(device, variant):
    ws = [torch.empty(0, 3, device=device, requires_grad=True), torch.empty(0, device=device, requires_grad=True)]
    cs = [torch.tensor([-0.5, 0.5], device=device)] * 2
    for name in TERMS:
        options = given(TERMS[name], [3, 3])
        loss = getattr(r2, name)(ws, **options)
        assert loss.tolist() == near([VALUES[name][0]] * 2)
        assert [g.shape for g in torch.autograd.grad(loss.sum(), ws)] == [w.shape for w in ws]
    for name in QUANTIZERS:
        ys = getattr(r2, name.split("-")[0])(ws, **given(QUANTIZERS[name], [0, 1]))
        assert [g.shape for g in torch.autograd.grad(sum(y.sum() for y in ys), ws)] == [w.shape for w in ws]
    hats, fresh = r2.dkm(ws, cs, 0.3)
    assert [y.shape for y in hats] == [w.shape for w in ws] and torch.equal(fresh[1], cs[1])
    assert [len(code) for code in r2.assign(ws, cs)] == [0, 0]


@LAYERS
def test_the_reference_gives_the_same(layer, device):
    """By autograd through the public functions."""
    ws = some(device, torch.float64)
    for name, options in TERMS.items():
        loss = getattr(layer, name)(ws, **options)
        assert loss[3].item() == near(VALUES[name][0])
        for g in torch.autograd.grad(loss.sum(), ws):
            assert not g.isnan().any()
    for name, options in QUANTIZERS.items():
        for g in torch.autograd.grad(sum(y.sum() for y in getattr(layer, name.split("-")[0])(ws, **options)), ws):
            assert not g.isnan().any()
    cs = [torch.tensor([-0.5, 0.5], device=device, dtype=torch.float64)] * 4
    assert torch.equal(layer.dkm(ws, cs, 0.3)[1][3], cs[3])
    assert len(layer.assign(ws, cs)[1]) == 0


def test_compiled(device):
    torch._dynamo.reset()
    ws = some(device)
    compiled = torch.compile(lambda ws: r2.soft_min_max(ws, 2.0).sum(), fullgraph=True, backend="aot_eager")
    loss, expected = compiled(ws), r2.soft_min_max(ws, 2.0).sum()
    assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, ws), torch.autograd.grad(expected, ws), strict=True):
        assert_close(a, b)


@LAYERS
def test_what_stays_an_error(layer, device):
    """A tensor alone, fewer numbers than a row has, and what nothing is known of."""
    ws, rows = [w.detach() for w in some(device)], r"W\[1\] has 1 elements, fewer than cluster_dim=2"
    with pytest.raises(ValueError, match=r"W is empty \(shape \(0, 4\)\)"):
        layer.l_inf(ws[1])
    with pytest.raises(ValueError, match=rows):
        layer.l_inf([ws[0], ws[0][:1], ws[1]], cluster_dim=2)
    with pytest.raises(ValueError, match=r"W\[1\] is empty"):
        layer.kmeans(ws, 2)
