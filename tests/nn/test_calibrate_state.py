"""A calibrated quantizer from its state, and the same ranges on all ranks."""

import io

import pytest
import torch
from nn.attached import net, tokens
from nn.calibrated import calibrate_rank, calibrated
from nn.quantized import assert_equal
from torch import nn

from r2kernels import Quantizer, calibrate

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Two modules with one weight, a transposed convolution, and a layer that is left out."""

    def __init__(self, channels=3):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.up, self.out = nn.ConvTranspose1d(4, channels, 3), nn.Linear(7, 2)

    def forward(self, x):
        x = self.second(self.first(x).relu())
        return self.out(self.up(x[..., None].expand(-1, -1, 5)))


def made(**options):
    torch.manual_seed(0)
    model = Net()
    return model, calibrate(model, [x()], overrides={"out": "skip"}, **options) if options else None


def x():
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [
        {"weight_bits": 8},
        {"symmetric": False},
        {"weight_bits": 2, "activation_bits": 3, "axis": None, "symmetric": False, "method": "minmax"},
        {"axis": -1, "method": "percentile"},
        {"activation_bits": None},
        {"group_size": 2},
        {"group_size": 2, "symmetric": False, "weight_bits": 3},
        {"weight_bits": None},
    ],
    ids=str,
)
def test_a_quantizer_from_its_state(options):
    """In a fresh model without a loader: the same bits, of outputs and of the state."""
    model, quantizer = made(**options)
    file = io.BytesIO()
    torch.save(quantizer.state_dict(), file)
    file.seek(0)
    other, _ = made()
    again = Quantizer.from_state(other, torch.load(file))
    assert torch.equal(other.eval()(x()), model.eval()(x()))
    assert_equal(dict(again.state_dict()), dict(quantizer.state_dict()))
    assert not torch.equal(other(x()), made()[0](x()))
    again.remove(bake=False)
    assert torch.equal(other(x()), made()[0](x()))


def test_a_weight_that_belongs_to_an_embedding_too():
    """Beside attention, whose weights have no inputs of their own."""
    model = net().eval()
    quantizer = calibrate(model, [tokens()], 4, 4)
    out = model(tokens())
    again = Quantizer.from_state(other := net().eval(), quantizer.state_dict())
    assert torch.equal(other(tokens()), out)
    assert [layer.name for layer in again.layers] == [layer.name for layer in quantizer.layers]


def test_a_model_that_is_one_layer():
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    quantizer = calibrate(model, [x()], 3, 3)
    out = model.eval()(x())
    with pytest.raises(ValueError, match="weight is already replaced by a Quantizer"):
        Quantizer.from_state(model, quantizer.state_dict())
    Quantizer.from_state(model, quantizer.state_dict(), replace=True)
    assert torch.equal(model(x()), out)


def changed(**entries):
    _, quantizer = made(symmetric=False)
    state = dict(quantizer.state_dict())
    for name, value in entries.items():
        state[name.replace("__", ".")] = value
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("model", "state", "error", "message"),
    [
        (Net(2), changed, ValueError, r"of up.weight in the state has shape \(3,\); this model's needs \(2,\)"),
        (nn.Sequential(nn.Linear(4, 4)), changed, ValueError, "the state has weights of first.weight, which"),
        (Net(), lambda: changed(**{"weights.first/weight.step": torch.ones(3)}), ValueError, "step of first.weight in"),
        (Net(), lambda: changed(**{"weights.first/weight.zero": 3}), ValueError, "zero of first.weight in the state"),
        (Net(), lambda: changed(**{"weights.first/weight.form": None}), ValueError, "first.weight lacks 'form', so it"),
        (Net(), lambda: changed(**{"weights.up/weight.alpha": 1}), ValueError, "the state of up.weight has 'alpha'"),
        (
            Net(),
            lambda: changed(**{"weights.up/weight.form": torch.tensor([9, 0, 0])}),
            ValueError,
            "weight_bits of up.weight must be an int in 1..8, got 9",
        ),
        (
            Net(),
            lambda: changed(**{"weights.up/weight.form": torch.tensor([4, 3, 0])}),
            ValueError,
            r"the state of up.weight has axis 3, but the weight has shape \(4, 3, 3\)",
        ),
        (
            Net(),
            lambda: changed(**{"weights.up/weight.form": torch.tensor([4, 1, 5])}),
            ValueError,
            r"the state of up.weight has group_size 5, but the weight has shape \(4, 3, 3\)",
        ),
        (Net(), lambda: changed(**{"inputs.up.step": torch.ones(2)}), ValueError, "step of the input of up in the"),
        (Net(), lambda: changed(**{"inputs.up.signed": None}), ValueError, "the state of up lacks 'signed'"),
        (Net(), dict, ValueError, "state holds no weights and no inputs"),
        (Net(), lambda: [1], TypeError, "state must be the state_dict of a calibrated Quantizer, got list"),
        (Net(), lambda: Quantizer(Net(), "lsq", 4).state_dict(), ValueError, "the state of first.weight lacks 'form'"),
    ],
    ids=range(14),
)
def test_states_that_do_not_fit(model, state, error, message):
    with pytest.raises(error, match=message):
        Quantizer.from_state(model, state())
    assert not model._forward_pre_hooks


def test_a_state_of_other_bits_is_not_loaded():
    """`load_state_dict` between calibrated quantizers of other bits or axes."""
    _, quantizer = made(weight_bits=4)
    for options in ({"weight_bits": 8}, {"weight_bits": 4, "activation_bits": 4}):
        with pytest.raises(RuntimeError, match=r"form \(bits, axis, group_size\) is \[.*\] in the state and \["):
            made(**options)[1].load_state_dict(quantizer.state_dict())
    same = made(weight_bits=4, method="minmax")[1]
    same.load_state_dict(quantizer.state_dict())
    assert_equal(dict(same.state_dict()), dict(quantizer.state_dict()))


def test_ranks_have_the_ranges_of_all_batches(tmp_path):
    """Two processes with different batches, of which one reaches a layer that the other does not: as one process with
    all batches, bit for bit; a batch that is not finite raises on both."""
    torch.multiprocessing.spawn(calibrate_rank, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = calibrated([0, 1, 2])
    for state in (first["state"], second["state"]):
        assert_equal(state, alone)
    assert "the input of a.weight has a NaN" in first["error"] and first["error"] == second["error"]
    for norms in (first["norm"], second["norm"]):
        torch.testing.assert_close(norms, torch.tensor([4.0, 4.0]))
