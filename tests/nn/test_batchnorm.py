"""reestimate_batchnorm: averages over the batches, in a model that else runs as in eval()."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from r2kernels import Quantizer, calibrate
from r2kernels.nn import reestimate_batchnorm

pytestmark = pytest.mark.usefixtures("one_thread")


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))


def batches(*sizes):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(n, 2, 6, 6, generator=g) for n in sizes]


def test_averages_over_the_batches():
    """Of the statistics of each, whatever its size; modes and momentum stay."""
    model, loader = plain().train(), batches(4, 9, 16)
    model[3].eval()
    outputs = [model[0](x) for x in loader]
    reestimate_batchnorm(model, loader)
    assert_close(model[1].running_mean, torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0))
    assert_close(model[1].running_var, torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0))
    assert [m.training for m in model] == [True, True, True, False, True] and model[1].momentum == 0.1
    assert not model[1]._forward_pre_hooks
    reestimate_batchnorm(model, iter(loader), batches=1)
    assert_close(model[1].running_mean, outputs[0].mean((0, 2, 3)))


def test_dropout_is_off_and_parts_of_a_batch_are_passed():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3))
    x = torch.randn(50, 3)
    reestimate_batchnorm(model, [(x, torch.zeros(50))])
    assert_close(model[1].running_mean, x.mean(0))
    reestimate_batchnorm(model, [x], forward=lambda m, batch: m(2 * batch))
    assert_close(model[1].running_mean, 2 * x.mean(0))


def test_a_batch_norm_that_is_called_twice():
    """Averages over its calls, and one that is not reached keeps its statistics."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.other = nn.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(x) + self.norm(3 * x)

    model, x = Twice(), torch.randn(20, 3)
    model.other.running_mean.fill_(7)
    reestimate_batchnorm(model, [x, x + 1])
    assert_close(model.norm.running_mean, 2 * x.mean(0) + 1)
    assert model.norm.momentum is None and (model.other.running_mean == 7).all()


@pytest.mark.parametrize("attach", ["calibrate", "trained"])
def test_of_a_quantized_model(attach):
    """The statistics are of the hard weights and the quantized activations."""
    model, loader = plain(), batches(16, 16)
    quantizer = calibrate(model, loader, 2, 3) if attach == "calibrate" else Quantizer(model, "lsq", 2, 3)
    model.train()(loader[0])
    model.eval()
    before = model[1].running_mean.clone()
    seen = []
    handle = model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for x in loader:
        model(x)
    handle.remove()
    reestimate_batchnorm(model, loader)
    assert_close(model[1].running_mean, torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0))
    assert not torch.equal(model[1].running_mean, before) and not model[1].training
    dense = plain()
    reestimate_batchnorm(dense, loader)
    assert (dense[1].running_mean - model[1].running_mean).abs().max() > 1e-3
    quantizer.remove(bake=False)


def test_an_exception_changes_nothing():
    model, (x,) = plain(), batches(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loader():
        yield x
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reestimate_batchnorm(model, loader())
    assert model.training and model[1].momentum == 0.1 and not model[1]._forward_pre_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": nn.Linear(2, 2)}, ValueError, "Linear has no batch norm with running statistics"),
        ({"model": nn.BatchNorm1d(2, track_running_stats=False)}, ValueError, "BatchNorm1d has no batch norm with"),
        ({"loader": []}, ValueError, "loader is empty; reestimate_batchnorm needs at least one batch"),
        ({"loader": torch.ones(4, 2)}, TypeError, "loader must give batches .* got Tensor"),
        ({"batches": 0}, ValueError, "batches must be an int >= 1, got 0"),
        ({"forward": "x"}, TypeError, r"forward must be a function of \(model, batch\) or None, got 'x'"),
    ],
    ids=range(6),
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        reestimate_batchnorm(**{"model": nn.BatchNorm1d(2), "loader": [torch.ones(4, 2)], **options})
