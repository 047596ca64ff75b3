"""Checkpoints: every kind of file that is read, and every kind that is refused in one line."""

import collections
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from r2kernels.files.checkpoint import Checkpoint, CheckpointError

STATE = {
    "conv.weight": torch.arange(24.0).reshape(2, 3, 4),
    "conv.bias": torch.ones(2),
    "half": torch.ones(3, 2, dtype=torch.float16),
    "ids": torch.arange(6).reshape(2, 3),
    "scalar": torch.tensor(1.5),
}
LEGACY = {"_use_new_zipfile_serialization": False}


class Command:
    """What a hostile file holds: unpickled, it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def torch_file(path, data=None, **options):
    torch.save(STATE if data is None else data, path, **options)
    return path


def safetensors_file(path):
    save_file(STATE, path)
    return path


def contents(checkpoint):
    return {entry.name: tensor for entry, tensor in checkpoint.read()}


def assert_same(found, expected=STATE):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.safetensors", safetensors_file),
        ("A.SAFETENSORS", safetensors_file),
        ("a.pt", torch_file),
        ("a.pth", torch_file),
        ("legacy.pt", lambda path: torch_file(path, **LEGACY)),
    ],
)
def test_reads_every_tensor(tmp_path, name, write):
    checkpoint = Checkpoint(write(tmp_path / name))
    for entry in checkpoint.entries:
        tensor = STATE[entry.name]
        assert (entry.shape, entry.dtype, entry.numel) == (tensor.shape, tensor.dtype, tensor.numel())
    assert_same(contents(checkpoint))


@pytest.mark.parametrize(
    "nest",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"lr": 1.0}},
        lambda s: {"model_state_dict": s},
        lambda s: {"module": s},
        lambda s: {"model": {"state_dict": s}, "rng": torch.zeros(5)},
        collections.OrderedDict,
    ],
)
def test_finds_a_nested_state_dict(tmp_path, nest):
    assert_same(contents(Checkpoint(torch_file(tmp_path / "a.pt", nest(STATE)))))


def test_reads_parameters_without_grad(tmp_path):
    ((_, tensor),) = Checkpoint(torch_file(tmp_path / "a.pt", {"w": nn.Parameter(torch.ones(2, 2))})).read()
    assert not tensor.requires_grad


def test_a_dictionary_that_holds_itself_ends(tmp_path):
    data = {}
    data["model"] = data
    with pytest.raises(CheckpointError, match="holds no tensors"):
        Checkpoint(torch_file(tmp_path / "a.pt", data))


def test_safetensors_are_in_natural_order(tmp_path):
    save_file({f"layers.{i}.w": torch.ones(1) for i in (10, 2, 1)}, tmp_path / "a.safetensors")
    assert [entry.name for entry in Checkpoint(tmp_path / "a.safetensors").entries] == [
        "layers.1.w",
        "layers.2.w",
        "layers.10.w",
    ]


def test_weights_are_floating_point_with_two_dimensions(tmp_path):
    state = {**STATE, "empty": torch.empty(0, 3), "eight": torch.ones(2, 2).to(torch.float8_e4m3fn)}
    save_file(state, tmp_path / "a.safetensors")
    assert [entry.name for entry in Checkpoint(tmp_path / "a.safetensors").weights] == ["conv.weight", "half"]


def test_no_weights(tmp_path):
    checkpoint = Checkpoint(torch_file(tmp_path / "a.pt", {"bias": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=r"no weight .* among its 1 tensors"):
        _ = checkpoint.weights


def repacked(path, compression=zipfile.ZIP_DEFLATED, only=None):
    """The same archive with all its members compressed, or one."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data, compression if only in (None, name) else zipfile.ZIP_STORED)
    return path


@pytest.mark.parametrize("only", [None, "archive/data/0", "archive/data.pkl"])
def test_compressed_archives(tmp_path, only):
    """Mapped into memory, the compressed bytes and those after them would be read as numbers."""
    state = {"w": torch.arange(1000.0).reshape(10, 100), **STATE, "z": torch.ones(20, 20)}
    path = repacked(torch_file(tmp_path / "archive.pt", state), only=only)
    assert_same(contents(Checkpoint(path)), state)
    with zipfile.ZipFile(path) as archive:
        assert {m.compress_type for m in archive.infolist()} >= {zipfile.ZIP_DEFLATED}


def test_archives_of_other_compressions(tmp_path):
    path = repacked(torch_file(tmp_path / "archive.pt"), zipfile.ZIP_LZMA)
    with pytest.raises(CheckpointError, match=r"is truncated, corrupt or not written by torch.save"):
        Checkpoint(path)


def test_tensors_larger_than_their_storage(tmp_path):
    """Up to a bound, beyond which a few bytes would fill the memory; names of one tensor do not count."""
    small = torch.arange(3.0).expand(5, 3)
    assert_same(contents(Checkpoint(torch_file(tmp_path / "a.pt", {"w": small}))), {"w": small})
    held = torch.ones(2**19)  # 2 MiB, of which 128 MiB may be made
    fits = {str(i): held[:1].expand(2**18, 2, i) for i in range(1, 5)} | {"w": held}
    fits |= {f"{i} again": w for i, w in fits.items()}
    assert [entry.name for entry in Checkpoint(torch_file(tmp_path / "a.pt", fits)).entries] == [*fits]
    for state in (
        {"w": torch.zeros(1).expand(200_000, 200_000), "v": torch.ones(3, 3)},
        {"w": torch.zeros(1).expand(2**24, 2)},
        {str(i): torch.ones(1).expand(2**20, i) for i in range(1, 9)},
        {"v": held, "w": held.expand(65, -1)},
        {str(i): held[i:] for i in range(70)},
    ):
        with pytest.raises(CheckpointError, match=r"would take [\d,]+ bytes \(the largest, .* but share [\d,]+; allow"):
            Checkpoint(torch_file(tmp_path / "a.pt", state))


def cut(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def raw(path, data=b"hello world " * 40):
    path.write_bytes(data)
    return path


def directory(path):
    path.mkdir()
    return path


REFUSED = {
    "missing": (lambda d: d / "a.pt", "No such file"),
    "missing safetensors": (lambda d: d / "a.safetensors", "No such file"),
    "directory": (lambda d: directory(d / "a.pt"), "is a directory"),
    "suffix": (lambda d: raw(d / "a.gguf"), r"unknown kind of checkpoint '.gguf'; allowed are .safetensors, .pt, .pth"),
    "no suffix": (lambda d: raw(d / "a"), "unknown kind of checkpoint ''"),
    "empty": (lambda d: raw(d / "a.pt", b""), "is empty"),
    "empty safetensors": (lambda d: raw(d / "a.safetensors", b""), "is empty"),
    "corrupt": (lambda d: raw(d / "a.pt"), "corrupt"),
    "corrupt safetensors": (lambda d: raw(d / "a.safetensors"), "corrupt"),
    "truncated": (lambda d: cut(torch_file(d / "a.pt"), 0.5), "truncated"),
    "truncated legacy": (lambda d: cut(torch_file(d / "a.pt", **LEGACY), 0.9), "truncated"),
    "truncated safetensors": (lambda d: cut(safetensors_file(d / "a.safetensors"), 0.9), "truncated"),
    "truncated header": (lambda d: cut(safetensors_file(d / "a.safetensors"), 0.1), "truncated"),
    "other pickle": (lambda d: raw(d / "a.pt", pickle.dumps({"a": 1})), "not written by torch.save"),
    "other format": (lambda d: torch_file(d / "a.safetensors"), "not a safetensors file"),
    "whole model": (
        lambda d: torch_file(d / "a.pt", nn.Linear(2, 2)),
        r"pickled object \(torch.nn.modules.linear.Linear\).*state_dict",
    ),
    "code": (
        lambda d: torch_file(d / "a.pt", {"w": torch.ones(2, 2), "x": Command(d / "ran")}),
        "refused because loading it can run code",
    ),
    "legacy code": (
        lambda d: torch_file(d / "a.pt", {"x": Command(d / "ran")}, **LEGACY),
        "refused because loading it can run code",
    ),
    "a list": (lambda d: torch_file(d / "a.pt", [torch.ones(2, 2)]), "holds a list"),
    "a tensor": (lambda d: torch_file(d / "a.pt", torch.ones(2, 2)), "holds a Tensor"),
    "no tensors": (lambda d: torch_file(d / "a.pt", {"epoch": 3}), "holds no tensors"),
    "sparse": (lambda d: torch_file(d / "a.pt", {"w": torch.eye(3).to_sparse()}), "w is a Tensor .*sparse"),
    "no data": (lambda d: torch_file(d / "a.pt", {"w": torch.empty(2, 2, device="meta")}), "w is a Tensor .*meta"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refuses(tmp_path, kind):
    write, message = REFUSED[kind]
    path = write(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_the_hostile_file_is_hostile(tmp_path):
    torch.load(torch_file(tmp_path / "a.pt", Command(tmp_path / "ran")), weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        Checkpoint(tmp_path / "a.pt")
