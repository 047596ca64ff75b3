"""Copies of attached models: averages of weights, and attachments that are a part of the model."""

import copy
import io

import pytest
import torch
from nn.attached import images
from nn.quantized import plain
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

from r2kernels import Palettizer, Quantizer, load_palettized, save_quantized
from r2kernels.nn import attached, copy_attached

pytestmark = pytest.mark.usefixtures("one_thread")


def digits():
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def accuracy(model):
    x, y = digits()
    model.eval()
    right = (model(x[1200:]).argmax(1) == y[1200:]).float().mean().item()
    model.train()
    return right


def train(model, owner, average=None, steps=200):
    x, y = digits()
    learned = owner.param_groups() if isinstance(owner, Quantizer) else []
    optimizer = torch.optim.Adam([{"params": model.parameters()}, *learned], lr=2e-3)
    for i in range(steps):
        some = torch.arange(i * 64, i * 64 + 64) % 1200
        optimizer.zero_grad()
        cross_entropy(model(x[some]), y[some]).backward()
        optimizer.step()
        if isinstance(owner, Palettizer):
            owner.step()
        if average:
            average.update_parameters(model)


@pytest.mark.parametrize("attach", [lambda m: Palettizer(m, 2), lambda m: Quantizer(m, "lsq", 2, 2)])
def test_averaged_models(attach):
    """An AveragedModel has an attachment of its own; `copy_attached` gives it the centroids and ranges."""
    model = perceptron()
    owner = attach(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    train(model, owner, average)
    (mine,) = attached(average.module)
    assert mine is not owner and mine.layers[0].weight() is average.module[0].weight
    copy_attached(model, average.module)
    for name, value in owner.state_dict().items():
        assert torch.equal(mine.state_dict()[name], value)
    assert accuracy(model) > 0.85 and accuracy(average) > 0.85
    other = perceptron()
    again = attach(other)
    other.load_state_dict(average.module.state_dict()), again.load_state_dict(mine.state_dict())
    x = digits()[0]
    assert torch.equal(other.eval()(x), average.eval()(x))


def test_averaging_ranges():
    """decay * target's + (1 - decay) * source's, of what has started."""
    model = plain()
    quantizer = Quantizer(model, "lsq", 4, 4)
    early = copy.deepcopy(model)
    quantizer.initialize(images()[0])
    copied = copy.deepcopy(model)
    (mine,), step = attached(copied), quantizer.weights._modules["0/weight"].step
    start = step.item()
    with torch.no_grad():
        step.mul_(3)
    copy_attached(model, copied, decay=0.75)
    assert mine.weights._modules["0/weight"].step.item() == pytest.approx(start * 1.5)
    copy_attached(model, early, decay=0.75)
    assert attached(early)[0].weights._modules["0/weight"].step.item() == step.item()


def test_weights_swapped_in_place():
    """As libraries for EMA do before an evaluation, and back after it."""
    model = perceptron()
    palettizer = Palettizer(model, 2)
    train(model, palettizer, steps=100)
    x = digits()[0]
    before = model.eval()(x)
    kept = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.data.copy_(p.data * 0.5)
    halved = model(x)
    assert not torch.equal(halved, before)
    for p, old in zip(model.parameters(), kept, strict=True):
        p.data.copy_(old)
    assert torch.equal(model(x), before)


def test_what_cannot_be_copied():
    model, other = plain(), plain()
    Palettizer(model, 2)
    with pytest.raises(ValueError, match=r"source has \['Palettizer'\] and target \[\] attached"):
        copy_attached(model, other)
    Quantizer(other, "lsq", 4)
    with pytest.raises(ValueError, match=r"source has \['Palettizer'\] and target \['Quantizer'\]"):
        copy_attached(model, other)
    with pytest.raises(ValueError, match="decay must be a number in"):
        copy_attached(model, copy.deepcopy(model), decay=1.0)


class Owning(nn.Module):
    """A model with its quantizer as a part."""

    def __init__(self, *options):
        super().__init__()
        self.net = plain()
        self.quantizer = Quantizer(self, *options)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("method", ["lsq", "ewgs", "pact"])
def test_a_quantizer_that_is_a_part_of_its_model(method, tmp_path):
    model, (x, y) = Owning(method, 2, 2), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        cross_entropy(model(x), y).backward()
        optimizer.step()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert state["quantizer.started"].all() and state["quantizer.inputs.net/0.started"]
    other = Owning(method, 2, 2)
    other.load_state_dict(state)
    assert torch.equal(other.eval()(x), model.eval()(x))
    other.train()(x)
    assert torch.equal(other.state_dict()["quantizer.inputs.net/0.signed"], state["quantizer.inputs.net/0.signed"])
    for name, p in other.quantizer.named_parameters():
        assert torch.equal(p, state[f"quantizer.{name}"])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    save_quantized(model.quantizer, tmp_path / "f")
    assert load_palettized(tmp_path / "f").keys() == {f"net.{name}" for name in plain().state_dict()}


def test_buffers_copied_into_an_average_start_it():
    """AveragedModel copies buffers in place, so also the flags of a quantizer that is a part of the model."""
    model, x = Owning("lsq", 4, 4), images()[0]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.0))
    model(x)
    average.update_parameters(model)
    assert_close(average.eval()(x), model.eval()(x))
    assert average.module.quantizer.has_started()
