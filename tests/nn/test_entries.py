"""What holds for everything attached: parts of a model, exceptions, changes behind its back, a second attachment."""

import copy

import pytest
import torch
from nn.attached import images
from nn.quantized import plain
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from r2kernels import Palettizer, Quantizer, calibrate
from r2kernels.nn import attached

pytestmark = pytest.mark.usefixtures("one_thread")


def palettize(model):
    return Palettizer(model, 2)


def quantize(model):
    quantizer = Quantizer(model, "lsq", 4, 4)
    quantizer.initialize(images()[0])
    return quantizer


def round_to_bits(model):
    return calibrate(model, None, 4, None)


ATTACH = (palettize, quantize, round_to_bits)


def fresh(model, owner, attach):
    """What a new attachment with the same state gives in eval."""
    other = plain()
    again = attach(other)
    other.to(next(model.parameters()).dtype)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(owner.state_dict())
    return other.eval()


def swap_data(model):
    for p in model.parameters():
        p.data = p.data.neg()


def copy_data(model):
    for p in model.parameters():
        p.data.copy_(p.data * 3)


def vector(model):
    nn.utils.vector_to_parameters(-nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters())


def fused_step(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()


CHANGES = (swap_data, copy_data, vector, fused_step, nn.Module.bfloat16, nn.Module.half, nn.Module.double)


@pytest.mark.parametrize("attach", ATTACH)
@pytest.mark.parametrize("change", CHANGES)
def test_after_any_change_eval_is_that_of_a_fresh_attachment(attach, change):
    model, x = plain(), images()[0]
    owner = attach(model)
    model.eval()
    model(x)
    change(model)
    x = x.to(model[0].weight.dtype)
    assert torch.equal(model(x), fresh(model, owner, attach)(x))


@pytest.mark.parametrize("attach", ATTACH)
def test_frozen(attach):
    """Inside the block hard weights are kept, and not after it."""
    model, x = plain(), images()[0]
    owner = attach(model)
    model.eval()
    with owner.frozen() as same:
        first = model(x)
        model[0].weight.data.mul_(-1)
        assert torch.equal(model(x), first) and same is owner
    assert not torch.equal(model(x), first)
    assert torch.equal(model(x), fresh(model, owner, attach)(x))


@pytest.mark.parametrize("attach", ATTACH)
def test_backward_in_eval_is_straight_through(attach):
    """Every weight has the gradient that its hard weight has."""
    model, (x, y) = plain(), images()
    owner = attach(model)
    model.eval()
    cross_entropy(model(x), y).backward()
    other = copy.deepcopy(model)
    found = [p.grad for p in model.parameters()]
    attached(other)[0].remove()
    quantized_inputs = bool(owner._input_modules())
    other.zero_grad()
    if not quantized_inputs:
        cross_entropy(other(x), y).backward()
        assert_close(found, [p.grad for p in other.parameters()])
    assert all(g is not None and g.abs().max() > 0 for g in found)


@pytest.mark.parametrize("attach", ATTACH)
def test_a_part_in_eval_runs_on_hard_weights(attach):
    model, x = plain(), images()[0]
    owner = attach(model)
    model.train()
    model[4].eval()
    features = model[:4](x).detach()
    hard = owner._hard(owner.layers[1:])[0]
    seen = []
    model[4].register_forward_pre_hook(lambda *_: seen.append(model[4].weight.detach()))
    model[4](features), model(x)
    assert all(torch.equal(w, hard) for w in seen) and len(seen) == 2


class Interrupted(nn.Module):
    error = None

    def forward(self, x):
        if self.error:
            raise self.error
        return x


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), ValueError("wrong")])
@pytest.mark.parametrize("attach", ATTACH)
def test_after_an_exception_the_model_is_what_it_was(attach, error):
    model = nn.Sequential(*plain(), Interrupted())
    owner = attach(model)
    weights = [model[0].weight, model[4].weight]
    for training in (True, False):
        model.train(training)
        model[5].error = error
        with pytest.raises(type(error)):
            model(images()[0])
        assert model[0].weight is weights[0] and model[4].weight is weights[1] and not owner._entry
        model[5].error = None
        assert torch.equal(copy.deepcopy(model)(images()[0]), model(images()[0]))


@pytest.mark.parametrize("attach", ATTACH)
def test_a_second_attachment_is_an_error(attach):
    model, x = plain(), images()[0]
    first = Quantizer(model, "lsq", 2, 2)
    with pytest.raises(ValueError, match=r"0\.weight is already replaced by a Quantizer; call its remove\(\) first"):
        attach(model)
    first.remove(bake=False)
    owner = attach(model)
    with pytest.raises(ValueError, match=f"replaced by a {type(owner).__name__}"):
        Palettizer(model, 2)
    second = Palettizer(model, 2, replace=True)
    assert attached(model) == [second]
    other = plain()
    Palettizer(other, 2)
    assert torch.equal(model(x), other(x))


def test_palettes_with_quantized_activations():
    """A Quantizer with weight_bits=None quantizes the inputs alone, so it goes beside a Palettizer."""
    model, (x, y) = plain(), images()
    palettizer = Palettizer(model, 2)
    quantizer = Quantizer(model, "lsq", None, 8)
    optimizer = torch.optim.SGD([{"params": model.parameters()}, *quantizer.param_groups()], lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(cross_entropy(model(x), y))
        losses[-1].backward()
        optimizer.step(), palettizer.step()
    assert losses[-1] < losses[0] and all(p.grad is not None for p in quantizer.parameters())
    model.eval()
    seen = []
    model[4].register_forward_pre_hook(lambda module, args: seen.append((module.weight.detach(), args[0].detach())))
    model(x)
    w, inputs = seen[0]
    assert len(w.unique()) == 4 and 4 < len(inputs.unique()) <= 256
    assert quantizer.coded() == {} and set(palettizer.sizes()) == {"0.weight", "4.weight"}
    with pytest.raises(ValueError, match=r"the input of 0 is already replaced by a Quantizer"):
        Quantizer(model, "lsq", None, 4)
    palettizer.remove(), quantizer.remove()
    assert len(model[4].weight.unique()) == 4 and not attached(model)


class Checkpointed(nn.Module):
    def __init__(self, reentrant, whole=False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
        self.reentrant = reentrant

    def part(self, layer):
        if self.reentrant is None:
            return lambda x: layer(x).relu()
        return lambda x: checkpoint(lambda v: layer(v).relu(), x, use_reentrant=self.reentrant)

    def forward(self, x):
        return self.c(self.part(self.b)(self.part(self.a)(x)))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the run in which ranges start
@pytest.mark.parametrize("attach", [palettize, lambda model: Quantizer(model, "lsq", 4, 4)])
def test_every_kind_of_checkpointing_gives_the_same_gradients(attach):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for reentrant in (None, False, True):
        model = Checkpointed(reentrant)
        owner = attach(model)
        for _ in range(2):
            model.zero_grad(), owner.zero_grad()
            model(x.clone().requires_grad_()).square().sum().backward()
        found.append([p.grad for p in [*model.parameters(), *owner.parameters()]])
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_the_whole_model(reentrant):
    x, model, other = torch.randn(4, 16), Checkpointed(None), Checkpointed(None)
    palettize(model), palettize(other)
    model(x).sum().backward()
    for _ in range(2):
        other.zero_grad()
        checkpoint(other, x.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
    assert_close([p.grad for p in model.parameters()], [p.grad for p in other.parameters()])


def test_forward_without_hooks_and_a_step_of_a_trainer():
    """`model.forward(x)` and a method that calls a part run on the same weights as the model does."""

    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = plain()

        def training_step(self, x, y):
            return cross_entropy(self.net(x), y)

        def forward(self, x):
            return self.net(x)

    for method in ("lsq", "ewgs", "pact"):
        (x, y), found = images(), []
        for call in (Trained.training_step, lambda m, x, y: cross_entropy(m.forward(x), y)):
            model = Trained()
            quantizer = Quantizer(model, method, 2, 2)
            loss = call(model, x, y)
            loss.backward()
            assert quantizer.has_started() and all(p.grad is not None for p in quantizer.parameters())
            found.append(loss)
        model = Trained()
        Quantizer(model, method, 2, 2)
        assert_close(found, [cross_entropy(model(x), y)] * 2)
