"""RangeRegularizer: what it computes, how it lives with a model and an optimizer."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import r2kernels as r2
from r2kernels import reference

pytestmark = pytest.mark.usefixtures("nan_filled", "one_thread")


def model(device, mixed=False):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 8, 3),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 10),
        nn.Linear(10, 3, bias=False),
    )
    net[2].to(memory_format=torch.channels_last)
    net = net.to(device)
    if mixed:
        net[4].double()
        net[5].bfloat16()
    return net


CONFIGURATIONS = [
    {},
    {"alpha": 5.0, "weight": 0.5},
    {"alpha": [0.1, 0.5, 1.0, 2.0]},
    {"alpha": torch.tensor([0.1, 0.5, 1.0, -2.0])},
    {"alpha": 3.0, "learn": False},
    {"alpha_unit": "std", "alpha": 4.0},
    {"alpha_unit": "std", "alpha": 4.0, "cluster_dim": 2},
    {"alpha_unit": "std", "alpha": 4.0, "learn": False},
    {"loss": "margin"},
    {"loss": "margin", "k": 0.01, "margin_std": 1.5},
    {"loss": "margin", "k": 5, "cluster_dim": 4, "layout": "contiguous"},
    {"loss": "margin", "learn": False},
    {"loss": "l_inf"},
    {"loss": "l_inf", "cluster_dim": 3},
    {"loss": "kure"},
    {"cluster_dim": 3, "layout": "contiguous"},
]


configurations = pytest.mark.parametrize(
    "options", CONFIGURATIONS, ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "default"
)


def by_hand(net, reg, options):
    """The sum of the reference's losses, layer by layer."""
    columns = {k: options[k] for k in ("cluster_dim", "layout") if k in options}
    d, total = options.get("cluster_dim", 1), 0.0
    for i, name in enumerate(reg.names):
        w = net.get_parameter(name)
        if reg.loss == "margin":
            loss = reference.margin(w, reg.M[i], k=options.get("k", 1), **columns)
        elif reg.loss == "l_inf":
            loss = reference.l_inf(w, **columns)
        elif reg.loss == "kure":
            loss = reference.kure(w)
        elif options.get("alpha_unit") == "std":
            alpha = reg.alpha[i].to(torch.promote_types(w.dtype, torch.float32))
            low, high = reference.soft_extrema(w, alpha / reference.weight_stats(w).std, **columns)
            loss = (high - low).sum() + d * (-alpha).exp()
        else:
            loss = reference.soft_min_max(w, reg.alpha[i], **columns)
        total = total + loss.float()
    return reg.weight * total


def gradients(net, reg):
    return [p.grad for p in [*net.parameters(), *reg.parameters()]]


def clear(net, reg):
    for p in [*net.parameters(), *reg.parameters()]:
        p.grad = None


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed"])
@configurations
def test_value_and_gradients_are_those_of_the_reference(options, mixed, device):
    net = model(device, mixed)
    reg = r2.RangeRegularizer(net, **options)
    loss, expected = reg(), by_hand(net, reg, options)
    assert loss.shape == ()
    assert_close(loss.float(), expected)
    loss.backward()
    found = gradients(net, reg)
    clear(net, reg)
    expected.backward()
    for a, b in zip(found, gradients(net, reg), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b)
    assert_close(sum(value.float() for value in reg.losses().values()) * reg.weight, loss.detach().float())
    assert list(reg.losses()) == reg.names and not any(value.requires_grad for value in reg.losses().values())


# how the weights and their gradients are when accumulate_grad_ meets them
def start_zero(net):
    for p in net.parameters():
        p.grad = torch.zeros_like(p)


def start_random(net):
    for p in net.parameters():
        p.grad = torch.randn_like(p)


def start_other_strides(net):
    start_random(net)
    net[2].weight.grad = net[2].weight.grad.contiguous()
    net[0].weight.grad = net[0].weight.grad.contiguous(memory_format=torch.channels_last)
    net[4].weight.grad = torch.randn_like(net[4].weight.t()).t()


def start_frozen(net):
    start_random(net)
    net[0].weight.requires_grad_(False).grad = None
    net[5].weight.requires_grad_(False)


def start_every_second(net):
    net[4].weight = nn.Parameter(torch.randn(10, 256, device=net[4].weight.device, dtype=net[4].weight.dtype)[:, ::2])
    start_random(net)


STARTS = {
    "none": lambda net: None,
    "zero": start_zero,
    "random": start_random,
    "other strides": start_other_strides,
    "frozen": start_frozen,
    "weight not dense": start_every_second,
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed"])
@configurations
def test_accumulate_grad_equals_backward(options, mixed, start, device):
    net = model(device, mixed)
    STARTS[start](net)
    other = copy.deepcopy(net)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    reg = r2.RangeRegularizer(net, **options)
    twin = r2.RangeRegularizer(other, **options)
    kept = [p.grad for p in net.parameters()]
    for _ in range(2):
        value, expected = reg.accumulate_grad_(), twin()
        expected.backward()
        assert not value.requires_grad
        assert_close(value, expected.detach())
    for g, e in zip(gradients(net, reg), gradients(other, twin), strict=True):
        assert (g is None) == (e is None)
        if g is not None and g.dtype == torch.bfloat16:
            # each of two additions is rounded once here, and there twice: the gradient before it is added
            assert (g - e).abs().max() <= 2 * torch.finfo(g.dtype).eps * e.abs().max()
        elif g is not None:
            assert_close(g, e)
    assert all(a is None or a is b.grad for a, b in zip(kept, net.parameters(), strict=True)), (
        "a gradient was replaced, not added to"
    )


@pytest.mark.parametrize("scale", [0.25, 1024, torch.tensor(1024.0), torch.tensor(0.5, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"alpha_unit": "std", "alpha": 3.0}, {"loss": "margin", "cluster_dim": 2}, {"loss": "kure"}],
    ids=str,
)
def test_scale(options, scale, device):
    """As a GradScaler has it: gradients are scaled, the value that comes back is not."""
    net = model(device)
    reg = r2.RangeRegularizer(net, **options)
    scale = scale.to(device) if isinstance(scale, torch.Tensor) else scale
    (reg() * scale).backward()
    expected = [g if g is None else g.clone() for g in gradients(net, reg)]
    clear(net, reg)
    assert_close(reg.accumulate_grad_(scale), reg().detach())
    for g, e in zip(gradients(net, reg), expected, strict=True):
        assert g is e is None or g.dtype == e.dtype
        if g is not None:
            assert_close(g, e)
    with pytest.raises((TypeError, ValueError), match="scale must be"):
        reg.accumulate_grad_("1")
    with pytest.raises(ValueError, match="scale must be a finite number, got nan"):
        reg.accumulate_grad_(float("nan"))


def test_accumulate_grad_refuses_what_has_no_gradient_of_its_own(device):
    net = model(device)
    net[4].weight.grad = torch.zeros_like(net[4].weight).to_sparse()
    with pytest.raises(RuntimeError, match=r"the gradient of 4\.weight is torch\.sparse_coo"):
        r2.RangeRegularizer(net).accumulate_grad_()


def test_parametrized_later(device):
    """A weight that was parametrized after the regularizer was made is followed, with its gradient.

    Weights are looked up at every call.
    """
    net = model(device)
    reg = r2.RangeRegularizer(net, alpha=3.0)
    nn.utils.parametrize.register_parametrization(net[4], "weight", nn.Softplus())
    weights = [net[0].weight, net[2].weight, net[4].weight, net[5].weight]
    loss = reg()
    assert_close(loss, reg.weight * sum(reference.soft_min_max(w, reg.alpha[i]) for i, w in enumerate(weights)))
    loss.backward()
    assert net[4].parametrizations.weight.original.grad.count_nonzero() > 0
    with pytest.raises(
        RuntimeError,
        match=r"4\.weight is computed from other parameters \(a parametrization\) and has no \.grad; use reg\(\)",
    ):
        reg.accumulate_grad_()


@pytest.mark.parametrize("options", [{"alpha": 2.0}, {"loss": "margin"}, {"learn": False, "alpha": 1.5}], ids=str)
def test_state_dict(options, device):
    net = model(device)
    reg = r2.RangeRegularizer(net, **options)
    name = "M" if reg.loss == "margin" else "alpha"
    assert list(reg.state_dict()) == [name]
    with torch.no_grad():
        getattr(reg, name).add_(torch.arange(4, device=device))
    fresh = r2.RangeRegularizer(net, **{**options, **({"alpha": 9.0} if name == "alpha" else {"margin_std": 9.0})})
    assert fresh() != reg()
    fresh.load_state_dict(reg.state_dict())
    assert torch.equal(fresh(), reg())
    assert list(r2.RangeRegularizer(net, loss="l_inf").state_dict()) == []


def test_deepcopy_of_both(device):
    """A copy of model and regularizer together belongs to the copied model."""
    both = nn.ModuleDict({"net": model(device)})
    both["reg"] = r2.RangeRegularizer(both["net"], alpha=2.0)
    twin = copy.deepcopy(both)
    with torch.no_grad():
        both["net"][0].weight.mul_(3)
    assert both["reg"]() != twin["reg"]()
    assert_close(twin["reg"](), r2.RangeRegularizer(twin["net"], alpha=2.0)())
    twin["reg"]().backward()
    assert twin["net"][0].weight.grad is not None and both["net"][0].weight.grad is None
    assert not any(name.startswith("reg") and "weight" in name for name in both.state_dict()), (
        "the model's weights are not the regularizer's"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_follows_the_model_to_another_dtype(dtype, device):
    net = model(device)
    reg = r2.RangeRegularizer(net, alpha=2.0)
    net.to(dtype)
    loss = reg()
    assert loss.dtype == torch.promote_types(dtype, torch.float32) and reg.alpha.dtype == torch.float32
    assert_close(loss, reg.weight * r2.soft_min_max([net.get_parameter(n) for n in reg.names], 2.0).sum())
    loss.backward()
    assert net[0].weight.grad.dtype == dtype and reg.alpha.grad.dtype == torch.float32


def test_follows_assigned_weights(device):
    net, other = model(device), model(device)
    reg = r2.RangeRegularizer(net, alpha=2.0)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    net.load_state_dict(other.state_dict(), assign=True)
    assert_close(reg(), r2.RangeRegularizer(other, alpha=2.0)())
    net[0].weight.data = torch.zeros_like(net[0].weight)
    assert_close(reg.losses()["0.weight"].item(), torch.tensor(-2.0).exp().item())


def test_shared_and_replaced_parameters(device):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to(device)
    net[1].weight = net[0].weight
    reg = r2.RangeRegularizer(net)
    assert reg.names == ["0.weight"]
    net[0].weight = nn.Parameter(torch.zeros(3, 3, device=device))
    assert_close(reg.losses()["0.weight"].item(), torch.tensor(-0.1).exp().item())


def test_param_groups(device):
    net = model(device)
    reg = r2.RangeRegularizer(net, loss="margin")
    (group,) = reg.param_groups(lr=0.5)
    assert group["params"] == [reg.M] and group["weight_decay"] == 0 and group["lr"] == 0.5
    assert reg.param_groups(weight_decay=0.1)[0]["weight_decay"] == 0.1
    assert (
        r2.RangeRegularizer(net, learn=False).param_groups()
        == r2.RangeRegularizer(net, loss="kure").param_groups()
        == []
    )
    optimizer = torch.optim.AdamW([{"params": net.parameters()}, *reg.param_groups()], lr=1e-3, weight_decay=0.5)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0]


def test_margins_start_at_a_multiple_of_std(device):
    net = model(device, mixed=True)
    reg = r2.RangeRegularizer(net, loss="margin", margin_std=1.5)
    assert_close(reg.M.detach(), torch.stack([1.5 * net.get_parameter(n).float().std() for n in reg.names]))


def test_constant_weight_in_units_of_std(device):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(device)
    nn.init.constant_(net[0].weight, 0.3)
    reg = r2.RangeRegularizer(net, alpha_unit="std", alpha=4.0)
    assert_close(reg.losses()["0.weight"].item(), torch.tensor(-4.0).exp().item())
    for call in (lambda: reg().backward(), reg.accumulate_grad_):
        clear(net, reg)
        call()
        assert (
            net[0].weight.grad.count_nonzero() == 0
            and reg.alpha.grad.isfinite().all()
            and net[1].weight.grad.count_nonzero() > 0
        )


def test_repr(device):
    reg = r2.RangeRegularizer(model(device), weight=0.5, alpha_unit="std", cluster_dim=2)
    assert repr(reg) == "RangeRegularizer(loss='soft_min_max', weight=0.5, layers=4, cluster_dim=2, alpha_unit='std')"


@pytest.mark.parametrize("in_place", [False, True], ids=["backward", "accumulate_grad_"])
@pytest.mark.parametrize(
    "options",
    [{"alpha_unit": "std", "alpha": 3.0}, {"loss": "margin", "k": 0.05}, {"loss": "l_inf"}, {"loss": "kure"}],
    ids=str,
)
def test_training_with_it_changes_the_weights_as_meant(options, in_place, device):
    """Smaller ranges relative to the spread (kure: a kurtosis nearer 1.8) than the same training without."""
    x, y = (
        torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(device),
        torch.arange(64, device=device) % 3,
    )

    def train(weight):
        net = model(device)
        reg = r2.RangeRegularizer(net, weight=weight, **options)
        optimizer = torch.optim.Adam([{"params": net.parameters()}, *reg.param_groups()], lr=3e-3)
        for _ in range(30):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            if weight and in_place:
                loss.backward()
                reg.accumulate_grad_()
            else:
                (loss + reg()).backward()
            optimizer.step()
        stats = r2.weight_stats([net.get_parameter(n).detach() for n in reg.names])
        return (
            r2.kure([net.get_parameter(n).detach() for n in reg.names]).sum()
            if reg.loss == "kure"
            else (stats.max - stats.min).sum()
        )

    assert train(0.3) < train(0.0)
