"""Quantizer: its options layer by layer, what they may not be, its parameter groups, and what it saves."""

import warnings

import pytest
import torch
from nn.attached import images, net, tokens
from nn.quantized import METHODS, assert_equal, plain
from torch import nn

import r2kernels as r2
from r2kernels import Quantizer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_param_groups():
    for method, count in (("lsq", 4), ("ewgs", 10), ("pact", 4)):
        quantizer = Quantizer(plain(), method, 4, 4)
        groups = quantizer.param_groups(lr=0.5)
        assert groups[0]["lr"] == 0.5 and all(g["weight_decay"] == 0 for g in groups)
        assert sum(len(g["params"]) for g in groups) == len(list(quantizer.parameters())) == count
        assert quantizer.param_groups(weight_decay=0.3)[0]["weight_decay"] == 0.3
    bounds = [p for name, p in Quantizer(plain(), "ewgs", 4, 4).named_parameters() if name[-5:] in ("lower", "upper")]
    for options, lr in (({}, 1e-4), ({"lr": 0.5}, 0.005), ({"lr": 0.5, "bounds_lr": 0.1}, 0.1)):
        group = Quantizer(plain(), "ewgs", 4, 4).param_groups(**options)[1]
        assert group["lr"] == lr and len(group["params"]) == len(bounds) == 8


def test_overrides():
    model = plain()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantizer = Quantizer(
            model,
            "lsq",
            4,
            4,
            overrides={"0": {"weight_bits": 8, "activation_bits": None, "axis": 0}, "4.*": {"method": "pact"}},
        )
    assert [(layer.options.method, layer.options.weight_bits) for layer in quantizer.layers] == [
        ("lsq", 8),
        ("pact", 4),
    ]
    assert list(quantizer.inputs._modules) == ["4"] and quantizer.weights._modules["0/weight"].step.shape == (8,)
    model(images()[0]).sum().backward()
    assert [layer.name for layer in Quantizer(plain(), "lsq", 4, overrides={"0": "skip"}).layers] == ["4.weight"]


BAD = [
    ({"method": "sgd"}, ValueError, r"method of the model must be one of \('lsq', 'ewgs', 'pact'\), got 'sgd'"),
    ({"weight_bits": 0}, ValueError, r"weight_bits of the model must be an int in 1..8, got 0"),
    ({"weight_bits": 9}, ValueError, "got 9"),
    ({"weight_bits": None}, ValueError, "weight_bits and activation_bits of the model are both None"),
    ({"weight_bits": 4.0}, TypeError, "got 4.0"),
    ({"activation_bits": 0}, ValueError, "activation_bits of the model must be an int in 1..8, got 0"),
    ({"activation_bits": True}, TypeError, "activation_bits of the model must be an int in 1..8, got True"),
    ({"axis": 2}, ValueError, r"axis=2 does not exist: 4.weight has shape \(10, 128\)"),
    ({"axis": "0"}, TypeError, "axis of the model must be an int, \"output\" or None, got '0'"),
    ({"method": "ewgs", "axis": 0}, ValueError, "axis of the model must be None for method 'ewgs'.*got 0"),
    ({"overrides": ["0"]}, TypeError, "overrides must be a dict"),
    ({"overrides": {"0": 3}}, TypeError, r"overrides\['0'\] must be a dict of options or \"skip\", got 3"),
    ({"overrides": {"0": {"bits": 3}}}, ValueError, r"overrides\['0'\] has no option 'bits'; allowed are"),
    ({"overrides": {"0": {"weight_bits": 0}}}, ValueError, "weight_bits of 0.weight must be an int in 1..8, got 0"),
    (
        {"overrides": {"0": {"delta": -1.0}}},
        ValueError,
        'delta of 0.weight must be a finite number >= 0 or "hessian", got -1',
    ),
    ({"overrides": {"0": {"plus": 1}}}, TypeError, "plus of 0.weight must be True or False, got 1"),
    ({"overrides": {"nothing": "skip"}}, ValueError, r"overrides\['nothing'\] matches no weight"),
    ({"overrides": {"*": "skip"}}, ValueError, "Sequential has no weight left after exclude=None and overrides="),
    ({"model": nn.ReLU()}, ValueError, "ReLU has no conv, linear or attention weight; use include="),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[str(o) for o, _, _ in BAD])
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        Quantizer(**{"model": plain(), "method": "lsq", "weight_bits": 4, **options})
    with pytest.raises(ValueError, match="step must be a finite number > 0, got -1"):
        r2.lsq(torch.ones(3), -1.0, 4)


def test_errors_and_sizes():
    model = plain()
    quantizer = Quantizer(model, "lsq", 4, axis=0)
    quantizer.initialize(images()[0])
    size = quantizer.sizes()["0.weight"]
    assert (size.dense, size.codes, size.luts) == (8 * 18 * 4, 8 * 18 // 2, 8 * 6) and size.coded <= size.packed
    w, hat = model[0].weight.detach(), quantizer._hard(quantizer.layers)[0]
    assert quantizer.errors()["0.weight"] == pytest.approx(((w - hat).norm() / w.norm()).item(), rel=1e-5)
    quantizer.remove(bake=False)
    assert torch.equal(model[0].weight, w)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_is_baked(tmp_path, method, dtype):
    for bits in (1, 3, 8):
        model = plain().to(dtype)
        quantizer = Quantizer(model, method, bits, axis=0 if method == "lsq" else None)
        model(images()[0].to(dtype))
        r2.save_quantized(quantizer, tmp_path / "f", entropy="huffman" if bits == 3 else None)
        found = r2.load_palettized(tmp_path / "f")
        quantizer.remove()
        assert_equal(found, dict(model.state_dict()))


def test_a_tied_model_is_saved_once(tmp_path):
    model = net()
    quantizer = Quantizer(model, "lsq", 4)
    model(tokens())
    r2.save_quantized(quantizer, tmp_path / "f")
    found = r2.load_palettized(tmp_path / "f")
    assert found["embed.weight"] is found["head.weight"]
    quantizer.remove()
    assert_equal(found, dict(model.state_dict()))
