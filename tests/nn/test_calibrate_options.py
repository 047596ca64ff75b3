"""calibrate's options: by layer, the axis of each, percentiles, what batches may be, inputs that give no range."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from r2kernels import calibrate
from r2kernels.nn import clipping

aten = torch.ops.aten
pytestmark = pytest.mark.usefixtures("one_thread")


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.ConvTranspose1d(6, 5, 3, groups=1), nn.Linear(8, 2))


def signals(count=16):
    return torch.randn(count, 4, 8, generator=torch.Generator().manual_seed(1))


def test_overrides():
    """Every option of a layer, and "skip"; the last pattern that matches counts."""
    model = layers()
    overrides = {
        "*": {"weight_bits": 3},
        "0": {"axis": None, "symmetric": False, "activation_bits": None},
        "2.weight": "skip",
        "3": {"method": "minmax", "activation_bits": 2},
    }
    quantizer = calibrate(model, [signals()], overrides=overrides)
    first, last = quantizer.weights._modules["0/weight"], quantizer.weights._modules["3/weight"]
    assert (first.bits, first.step.dim(), first.zero.dim()) == (3, 0, 0)
    assert (last.bits, last.axis, last.zero) == (3, 0, None)
    assert_close(last.step, torch.maximum(model[3].weight.amax(1) / 3, -model[3].weight.amin(1) / 4).detach())
    assert set(quantizer.weights._modules) == {"0/weight", "3/weight"} and set(quantizer.inputs._modules) == {"3"}
    assert quantizer.inputs._modules["3"].bits == 2


def test_the_axis_of_each_layer():
    """ "output" is 1 for a transposed convolution; a number is that of all."""
    for axis, sizes in (("output", (6, 5, 2)), (0, (6, 6, 2)), (1, (4, 5, 8)), (-1, (3, 3, 8))):
        quantizer = calibrate(layers(), None, 8, None, axis=axis)
        assert tuple(len(q.step) for q in quantizer.weights.children()) == sizes
    assert all(q.step.dim() == 0 for q in calibrate(layers(), None, 8, None, axis=None).weights.children())


@pytest.mark.parametrize("axis", ["output", None])
def test_experts_have_a_step_each(axis):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 4, 5) * torch.tensor([1.0, 10.0, 100.0])[:, None, None])

        def forward(self, x):
            return x @ self.up[0].T

    quantizer = calibrate(Experts(), None, 8, None, axis=axis)
    assert quantizer.weights._modules["up"].step.shape == (3,) and quantizer.errors()["up"] < 0.01


def test_groups():
    """A step for each group of a channel's numbers; closer than one for the channel."""
    model = layers()
    errors = {}
    for size in (None, 6, 3):
        quantizer = calibrate(model, None, 3, None, group_size=size, overrides={"3": {"group_size": None}})
        errors[size] = quantizer.errors()
        counts = [q.step.numel() for q in quantizer.weights.children()]
        assert counts == [72 // (size or 12), 90 // (size or 18), 2]
        quantizer.remove(bake=False)
    for name in ("0.weight", "2.weight"):
        assert errors[3][name] < 0.7 * errors[None][name]
    assert errors[3]["3.weight"] == errors[None]["3.weight"]


def test_include_exclude_and_replace():
    model = nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    quantizer = calibrate(model, [torch.arange(9)], include=["0"], exclude=["2"])
    assert set(quantizer.weights._modules) == {"0/weight", "1/weight"}
    with pytest.raises(ValueError, match=r"1.weight is already replaced by a Quantizer; call its remove\(\) first"):
        calibrate(model, [torch.arange(9)], exclude=["0", "2"])
    calibrate(model, [torch.arange(9)], 2, replace=True, include=["0"])
    assert all(len(row.unique()) <= 4 for row in model.eval()[0](torch.arange(20)))


def test_activations_alone():
    model, x = layers(), signals()
    full, hidden = model(x), model[0](x)
    quantizer = calibrate(model, [x], None, 8, method="minmax")
    assert not quantizer.weights._modules and set(quantizer.inputs._modules) == {"0", "2", "3"}
    assert_close(model[0](x), hidden, rtol=0, atol=0.05)
    assert not torch.equal(model[0](x), hidden)
    quantizer.remove()
    assert torch.equal(model(x), full)


def test_percentile():
    """Of the activations and of each channel of the weights; an outlier does not count."""
    model, x = nn.Linear(1000, 2, bias=False), torch.randn(64, 1000)
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-1, 1, 1000)).mul_(torch.tensor([[1.0], [3.0]]))
        model.weight[1, 0] = -90
    x[0, 0] = 1e3
    quantizer = calibrate(model, [x], method="percentile", percentile=99)
    assert_close(quantizer.weights._modules["weight"].step, torch.tensor([0.99, 2.97]) / 127, rtol=0.01, atol=0)
    step = quantizer.inputs._modules["/"].step
    assert_close(step, x.abs().flatten().kthvalue(63360).values / 127, rtol=0.1, atol=0)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, u, v, scale=1):
        return self.a(u) + self.b(v) * scale


def test_several_inputs():
    """(u, v), (u, v, target), by name, or by a function: the same ranges, bit for bit."""
    u, v = torch.randn(9, 4), 3 * torch.rand(9, 4)
    loaders = [[(u, v)], [(u, v, 1)], [{"u": u, "v": v, "labels": u}], [({"u": u, "v": v}, u)]]
    found = []
    for loader, forward in [*((loader, None) for loader in loaders), ([{"x": (v, u)}], lambda m, b: m(*b["x"][::-1]))]:
        torch.manual_seed(0)
        quantizer = calibrate(Two(), loader, forward=forward)
        assert quantizer.inputs._modules["a"].is_signed and not quantizer.inputs._modules["b"].is_signed
        found.append([q.step.item() for q in quantizer.inputs.children()])
    assert all(steps == found[0] for steps in found)


def test_at_most_so_many_batches():
    x = torch.rand(4, 4)
    quantizer = calibrate(nn.Linear(4, 4), iter([x, 2 * x, 9 * x]), method="minmax", batches=2)
    assert quantizer.inputs._modules["/"].step == 2 * x.max() / 255


def test_order_and_size_of_batches_do_not_matter():
    x = torch.cat([signals(), 30 * signals()])
    found = []
    for loader in (x.split(4), x.flip(0).split(7), [x]):
        quantizer = calibrate(layers(), loader, 4, 4, overrides={"2": "skip", "3": "skip"})
        found.append(quantizer.inputs._modules["0"].step.item())
    assert len(set(found)) == 1


class NothingReadBack(TorchDispatchMode):
    """An error where the host waits for a device, or where what is added by atomics is not an integer."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (aten._local_scalar_dense, aten.equal, aten.nonzero, aten.bincount), func
        if func.overloadpacket in (aten.scatter_add, aten.scatter_add_, aten.index_add, aten.index_add_):
            assert not args[-1].is_floating_point()
        return func(*args, **(kwargs or {}))


def test_batches_do_not_make_the_host_wait(monkeypatch):
    """Where codes are counted as on a GPU."""
    counted = clipping.counted
    monkeypatch.setattr(clipping, "counted", lambda codes, most, _: counted(codes, most, False))

    def forward(model, x):
        with NothingReadBack():
            model(x)

    calibrate(layers(), [signals(), 9 * signals()], forward=forward)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingReadBack():
        bool(torch.ones(()))


def test_a_module_that_is_called_twice():
    """Its range is of all calls."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.layer(-10 * self.layer(x.relu()))

    model, x = Twice().eval(), torch.randn(32, 4)
    full = model(x)
    quantizer = calibrate(model, [x])
    assert quantizer.inputs._modules["layer"].is_signed
    assert (model(x) - full).norm() < 0.03 * full.norm()


def test_inputs_of_zeros_alone():
    """Stay as they are, with a warning; so do those that no batch reaches. A later number does count."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.fill_(-100)
    with pytest.warns(
        UserWarning, match="the input of 2.weight stays as it is: the loader gave it zeros alone"
    ) as told:
        quantizer = calibrate(model, [torch.randn(8, 4)])
    assert set(quantizer.inputs._modules) == {"0"} and told[0].filename == __file__
    assert model.eval()(torch.randn(3, 4)).isfinite().all()
    quantizer.remove(bake=False)
    quantizer = calibrate(nn.Linear(2, 2), [torch.zeros(3, 2), torch.full((3, 2), 1e-20)], method="minmax")
    assert_close(quantizer.inputs._modules["/"].step, torch.tensor(1e-20) / 255, rtol=1e-6, atol=0)


def test_interrupts_leave_the_model_as_it_was():
    model, x = layers().train(), signals()

    def loader():
        yield x
        raise KeyboardInterrupt

    full = model(x)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, loader(), 2, 2)
    assert all(m.training for m in model.modules()) and torch.equal(model(x), full)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
