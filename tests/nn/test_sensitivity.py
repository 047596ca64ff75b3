"""Importances by hand, a model that stays as it was, and what takes importances."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from r2kernels import Palettizer, calibrate, kmeans, sensitivity
from r2kernels.nn.clipping import weight_qparams


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, groups=2), nn.BatchNorm2d(8), nn.Dropout(), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10)
    )


def data(count=3, size=4):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 2, 6, 6, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(count)
    ]


def entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def test_fisher_is_the_mean_of_squared_gradients():
    model, batches = network(), data()
    found = sensitivity(model, batches, loss=entropy)
    model.eval()
    for name in ("0.weight", "5.weight"):
        p = model.get_parameter(name)
        grads = torch.stack([torch.autograd.grad(entropy(model, batch), p)[0] for batch in batches])
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], grads.square().mean(0))
    assert list(found) == ["0.weight", "5.weight"]


def test_fisher_without_a_loss_is_the_gauss_newton_diagonal_of_the_outputs():
    """Of a linear layer and one sample the squared inputs, whatever the signs."""
    layer, x = nn.Linear(5, 3), torch.randn(7, 1, 5)
    found = sensitivity(layer, list(x))["weight"]
    torch.testing.assert_close(found, x.square().mean(0).expand(3, 5))


def test_fisher_of_low_precision_is_summed_in_float32():
    layer, x = nn.Linear(5, 3).bfloat16(), torch.full((300, 1, 5), 1.0, dtype=torch.bfloat16)
    found = sensitivity(layer, list(x))["weight"]
    assert found.dtype == torch.float32 and (found == 1).all()  # bfloat16 cannot count beyond 256


@pytest.mark.parametrize("kind", ["fisher", "inputs"])
def test_the_model_is_afterwards_as_it_was(kind):
    model = network().train()
    model[2].eval()
    model[1].weight.requires_grad_(False)
    entropy(model, data()[0]).backward()
    grads = [p.grad for p in model.parameters()]
    copies = [None if g is None else g.clone() for g in grads]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, wanted = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    sensitivity(model, data(), kind=kind)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert wanted == [p.requires_grad for p in model.parameters()]
    for p, grad, copy in zip(model.parameters(), grads, copies, strict=True):
        assert p.grad is grad and (grad is None or torch.equal(grad, copy))
        assert not p._post_accumulate_grad_hooks
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_gradients_stay_when_the_loss_fails():
    model = network()
    model[5].weight.grad = kept = torch.ones_like(model[5].weight)
    with pytest.raises(ZeroDivisionError):
        sensitivity(model, data(), loss=lambda model, batch: 1 / 0)
    assert model[5].weight.grad is kept and model.training


def test_inputs_are_second_moments():
    conv, linear = nn.Conv2d(4, 6, 3, groups=2), nn.Linear(5, 3)
    x = torch.randn(2, 4, 8, 8)
    found = sensitivity(conv, [x], kind="inputs")["weight"]
    moments = x.square().mean((0, 2, 3))
    wanted = torch.cat([moments[:2].expand(3, 2), moments[2:].expand(3, 2)])[:, :, None, None].expand(6, 2, 3, 3)
    torch.testing.assert_close(found, wanted)
    turned = nn.ConvTranspose2d(4, 6, 3)
    found = sensitivity(turned, [x], kind="inputs")["weight"]
    torch.testing.assert_close(found, moments[:, None, None, None].expand(4, 6, 3, 3))
    x = torch.randn(4, 2, 5)
    torch.testing.assert_close(
        sensitivity(linear, list(x), kind="inputs")["weight"], x.square().mean((0, 1)).expand(3, 5)
    )


def test_a_weight_that_no_module_was_called_with_has_no_inputs():
    """Attention reads the weights of its projections without calling them."""
    attention, x = nn.MultiheadAttention(8, 2), torch.randn(5, 1, 8)
    found = sensitivity(attention, [x], kind="inputs", forward=lambda model, x: model(x, x, x)[0])
    assert found == {}
    assert len(sensitivity(attention, [x], forward=lambda model, x: model(x, x, x)[0])) == 2


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids))


def test_a_shared_weight_is_there_once():
    model, ids = Tied(), torch.tensor([[0, 1], [1, 3]])
    assert list(sensitivity(model, [ids])) == ["embedding.weight"]


def test_rows_of_embeddings_have_one_use_more():
    table, ids = nn.Embedding(4, 2), torch.tensor([0, 1, 1])
    uses = sensitivity(table, [ids], kind="inputs")["weight"]
    torch.testing.assert_close(uses, (torch.tensor([2.0, 3, 1, 1]) / 7)[:, None].expand(4, 2))
    found = sensitivity(table, [ids[None, :1], ids[None, 2:]])["weight"]  # squared gradients 1/2, 1/2, 0, 0
    torch.testing.assert_close(found, (torch.tensor([2.0, 2, 1, 1]) / 6)[:, None].expand(4, 2))


def importances_and_errors(form):
    model = network()
    importance = sensitivity(model, data(), loss=entropy)
    for weight in (None, importance):
        palettizer = Palettizer(model, 2, weight=weight, **form)
        hard = {name: c.decoded() for name, c in palettizer.clustered().items()}
        palettizer.remove(bake=False)
        yield [(importance[n] * (w - model.get_parameter(n)).square()).sum().item() for n, w in hard.items()]


@pytest.mark.parametrize("form", [{}, {"group_size": 4}, {"per_channel_scale": True}], ids=str)
def test_a_weighted_start_has_less_weighted_error(form):
    plain, weighted = importances_and_errors(form)
    assert all(b < 0.999 * a for a, b in zip(plain, weighted, strict=True))


def test_groups_that_start_anew_are_weighted():
    model = nn.Linear(32, 16)
    importance = torch.rand(16, 32) ** 8
    palettizer = Palettizer(model, 3, weight={"weight": importance})
    wanted = palettizer.centroids._buffers["weight"].clone()
    torch.testing.assert_close(wanted[0, :, 0], kmeans(model.weight, 8, weight=importance))
    palettizer.centroids._buffers["weight"][:] = torch.arange(8.0)[None, :, None] + 5
    palettizer.step()
    torch.testing.assert_close(palettizer.centroids._buffers["weight"], wanted)


@pytest.mark.parametrize("options", [{}, {"axis": None}, {"group_size": 16}, {"symmetric": False}], ids=str)
def test_calibration_counts_errors_by_importance(options):
    torch.manual_seed(0)
    model = nn.Linear(64, 4)
    importance = torch.rand(4, 64) ** 8
    errors = []
    for weight in (None, {"weight": importance}):
        quantizer = calibrate(model, None, 3, None, weight=weight, **options)
        hat = model.eval()(torch.eye(64)).detach().T - model.bias.detach()[:, None]
        quantizer.remove(bake=False)
        errors.append((importance * (hat - model.weight).square()).sum().item())
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_importances_that_are_all_alike_change_nothing(symmetric):
    w = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for h in (torch.full_like(w, 0.3), torch.zeros_like(w)):
        for options in ({}, {"group_size": 16}):
            a, b = (weight_qparams(w, 3, 0, "mse", symmetric, weight=v, **options) for v in (None, h))
            assert torch.equal(a[0], b[0])


def test_importances_that_are_all_0_are_none():
    model = nn.Linear(8, 3)
    starts = []
    for weight in (None, {"weight": torch.zeros(3, 8)}):
        palettizer = Palettizer(model, 1, weight=weight)
        starts.append(palettizer.centroids._buffers["weight"].clone())
        palettizer.remove(bake=False)
    assert torch.equal(*starts)


@pytest.mark.parametrize(
    ("error", "text", "weight"),
    [
        (TypeError, "weight must be a mapping", torch.ones(3, 8)),
        (ValueError, "of none of the weights, such as weight", {"other": torch.ones(3, 8)}),
        (
            TypeError,
            "weight of weight must be a floating-point tensor, got torch.int64",
            {"weight": torch.ones(3, 8).long()},
        ),
        (ValueError, r"weight of weight must be shaped like it, \(3, 8\), got \(8, 3\)", {"weight": torch.ones(8, 3)}),
        (ValueError, "weight of weight must be finite numbers >= 0", {"weight": torch.full((3, 8), torch.nan)}),
        (ValueError, "weight of weight must be finite numbers >= 0", {"weight": torch.full((3, 8), -1.0)}),
    ],
)
def test_importances_that_cannot_be(error, text, weight):
    for attach in (lambda m: Palettizer(m, 1, weight=weight), lambda m: calibrate(m, None, 4, None, weight=weight)):
        with pytest.raises(error, match=text):
            attach(nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("error", "text", "options"),
    [
        (ValueError, "kind must be one of", {"kind": "hessian"}),
        (TypeError, "loss must be a function", {"loss": 3}),
        (TypeError, 'loss must be .* for kind="fisher" alone', {"kind": "inputs", "loss": entropy}),
        (ValueError, "loss must give one number", {"loss": lambda model, batch: model(batch[0])}),
        (ValueError, "loader is empty", {"loader": []}),
        (TypeError, "loader must give batches", {"loader": torch.ones(3)}),
        (ValueError, "no output with a gradient", {"forward": lambda model, batch: None}),
        (ValueError, "the sensitivity of 0.weight has a NaN", {"loader": [torch.full((1, 2, 6, 6), torch.nan)]}),
    ],
)
def test_errors_name_what_is_wrong(error, text, options):
    with pytest.raises(error, match=text):
        sensitivity(network(), **{"loader": data(), **options})
