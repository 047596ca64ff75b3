"""How many launches a step of training makes beside the kernels of this package, that it never waits for the device,
and that nothing adds floating-point numbers in an order that changes."""

import itertools

import pytest
import torch
from cases import OPS, SCALE
from launches import MADE, READS, UNORDERED, watched
from torch import nn

import r2kernels as r2
from r2kernels import Palettizer, Quantizer, RangeRegularizer
from r2kernels.nn import clipping
from r2kernels.nn import palettizer as palettizer_module
from r2kernels.nn import quantizer as quantizer_module

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:kmeans. .* will be repeated")]
LAYERS = 21
STEPS = 3
COUNTED = clipping.counted


@pytest.fixture(autouse=True)
def on_the_cpu(device):
    if device != "cpu":
        pytest.skip("operators are counted on the CPU")


def linears(count=LAYERS, width=12, dtypes=(torch.float32,)):
    """Linear layers, one after the other."""
    torch.manual_seed(0)
    kinds = itertools.cycle(dtypes)
    return nn.Sequential(*[nn.Linear(width, width, bias=False, dtype=next(kinds)) for _ in range(count)])


def total(counts):
    return sum(counts.values()), dict(counts)


def of_gradients(monkeypatch, outputs):
    """What the backward launches where every output is given a gradient."""
    gradients = [torch.ones_like(y) for y in outputs]
    with watched(monkeypatch) as counts:
        torch.autograd.backward(outputs, gradients)
    return counts


@pytest.mark.parametrize("with_centroids", [False, True], ids=["weights", "weights and centroids"])
@pytest.mark.parametrize("clusters", [[4] * LAYERS, [3, 4, 2] * 7], ids=["one K", "several"])
def test_dkm_of_a_list(monkeypatch, clusters, with_centroids):
    g = torch.Generator().manual_seed(0)
    ws = [torch.randn(40 + i, generator=g).requires_grad_() for i in range(LAYERS)]
    cs = [torch.randn(k, generator=g).requires_grad_(with_centroids) for k in clusters]
    for _ in range(2):
        for t in (*ws, *cs):
            t.grad = None
        with watched(monkeypatch) as counts:
            hats, fresh = r2.dkm(ws, cs, 0.3, iterations=5)
        counts += of_gradients(monkeypatch, hats + fresh * with_centroids)
    bar = 12 if len(set(clusters)) == 1 else 17
    assert total(counts)[0] <= bar, counts


@pytest.mark.parametrize("method", ["lsq", "ewgs", "pact"])
def test_weights_of_a_quantizer(monkeypatch, method):
    model = linears()
    quantizer = Quantizer(model, method, 4)
    quantizer.initialize(torch.randn(3, 12))
    for _ in range(2):
        model.zero_grad(), quantizer.zero_grad()
        with watched(monkeypatch) as counts:
            hats = quantizer._soft_weights(quantizer.layers)
        counts += of_gradients(monkeypatch, hats)
    assert total(counts)[0] <= 6, counts


@pytest.mark.parametrize("options", [{}, {"metric": "sqeuclidean"}, {"tau": 0.1}, {"cluster_dim": 2}], ids=str)
def test_a_step_of_a_palettizer(monkeypatch, options):
    """Beside those of `settled`, which is a kernel in Triton; without a search for spare centroids."""
    model = linears()
    palettizer = Palettizer(model, 2, **options)
    own = palettizer_module.settled

    def settled(*args):
        with torch.utils._python_dispatch._disable_current_modes():
            return own(*args)

    monkeypatch.setattr(palettizer_module, "settled", settled)
    for _ in range(3):
        model(torch.randn(2, 12)).sum().backward()
        with watched(monkeypatch) as counts:
            palettizer.step()
    assert total(counts)[0] <= 8, counts


def test_gradients_that_are_missing_are_zeros_at_once(monkeypatch):
    g = torch.Generator().manual_seed(0)
    ws = [torch.randn(40 + i, generator=g).requires_grad_() for i in range(LAYERS)]
    cs = [torch.randn(4, generator=g).requires_grad_() for _ in ws]
    hats, fresh = r2.dkm(ws, cs, 0.3)
    counts = of_gradients(monkeypatch, [hats[0], fresh[1]])
    assert counts["aten::_foreach_zero_"] == counts["aten::new_zeros"] == 1
    assert total(counts)[0] <= 8, counts
    zeros = [torch.zeros_like(w) for w in ws[1:]]
    expected = torch.autograd.grad([*r2.dkm(ws, cs, 0.3)[0]], ws, [torch.ones_like(ws[0]), *zeros])
    of_fresh = torch.autograd.grad(r2.dkm(ws, cs, 0.3)[1][1].sum(), ws[1])[0]
    assert torch.equal(ws[0].grad, expected[0]) and torch.equal(ws[1].grad, of_fresh) and not ws[2].grad.any()


def test_the_count_sees_what_launches(monkeypatch):
    x = torch.ones(3, 4)
    with watched(monkeypatch) as counts:
        x.t()[:2].reshape(2, 3).add_(x.sum()).clone()
        torch.empty_like(x).expand(2, 3, 4).detach().as_strided((2,), (1,)).zero_()
    assert counts == {"aten::sum": 1, "aten::add_": 1, "aten::clone": 1, "aten::zero_": 1}


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x[[0]], lambda x: x.tolist()])
def test_the_watch_sees_what_waits(monkeypatch, read):
    with pytest.raises(AssertionError), watched(monkeypatch, READS | MADE):
        read(torch.ones(3))


def test_a_search_for_spare_centroids_waits_three_times(monkeypatch):
    """For the warnings, for what is spare and for what waits, of all layers at once."""
    model = linears()
    palettizer, reads, own = Palettizer(model, 2), [], torch.Tensor.tolist
    model(torch.randn(2, 12)).sum().backward()
    with watched(monkeypatch, READS), monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", lambda t: reads.append(tuple(t.shape)) or own(t))
        palettizer.step()
    assert reads == [(LAYERS,), (LAYERS, 2), (LAYERS,)]


@pytest.mark.parametrize(
    "add",
    [
        lambda x, i: x.cumsum(0),
        lambda x, i: x.index_add(0, i // 2, x),
        lambda x, i: torch.bincount(i, x),
        lambda x, i: torch.bincount(i, weights=x),
        lambda x, i: i.scatter_add(0, i, i),
    ],
)
def test_the_watch_sees_what_adds_in_any_order(monkeypatch, add):
    x, i = torch.ones(3), torch.arange(3)
    with watched(monkeypatch, UNORDERED):
        i.cumsum(0), torch.bincount(i), x.index_add(0, i, x)
    with pytest.raises(AssertionError), watched(monkeypatch, UNORDERED):
        add(x, i)


def quantizers():
    for method in ("lsq", "ewgs", "pact"):
        for bits in (None, 4):
            yield f"{method}, inputs {bits}", lambda m, method=method, bits=bits: Quantizer(m, method, 4, bits)
    yield "channels", lambda m: Quantizer(m, "lsq", 4, axis=0)
    yield "groups", lambda m: Quantizer(m, "lsq", 4, group_size=4)


def palettizers():
    for options in (
        {},
        {"metric": "sqeuclidean"},
        {"cluster_dim": 2},
        {"group_size": 4},
        {"tau": (1.0, 0.1, 8)},
        {"preserve_zeros": True},
        {"per_channel_scale": True, "lut_dtype": "int8"},
        {"granularity": (2, 5), "lut_dtype": "fp8"},
        {"gradient": "implicit"},
        {"overrides": {"1": {"bits": 3}}},
    ):
        yield str(options), lambda m, options=options: Palettizer(m, 2, **options)


ATTACHED = dict([*quantizers(), *palettizers()])
REGULARIZERS = {
    "soft_min_max": {},
    "soft_min_max of std": {"alpha_unit": "std", "alpha": 8.0},
    "margin": {"k": 0.01},
    "l_inf": {},
    "kure": {},
}


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.bfloat16)], ids=["one dtype", "two"])
@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_regularizer_never_waits(monkeypatch, name, dtypes):
    model = linears(4, dtypes=dtypes)
    regularizer = RangeRegularizer(model, name.split()[0], **REGULARIZERS[name])
    for step in range(STEPS):
        with watched(monkeypatch, READS | MADE | UNORDERED if step else frozenset()):
            regularizer().backward()
            regularizer.accumulate_grad_()


@pytest.mark.parametrize("name", ATTACHED)
def test_a_step_of_training_never_waits(monkeypatch, name):
    """From the third on, where the first have prepared it; on a GPU a palettizer warns of centroids that are not
    finite only where it searches for spare ones."""
    model = linears(4)
    attached = ATTACHED[name](model)
    monkeypatch.setattr(Palettizer, "_warn_of_unsound", lambda self: None)
    monkeypatch.setattr(quantizer_module.Quantizer, "_watch", lambda self, *args: None)
    for step in range(7):
        searches = isinstance(attached, Palettizer) and step + 1 in (1, 2, 4)
        with watched(monkeypatch, READS | MADE | UNORDERED if step > 1 and not searches else frozenset()):
            model(torch.randn(5, 12)).square().sum().backward()
            if isinstance(attached, Palettizer):
                attached.step()


def calls(op, learned):
    """A call of a public function of a list, its parameters tensors."""
    g = torch.Generator().manual_seed(0)
    ws = [(torch.randn(shape, generator=g) * SCALE).requires_grad_() for shape in ((40, 6), (131,), (12, 4))]
    arguments = op.arguments(SCALE)
    for p in op.parameters:
        if learned:
            arguments[p.name] = torch.full((len(ws),), arguments[p.name], requires_grad=p.learned)
    if op.family == "dkm":
        arguments["centroids"] = [torch.linspace(-0.1, 0.1, 4).requires_grad_(op.function == "dkm") for _ in ws]
    return lambda: getattr(r2, op.function)(ws, **arguments)


def flat(results):
    if isinstance(results, torch.Tensor):
        return [results]
    return [t for result in results for t in flat(result)] if isinstance(results, (list, tuple)) else []


@pytest.mark.parametrize("learned", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.label)
def test_a_function_never_waits(monkeypatch, op, learned):
    call = calls(op, learned)
    for step in range(2):
        with watched(monkeypatch, READS | MADE | UNORDERED if step else frozenset()):
            differentiable = [y for y in flat(call()) if y.requires_grad]
            torch.autograd.backward(differentiable, [torch.ones_like(y) for y in differentiable])


def batches():
    torch.manual_seed(1)
    return [torch.randn(6, 12).relu(), torch.randn(5, 12) * 3]


@pytest.mark.parametrize("method", ["mse", "minmax", "percentile"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_calibrate_adds_in_one_order(monkeypatch, method, symmetric):
    """On a GPU: what `counted` does there."""
    monkeypatch.setattr(clipping, "counted", lambda codes, most, _: own(codes, most, False))
    found, own = [], COUNTED
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            with watched(monkeypatch, UNORDERED):
                quantizer = r2.calibrate(linears(3), batches(), 4, 8, method=method, symmetric=symmetric)
        finally:
            torch.use_deterministic_algorithms(False)
        found.append(quantizer.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_calibrate_of_groups_adds_in_one_order(monkeypatch):
    with watched(monkeypatch, UNORDERED):
        r2.calibrate(linears(2), None, 4, None, group_size=4)


def test_observing_an_input_never_waits(monkeypatch):
    histogram = clipping.Histogram(2)
    monkeypatch.setattr(clipping, "counted", lambda codes, most, _: COUNTED(codes, most, False))
    x = torch.randn(2, 100)
    with watched(monkeypatch, READS | MADE | UNORDERED):
        histogram.add(x)
        histogram.add(x * 100)
    assert histogram.count.sum() == 400


@pytest.mark.parametrize("in_turn", [False, True])
def test_codes_are_counted(in_turn):
    codes = torch.tensor([[3, 0, 3, 1], [2, 2, 2, 3]], dtype=torch.int16)
    assert clipping.counted(codes, 4, in_turn).tolist() == [[1, 1, 0, 2], [0, 0, 3, 1]]
    assert clipping.counted(codes[:, ::2], 4, in_turn).tolist() == [[0, 0, 0, 2], [0, 0, 2, 0]]
