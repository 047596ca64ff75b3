"""The ranges of activations in files of quantized models."""

import json

import pytest
import torch
from files.stored import parsed, put, refused, sealed
from nn.attached import images
from torch import nn

import r2kernels
from r2kernels import Quantizer, calibrate, load_palettized, load_ranges, save_palettized, save_quantized
from r2kernels.files.integers import IntegerInput

pytestmark = pytest.mark.usefixtures("one_thread")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))


def saved(path, method, *bits):
    model = network()
    quantizer = Quantizer(model, method, *bits)
    quantizer.initialize(images()[0])
    save_quantized(quantizer, path)
    return quantizer


@pytest.mark.parametrize("method", ["lsq", "ewgs", "pact"])
def test_ranges_come_back_bit_for_bit(method, tmp_path):
    quantizer = saved(tmp_path / "f", method, 4, 3)
    found = load_ranges(tmp_path / "f")
    assert found == quantizer.export().inputs and found.keys() == {"0", "3"}
    assert all(type(levels) is IntegerInput for levels in found.values())
    network().load_state_dict(load_palettized(tmp_path / "f"))


def test_asymmetric_ranges(tmp_path):
    quantizer = calibrate(network(), [images()[0]], 8, 8, symmetric=False)
    save_quantized(quantizer, tmp_path / "f")
    found = load_ranges(tmp_path / "f")
    assert found == quantizer.export().inputs and 0 < found["0"].zero_point < 255


def test_files_without_ranges(tmp_path):
    """Weights alone, and palettes: the format's first version, which older readers know."""
    saved(tmp_path / "q", "lsq", 4)
    save_palettized(r2kernels.Palettizer(network(), 2), tmp_path / "p")
    for name in "qp":
        assert load_ranges(tmp_path / name) == {}
        assert parsed((tmp_path / name).read_bytes())[0]["__metadata__"]["version"] == "1"


def test_a_range_that_cannot_be_stored(tmp_path):
    model = network()
    quantizer = Quantizer(model, "lsq", 4, 4)
    quantizer.initialize(images()[0])
    with torch.no_grad():
        quantizer.inputs._modules["0"].step.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"^the input of 0 has scale nan, which cannot be stored$"):
        save_quantized(quantizer, tmp_path / "f")
    assert not (tmp_path / "f").exists()


WRONG = {"bits": 9, "scale": (0.0).hex(), "zero_point": 16, "signed": 1, "offset": "inf", "more": 0}


@pytest.mark.parametrize("field", WRONG)
def test_wrong_ranges(field, tmp_path):
    saved(tmp_path / "f", "lsq", 4, 4)
    header, data = parsed((tmp_path / "f").read_bytes())
    inputs = json.loads(header["__metadata__"]["inputs"])
    inputs["3"][field] = WRONG[field]
    put("__metadata__", "inputs", json.dumps(inputs))(header)
    refused(tmp_path / "f", sealed(header, data), f"the input of 3 is not described as it must be .it has .*{field}")


@pytest.mark.parametrize("inputs", ["[]", '{"3": 1}', '{"3": {"bits": 4}}', '{"3"'])
def test_ranges_that_are_none(inputs, tmp_path):
    saved(tmp_path / "f", "lsq", 4, 4)
    header, data = parsed((tmp_path / "f").read_bytes())
    put("__metadata__", "inputs", inputs)(header)
    refused(tmp_path / "f", sealed(header, data), "its list of inputs is corrupt|the input of 3 is not described")
