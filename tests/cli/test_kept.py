"""What the commands do not read is named, what a user may choose is read, and what was there stays."""

import json

import pytest
import torch
from cli.commandline import assert_refused, command, draw
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import r2kernels
from r2kernels.files.checkpoint import Checkpoint, CheckpointError
from r2kernels.files.loading import Palettized, load_palettized

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL, EMA = (
    {"fc.weight": draw(8, 6), "fc.bias": draw(8)},
    {"fc.weight": draw(8, 6, seed=1), "fc.bias": draw(8, seed=1)},
)
TRAINING = {
    "model": MODEL,
    "ema": {"module": EMA, "decay": 0.99},
    "optimizer": {"state": {0: {"exp_avg": draw(8, 6), "step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
    "history": [torch.ones(1), [torch.ones(2)]],
    "epoch": 3,
}
UNREAD = {"ema": 2, "optimizer": 2, "history": 2}


@pytest.fixture
def training(tmp_path):
    torch.save(TRAINING, tmp_path / "training.pt")
    return tmp_path / "training.pt"


def test_what_is_not_read_is_named(capsys, tmp_path, training):
    line = "not read: ema (2 tensors), optimizer (2 tensors), history (2 tensors); --key NAME reads another state dict"
    small = tmp_path / "a.safetensors"
    for args in (
        ["report", training],
        ["report", training, "--sizes"],
        ["compress", training, "-o", small, "--bits", 2],
    ):
        code, out, error = command(capsys, *args)
        assert (code, error) == (0, "") and line in out.splitlines()
        code, out, _ = command(capsys, *args, "--json", *["--force"] * (args[0] == "compress"))
        assert json.loads(out)["unread"] == UNREAD
    torch.save(MODEL, tmp_path / "plain.pt")
    assert "not read" not in command(capsys, "report", tmp_path / "plain.pt")[1]


def test_within_the_state_dict(tmp_path):
    torch.save({**MODEL, "shadow": EMA, "names": ["a"]}, tmp_path / "a.pt")
    assert Checkpoint(tmp_path / "a.pt").unread == {"shadow": 2}
    torch.save({"state_dict": {**MODEL, "shadow": EMA}}, tmp_path / "a.pt")
    assert Checkpoint(tmp_path / "a.pt").unread == {"state_dict.shadow": 2}


@pytest.mark.parametrize(
    ("key", "unread"),
    [
        ("model", UNREAD),
        ("ema", {"model": 2, "optimizer": 2, "history": 2}),
        ("ema.module", {"model": 2, "optimizer": 2, "history": 2}),
    ],
)
def test_a_key_chooses(tmp_path, training, key, unread):
    checkpoint = Checkpoint(training, key)
    expected = MODEL if key == "model" else EMA
    assert all(torch.equal(tensor, expected[entry.name]) for entry, tensor in checkpoint.read())
    assert len(checkpoint.entries) == 2 and checkpoint.unread == unread


def test_keys_with_dots_in_them(tmp_path):
    torch.save({"a": {"b": MODEL}, "a.b": EMA}, tmp_path / "a.pt")
    assert torch.equal(Checkpoint(tmp_path / "a.pt", "a.b").tensor("fc.bias"), EMA["fc.bias"])
    torch.save({"net.ema": {"b.c": MODEL}}, tmp_path / "a.pt")
    assert torch.equal(Checkpoint(tmp_path / "a.pt", "net.ema.b.c").tensor("fc.bias"), MODEL["fc.bias"])


def test_compress_with_a_key(capsys, tmp_path, training):
    small = tmp_path / "a.safetensors"
    assert command(capsys, "compress", training, "-o", small, "--bits", 2, "--key", "ema")[0] == 0
    c = r2kernels.kmeans(EMA["fc.weight"], 4)
    w = c[r2kernels.assign(EMA["fc.weight"], c).long()].reshape(8, 6)
    assert torch.equal(load_palettized(small)["fc.weight"], w)


def test_keys_that_are_not_there(capsys, tmp_path, training):
    wrong = command(capsys, "report", training, "--key", "emma")
    assert_refused(wrong, "has no state dict 'emma'; allowed are model, ema, optimizer")
    with pytest.raises(CheckpointError, match=r"has no state dict 'ema\.weights'; allowed are ema\.module"):
        Checkpoint(training, "ema.weights")
    with pytest.raises(CheckpointError, match="has no state dict 'epoch'"):
        Checkpoint(training, "epoch")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        Checkpoint(training, "optimizer.state")
    save_file(MODEL, tmp_path / "b.safetensors")
    small = tmp_path / "a.safetensors"
    assert command(capsys, "compress", training, "-o", small, "--bits", 2)[0] == 0
    for path in (tmp_path / "b.safetensors", small):
        assert_refused(
            command(capsys, "report", path, "--key", "ema"), "has no entry 'ema'; only files of torch.save hold"
        )


def test_metadata_of_the_user_stays(capsys, tmp_path):
    """Through compress, through compress of what was compressed, and expand; a .pt file has no place for it."""
    mine = {"license": "MIT", "version": 'say "1"'}
    save_file(MODEL, tmp_path / "a.safetensors", metadata={"format": "pt", **mine})
    before = tmp_path / "a.safetensors"
    for name, bits in (("b", 4), ("c", 2)):
        small = tmp_path / f"{name}.safetensors"
        assert command(capsys, "compress", before, "-o", small, "--bits", bits)[0] == 0
        with Palettized(small) as file:
            assert file.metadata == mine
        before = small
    dense = tmp_path / "d.safetensors"
    assert command(capsys, "expand", before, "-o", dense)[0] == 0
    with safe_open(dense, "pt") as file:
        assert file.metadata() == {"format": "pt", **mine}
    assert load_file(dense).keys() == MODEL.keys()
    save_file(MODEL, tmp_path / "e.safetensors", metadata={"format": "pt"})
    assert Checkpoint(tmp_path / "e.safetensors").metadata == {}  # which every file has that torch wrote
    code, _, error = command(capsys, "expand", before, "-o", tmp_path / "d.pt")
    assert code == 0 and error == "r2kernels: warning: metadata is not in a torch file: license, version\n"


def test_preserve_zeros(capsys, tmp_path):
    w = draw(8, 6)
    w[w.abs() < 0.6] = 0
    torch.save({"w": w, "v": draw(8, 6, seed=2)}, tmp_path / "a.pt")
    options = "--per-channel-scale", "--lut-dtype", "int8", "--json"
    for bits in (1, 2):
        small = tmp_path / f"{bits}.safetensors"
        args = "compress", tmp_path / "a.pt", "-o", small, "--bits", bits, "--preserve-zeros", *options
        code, out, error = command(capsys, *args)
        assert (code, error) == (0, "") and json.loads(out)["preserve_zeros"] is True
        found = load_palettized(small)
        assert (found["w"][w == 0] == 0).all() and (found["w"] != 0).any()
    args = "compress", tmp_path / "a.pt", "-o", tmp_path / "d.safetensors", "--bits", 2, "--cluster-dim", 2
    zeros = int((w == 0).sum())
    rows = 2 * int((w.t().reshape(-1, 2) == 0).all(1).sum())
    code, _, error = command(capsys, *args, "--preserve-zeros")
    lost = f"w: {zeros - rows} of its {zeros} zeros do not stay: they share a row of 2 with other weights"
    assert code == 0 and error == f"r2kernels: warning: {lost}\n"
    pairs = load_palettized(tmp_path / "d.safetensors")["w"].t().reshape(-1, 2)
    assert (pairs[(w.t().reshape(-1, 2) == 0).all(1)] == 0).all()


@pytest.mark.parametrize(
    ("numbers", "dtype", "message"),
    [
        ([1e5, 2e5, 3e5, 4e5], "fp16", "leaves 1 of 4 different values and cuts off 4 numbers above 65504"),
        ([1e-9, 2e-9, 3e-9, 4e-9], "fp16", "leaves 1 of 4 different values"),
        ([0.01, 0.02, 0.03, 1e3], "int8", "leaves 2 of 4 different values"),
    ],
)
def test_values_that_a_table_loses(capsys, tmp_path, numbers, dtype, message):
    torch.save({"w": torch.tensor(numbers).repeat(4, 1)}, tmp_path / "a.pt")
    args = "compress", tmp_path / "a.pt", "-o", tmp_path / "a.safetensors", "--bits", 2, "--lut-dtype", dtype
    code, _, error = command(capsys, *args)
    assert code == 0 and error == f"r2kernels: warning: w: lut_dtype={dtype!r} {message}\n"
