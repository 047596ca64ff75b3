"""How many launches a step of training makes beside the kernels of this package, that it never waits for the device,
and that nothing adds floating-point numbers in an order that changes."""

import itertools

import pytest
import torch
from launches import MADE, READS, watched
from torch import nn

import r2kernels as r2

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:kmeans. .* will be repeated")]
LAYERS = 21
STEPS = 4  # of training; the first prepare


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
