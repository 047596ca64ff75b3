"""Folders and shards on the command line, in and out, and tensors of every dtype through all commands."""

import json
import math

import pytest
import torch
from cli.commandline import STATE, WEIGHTS, assert_refused, assert_same, command, draw
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from r2kernels.cli import shards
from r2kernels.files.container import as_bytes
from r2kernels.files.format import Planned
from r2kernels.files.loading import load_palettized, opened

pytestmark = pytest.mark.usefixtures("one_thread")


BYTES = sum(tensor.nbytes for tensor in STATE.values())


def folder(path, state=STATE, kind="safetensors", metadata=None):
    """A folder with `state` in three shards."""
    path.mkdir()
    model, weight_map = {"safetensors": "model", "bin": "pytorch_model"}[kind], {}
    for i in range(3):
        part, name = dict(list(state.items())[i::3]), f"{model}-{i + 1:05}-of-00003.{kind}"
        torch.save(part, path / name) if kind == "bin" else save_file(part, path / name, metadata=metadata)
        weight_map |= dict.fromkeys(part, name)
    (path / f"{model}.{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("line", [["compress", "--bits", 2], ["quantize", "--bits", 3]])
def test_shards_are_coded_as_one_file_is(capsys, tmp_path, kind, line):
    save_file(STATE, tmp_path / "whole.safetensors", metadata={"license": "MIT"} if kind == "safetensors" else None)
    in_shards = folder(tmp_path / "model", kind=kind, metadata={"license": "MIT"})
    outs = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for source, out in zip((tmp_path / "whole.safetensors", in_shards), outs, strict=True):
        assert command(capsys, *line, source, "-o", out)[::2] == (0, "")
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_report_of_a_folder(capsys, tmp_path):
    path = folder(tmp_path / "model")
    code, out, error = command(capsys, "report", path, "--json", "--plot", tmp_path / "a.png")
    assert (code, error) == (0, "")
    assert {row["name"] for row in json.loads(out)["weights"]} == {*WEIGHTS, "tiny.weight"}
    assert json.loads(out)["checkpoint"] == str(path / "model.safetensors.index.json")
    assert command(capsys, "report", path, "--sizes")[::2] == (0, "")
    torch.save(STATE, path / "pytorch_model.bin")
    error = command(capsys, "report", path)[2]
    assert error == f"r2kernels: warning: {path}: model.safetensors.index.json is read, not pytorch_model.bin\n"
    (path / "model-00002-of-00003.safetensors").unlink()
    assert_refused(command(capsys, "report", path / "model.safetensors.index.json"), "missing are model-00002-of-0000")


@pytest.fixture
def small(capsys, tmp_path):
    save_file(STATE, tmp_path / "model.safetensors", metadata={"license": "MIT"})
    path = tmp_path / "small.safetensors"
    assert command(capsys, "compress", tmp_path / "model.safetensors", "-o", path, "--bits", 2)[0] == 0
    return path


def test_expand_to_shards(capsys, tmp_path, small):
    code, out, error = command(capsys, "expand", small, "-o", tmp_path / "back", "--shard-size", "1KB", "--json")
    assert (code, error) == (0, "")
    found, expected = json.loads(out), load_palettized(small)
    files = found["files"]
    assert found == {"file": str(small), "out": str(tmp_path / "back"), "tensors": 10, "bytes": BYTES, "files": files}
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == sorted(files)
    assert files == [*(f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)), "model.safetensors.index.json"]
    index = json.loads((tmp_path / "back" / files[-1]).read_text())
    assert index["metadata"] == {"total_size": BYTES} and index["weight_map"].keys() == expected.keys()
    read = {}
    for name in files[:-1]:
        part = load_file(tmp_path / "back" / name)
        assert sum(tensor.nbytes for tensor in part.values()) <= 1000 or len(part) == 1
        assert {index["weight_map"][tensor] for tensor in part} == {name}
        with safe_open(tmp_path / "back" / name, "pt") as file:
            assert file.metadata() == {"format": "pt", "license": "MIT"}
        read |= part
    assert_same(read, expected)
    assert_same({entry.name: tensor for entry, tensor in opened(tmp_path / "back").read()}, expected)


def test_split():
    planned = [Planned(str(n), (n,), torch.uint8) for n in (2, 2, 1, 5, 0, 4)]
    assert [[p.shape[0] for p in shard] for shard in shards.split(planned, 4, lambda p: p.nbytes)] == [
        [2, 2],
        [1],
        [5],
        [0, 4],
    ]


def test_a_folder_of_one_file(capsys, tmp_path, small):
    code, out, error = command(capsys, "expand", small, "-o", f"{tmp_path}/back/")
    assert (code, error) == (0, "")
    assert out == f"{tmp_path}/back: 10 tensors in 1 file, 3.348 kB\n"
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["model.safetensors"]
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), load_palettized(small))


def test_shards_appear_as_a_whole(capsys, tmp_path, small, monkeypatch):
    line = "expand", small, "-o", f"{tmp_path}/back/"
    before = sorted(tmp_path.iterdir())

    for failure, expected in ((OSError(28, "No space left on device"), 2), (KeyboardInterrupt(), 130)):

        def fails(*args, failure=failure):
            raise failure

        with monkeypatch.context() as patch:
            patch.setattr(shards, "write_dense", fails)
            code, _, error = command(capsys, *line)
        assert code == expected and error.count("\n") == 1
        assert sorted(tmp_path.iterdir()) == before
    data = bytearray(small.read_bytes())
    data[-1] ^= 1
    (tmp_path / "changed.safetensors").write_bytes(data)
    wrong = command(capsys, "expand", tmp_path / "changed.safetensors", "-o", f"{tmp_path}/back/")
    assert_refused(wrong, "is corrupt (its checksum differs)")
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".*"))


def test_folders_that_are_not_written(capsys, tmp_path, small):
    (tmp_path / "there").mkdir()
    for out, options, message in [
        (f"{tmp_path}/there/", [], "there: exists already; shards are written to a new folder"),
        (f"{tmp_path}/there/", ["--force"], "there: exists already"),
        ("./", [], "exists already"),
        (small, ["--shard-size", "1GB"], "--shard-size writes a folder, not a .safetensors file"),
        (f"{tmp_path}/no/new/", [], "there is no directory"),
        (tmp_path / "new", ["--shard-size", "1"], "must be a size such as 5GB, 500MB or 2GiB, got 1"),
        (tmp_path / "new", ["--shard-size", "0GB"], "must be a size such as"),
        (tmp_path / "new", [], "unknown kind of checkpoint ''; allowed are .safetensors, .pt, .pth, FOLDER/"),
    ]:
        assert_refused(command(capsys, "expand", small, "-o", out, *options), message)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2MiB", 2**21), ("3B", 3), ("1TiB", 2**40)]
)
def test_sizes_of_shards(capsys, tmp_path, small, monkeypatch, text, size):
    given = []
    monkeypatch.setattr(shards, "expand", lambda file, path, most, **_: given.append(most) or (0, []))
    assert command(capsys, "expand", small, "-o", tmp_path / "new", "--shard-size", text)[0] == 0
    assert given == [size]


def of_every_dtype():
    names = "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu bool complex64 bfloat16 float64"
    names = [*names.split(), *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64))]
    state = {"w": draw(8, 6)}
    for name in names:
        dtype = getattr(torch, name)
        pattern = torch.arange(12 * dtype.itemsize, dtype=torch.uint8)
        full = (pattern % 2 if name == "bool" else pattern).view(dtype).reshape(12)
        shapes = [(12,), (0, 3), ()] if dtype in (torch.bfloat16, torch.float64) else [(3, 4), (0, 3), (2, 0), ()]
        state |= {f"{name}.{i}": full[: math.prod(shape)].clone().reshape(shape) for i, shape in enumerate(shapes)}
    return state


def raw(state):
    return {name: (tensor.dtype, tensor.shape, bytes(as_bytes(tensor))) for name, tensor in state.items()}


@pytest.mark.parametrize("before", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("verb", ["compress", "quantize"])
def test_every_dtype_stays_as_it_is(capsys, tmp_path, before, verb):
    state = of_every_dtype()
    torch.save(state, tmp_path / before) if before == "a.pt" else save_file(state, tmp_path / before)
    code, out, error = command(capsys, verb, tmp_path / before, "-o", tmp_path / "small.safetensors", "--bits", 2)
    assert (code, error) == (0, "")
    assert "5 weights of layers that are quantized already (float8_e4m3fn.0, " in out
    code, out, error = command(capsys, "report", tmp_path / before)
    assert (code, error) == (0, "") and "or empty; 5 of layers that are quantized already)" in out
    for after in ("b.pt", "b.safetensors", "back/"):
        out = f"{tmp_path}/{after}"
        assert command(capsys, "expand", tmp_path / "small.safetensors", "-o", out)[::2] == (0, "")
        found = {entry.name: tensor for entry, tensor in opened(out).read()}
        assert found.pop("w").shape == (8, 6)
        assert raw(found) == raw({name: tensor for name, tensor in state.items() if name != "w"})


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex32])
def test_dtypes_that_safetensors_does_not_have(capsys, tmp_path, dtype):
    torch.save({"w": draw(8, 6), "freqs": torch.ones(3, dtype=dtype)}, tmp_path / "a.pt")
    assert command(capsys, "report", tmp_path / "a.pt")[0] == 0
    line = "compress", tmp_path / "a.pt", "-o", tmp_path / "a.safetensors", "--bits", 2
    assert_refused(command(capsys, *line), f"freqs has dtype {dtype}; allowed are")


def test_a_checkpoint_that_is_quantized_already(capsys, tmp_path):
    layer = {"a.weight": draw(8, 6).to(torch.float8_e4m3fn), "a.weight_scale_inv": draw(8, 6), "norm": draw(8)}
    save_file(layer, tmp_path / "a.safetensors")
    for line in (["report"], ["compress", "-o", tmp_path / "b.safetensors", "--bits", 2]):
        refused = command(capsys, *line, tmp_path / "a.safetensors")
        assert_refused(refused, "among its 3 tensors; 2 are of layers that are quantized already")
    save_file({**layer, "b.weight": draw(8, 6)}, tmp_path / "a.safetensors")
    code, out, error = command(capsys, "report", tmp_path / "a.safetensors", "--sizes")
    assert (code, error) == (0, "") and f"{48 + 192 + 32} B that are no weights are counted everywhere" in out


def test_views(capsys, tmp_path):
    base = draw(12, 10)
    state = {"rows": base[::2], "columns": base[:, 3:7], "turned": base.t(), "row": base[3], "wide": draw(1).expand(9)}
    torch.save(state, tmp_path / "a.pt")
    small = tmp_path / "a.safetensors"
    assert command(capsys, "quantize", tmp_path / "a.pt", "-o", small, "--bits", 8)[::2] == (0, "")
    found = load_palettized(small)
    assert all(torch.equal(found[name], state[name]) for name in ("row", "wide"))
    for name in ("rows", "columns", "turned"):
        assert found[name].is_contiguous() and (found[name] - state[name]).abs().max() < 0.02


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = (
            torch.nn.Embedding(16, 8),
            torch.nn.LayerNorm(8),
            torch.nn.Linear(8, 16, False),
        )
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("before", ["a.pt", "once.safetensors", "twice.safetensors"])
@pytest.mark.parametrize("after", ["b.pt", "b.safetensors", "b/"])
def test_tied_names(capsys, tmp_path, before, after):
    """As torch, transformers (which stores one of the two names) and others leave them."""
    model, state = Tied(), Tied().state_dict()
    if before == "a.pt":
        torch.save(state, tmp_path / before)
    else:
        names = state.keys() - ({"head.weight"} if before.startswith("once") else set())
        save_file({name: state[name].clone() for name in names}, tmp_path / before)
    small, out = tmp_path / "small.safetensors", f"{tmp_path}/{after}"
    assert command(capsys, "compress", tmp_path / before, "-o", small, "--bits", 2)[::2] == (0, "")
    assert command(capsys, "expand", small, "-o", out)[::2] == (0, "")
    found = {entry.name: tensor for entry, tensor in opened(out).read()}
    model.load_state_dict(found, strict=not before.startswith("once"))
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, load_palettized(small)["embed.weight"])
    assert model.embed.weight.unique().numel() == 4


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_transformers_save_and_load(capsys, tmp_path, kind):
    """Shards that transformers writes are compressed, and those that are written are what it loads."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, eos_token_id=0)
    if kind == "gpt2":
        config = transformers.GPT2Config(**small, n_positions=16, bos_token_id=0)  # head and embedding are tied
    else:
        config = transformers.LlamaConfig(**small, intermediate_size=48, num_key_value_heads=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    palettized, back = tmp_path / "small.safetensors", tmp_path / "back"
    assert command(capsys, "compress", tmp_path / "model", "-o", palettized, "--bits", 2)[0] == 0
    assert command(capsys, "expand", palettized, "-o", back, "--shard-size", "20KB")[0] == 0
    config.save_pretrained(back)
    model, loaded = transformers.AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(loaded.values())
    state, expected = model.state_dict(), load_palettized(palettized)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert state.keys() - expected.keys() <= {"lm_head.weight"}
