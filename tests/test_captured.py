"""What a CUDA graph asks for: a step whose tensors lie elsewhere, as those of a graph do, needs no table that the step
before it has not left. On the CUDA kernels emulated on the CPU, of which nothing is captured."""

from types import SimpleNamespace

import pytest
import torch
from emulate import emulated

import r2kernels as r2
from r2kernels import lists
from r2kernels.nn import Palettizer, Quantizer, RangeRegularizer

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=f"cannot be built: {emulated.why_not()}")

SHAPES = [(64, 24), (300,), (8, 3, 3, 3)]
TERMS = {"kure": {}, "msqe": {"step": 0.2, "bits": 4}, "bin_reg": {"step": 0.2, "bits": 3}, "l_inf": {}}
LOSSES = {
    "l_inf": lambda ws: r2.l_inf(ws),
    "margin": lambda ws: r2.margin(ws, 1.0),
    "soft_min_max": lambda ws: r2.soft_min_max(ws, 0.5),
    "soft_min_max in rows": lambda ws: r2.soft_min_max(ws, 0.5, cluster_dim=2),
    "soft_extrema": lambda ws: torch.cat([s.reshape(-1) for s in r2.soft_extrema(ws, 0.5)]),
    "kure": lambda ws: r2.kure(ws),
    "msqe": lambda ws: r2.msqe(ws, 0.1, 4),
    "bin_reg": lambda ws: r2.bin_reg(ws, 0.1, 3),
    "partial_l2": lambda ws: r2.partial_l2(ws, 0.5),
    "weight_terms": lambda ws: torch.stack(list(r2.weight_terms(ws, TERMS).values())),
}
MAPS = {
    "lsq": lambda ws: r2.lsq(ws, 0.1, 4),
    "lsq by channel": lambda ws: r2.lsq(ws, 0.1, 4, axis=0),
    "ewgs": lambda ws: r2.ewgs(ws, -1.0, 1.0, 4),
    "pact": lambda ws: r2.pact(ws, 1.0, 4),
    "dorefa": lambda ws: r2.dorefa(ws, 4),
    "dkm": lambda ws: _dkm(ws, 1),
    "dkm of rows": lambda ws: _dkm(ws, 2),
}


def _dkm(ws, d):
    count = len(ws) if isinstance(ws, list) else 1
    centroids = [torch.linspace(-1, 1, 4 * d).reshape(4, d).squeeze(1) for _ in range(count)]
    hats, fresh = r2.dkm(ws, centroids if isinstance(ws, list) else centroids[0], 0.3, iterations=2, cluster_dim=d)
    return [*hats, *fresh] if isinstance(ws, list) else [hats, fresh]


def drawn(seed, shapes=SHAPES):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).requires_grad_() for shape in shapes]


@pytest.fixture
def graph(monkeypatch):
    """Called: from here on no table may be made."""
    with emulated.RISING.chosen():
        yield lambda: monkeypatch.setattr(lists, "_on", _refuse)


def _refuse(table, device):
    raise AssertionError(f"a table of {tuple(table.shape)} that the step before did not make")


def step(run, ws):
    made = run(ws)
    sum([m.sum() for m in (made if isinstance(made, (list, tuple)) else [made])]).backward()
    return [w.grad for w in (ws if isinstance(ws, list) else [ws])]


def test_what_is_in_use(monkeypatch):
    """A table that the cache drops stays where streams have yet to read it, and for good where a graph does."""
    device, streams, table = SimpleNamespace(type="cuda"), [], torch.zeros(2)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: streams.append(stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    alone = lists.plan([torch.zeros(3)], None, 1, torch.device("cpu"))
    plan = lists.plan([torch.zeros(3), torch.zeros(4)], None, 1, torch.device("cpu"))
    for value in (alone, plan, table):
        assert lists._in_use(value, device) is value
    assert streams == ["stream"] * 3
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    lists._in_use(table, device)
    assert lists._kept.pop() is table and len(streams) == 3


@pytest.mark.parametrize("name", [*LOSSES, *MAPS])
def test_tensors_that_lie_elsewhere(name, graph):
    run = {**LOSSES, **MAPS}[name]
    expected = step(run, drawn(0))
    kept = drawn(0)  # as long as they live, others lie elsewhere
    graph()
    assert all(torch.equal(a, b) for a, b in zip(step(run, kept), expected, strict=True))


@pytest.mark.parametrize("name", [*LOSSES, *MAPS])
def test_a_tensor_of_another_length(name, graph):
    """Activations of a language model differ in length from batch to batch."""
    run = {**LOSSES, **MAPS}[name]
    step(run, drawn(0, [(16, 40)])[0])
    graph()
    for rows in (17, 300):
        step(run, drawn(1, [(rows, 40)])[0])


def test_assign_and_statistics(graph):
    def run(ws):
        r2.assign(ws, [torch.linspace(-1, 1, 4)] * len(ws))
        r2.weight_stats(ws)

    with torch.no_grad():
        run(drawn(0))
        graph()
        run(drawn(1))


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 10))


def trained(attach):
    """A step of training a model with a module attached."""
    net = model()
    module = attach(net)
    learned = [p for p in (*net.parameters(), *module.parameters())]
    optimizer = torch.optim.SGD(learned, lr=1e-3)

    def run():
        optimizer.zero_grad(set_to_none=True)
        loss = net(torch.randn(8, 20)).square().mean()
        (loss + module() if isinstance(module, RangeRegularizer) else loss).backward()
        optimizer.step()
        if isinstance(module, Palettizer):
            module.step()

    return run


@pytest.mark.parametrize(
    "attach",
    [
        RangeRegularizer,
        lambda net: RangeRegularizer(net, alpha_unit="std"),
        lambda net: RangeRegularizer(net, loss="margin"),
        lambda net: Quantizer(net, "lsq", 4),
        lambda net: Quantizer(net, "pact", 4),
        lambda net: Palettizer(net, bits=2),
    ],
    ids=["soft_min_max", "alpha in units of the std", "margin", "lsq", "pact", "palettes"],
)
def test_steps_of_training(attach, graph):
    run = trained(attach)
    run(), run()
    graph()
    run()
