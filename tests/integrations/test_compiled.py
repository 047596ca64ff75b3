"""torch.compile of a whole step of training."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from r2kernels import Palettizer, Quantizer, RangeRegularizer

# graph breaks of a whole step as Dynamo counts them, most in the Python of backwards, some in `Palettizer.step`
BREAKS = {"reg()": 18, "accumulate_grad_": 2, "palettizer": 42, "quantizer": 33}


class Step:
    """A step of training, with one of the modules in it."""

    def __init__(self, kind):
        torch.manual_seed(0)
        self.kind, self.x, self.y = kind, torch.randn(8, 8), torch.randint(4, (8,))
        self.model = nn.Linear(8, 4)
        if kind == "palettizer":
            self.r2 = Palettizer(self.model, 2, iterations=1)
        elif kind == "quantizer":
            self.r2 = Quantizer(self.model, "lsq", 4, 4)
            self.r2.initialize(self.x)
        else:
            self.r2 = RangeRegularizer(self.model)
        own = [] if kind == "palettizer" else self.r2.param_groups()
        self.optimizer = torch.optim.SGD([{"params": self.model.parameters()}, *own], lr=0.1)

    def loss(self):
        loss = cross_entropy(self.model(self.x), self.y)
        return loss + self.r2() if self.kind == "reg()" else loss

    def __call__(self):
        self.loss().backward()
        if self.kind == "accumulate_grad_":
            self.r2.accumulate_grad_()
        self.optimizer.step()
        if self.kind == "palettizer":
            self.r2.step()
        self.optimizer.zero_grad()


def breaks(kind):
    Step(kind)()  # what is loaded and made once is there now
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.compile(Step(kind).__call__, backend="eager")()
    return sum(torch._dynamo.utils.counters["graph_break"].values())


@pytest.mark.filterwarnings("ignore:.*Dynamo")
@pytest.mark.skipif(torch.__version__ < "2.13", reason="the numbers are of torch 2.13; others break at other places")
@pytest.mark.parametrize("kind", BREAKS)
def test_no_more_graph_breaks(kind):
    assert breaks(kind) <= BREAKS[kind]


@pytest.mark.parametrize("kind", ("reg()", "palettizer", "quantizer"))
def test_a_loss_is_one_graph(kind):
    step = Step(kind)
    eager = step.loss()
    torch.testing.assert_close(torch.compile(step.loss, fullgraph=True, backend="aot_eager")(), eager)
