"""Checkpoints as they are found: folders, shards, what other tools left in a file, and what is refused in one line."""

import argparse
import json
import os
import warnings
import weakref
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as distributed
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from r2kernels.files import folders
from r2kernels.files.checkpoint import Checkpoint, CheckpointError
from r2kernels.files.folders import Sharded, chosen
from r2kernels.files.loading import opened

W = torch.arange(6.0).reshape(2, 3)
STATE = {"embed.weight": W, "layers.2.weight": W + 1, "layers.10.weight": W + 2, "head.bias": torch.ones(2)}
SHARDS = [["embed.weight", "head.bias"], ["layers.10.weight"], ["layers.2.weight"]]


def write(path, state, **metadata):
    if path.suffix == ".safetensors":
        save_file(state, path, metadata=metadata or None)
    else:
        torch.save(state, path)
    return path


def sharded(folder, kind="safetensors", infix="", **more):
    """An index and its shards. more: entries put into the index's weight_map."""
    model = {"safetensors": "model", "bin": "pytorch_model"}[kind] + infix
    names = {f"{model}-{i:05}-of-00003.{kind}": shard for i, shard in enumerate(SHARDS, 1)}
    for name, shard in names.items():
        write(folder / name, {key: STATE[key] for key in shard})
    weight_map = {key: name for name, shard in names.items() for key in shard} | more
    return indexed(folder, {"metadata": {"total_size": 80}, "weight_map": weight_map}, f"{model}.{kind}")


def indexed(folder, content, model="model.safetensors"):
    path = folder / f"{model}.index.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def contents(checkpoint):
    return {entry.name: tensor for entry, tensor in checkpoint.read()}


def assert_same(found, expected=STATE):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def assert_line(caught, *parts):
    assert isinstance(caught.value, CheckpointError) and "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("infix", ["", ".fp16"])
def test_shards_one_at_a_time(tmp_path, monkeypatch, kind, infix):
    alive, count = weakref.WeakSet(), []

    def alone(path):
        assert not alive
        shard = Checkpoint(path)
        alive.add(shard)
        count.append(path)
        return shard

    monkeypatch.setattr(folders, "Checkpoint", alone)
    index = sharded(tmp_path, kind, infix)
    for path in (tmp_path, index):
        checkpoint = opened(path)
        assert [entry.name for entry in checkpoint.entries] == [
            "embed.weight",
            "head.bias",
            "layers.2.weight",
            "layers.10.weight",
        ]
        assert_same(contents(checkpoint))
        assert checkpoint.path == index
        del checkpoint
    assert len(count) == 2 * (3 + 3)


def test_links_to_blobs(tmp_path):
    """As the cache of Hugging Face has them: the names of shards lead out of their folder, to files without suffix."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    sharded(tmp_path / "snapshot")
    for i, path in enumerate(sorted((tmp_path / "snapshot").iterdir())):
        path.rename(tmp_path / "blobs" / str(i))
        path.symlink_to(tmp_path / "blobs" / str(i))
    assert_same(contents(opened(tmp_path / "snapshot")))
    (tmp_path / "blobs" / "1").unlink()
    with pytest.raises(CheckpointError, match=r"missing are model-00002-of-00003\.safetensors"):
        opened(tmp_path / "snapshot")


def test_metadata_and_tensors_beside_the_index(tmp_path):
    index = sharded(tmp_path)
    write(
        tmp_path / "model-00001-of-00003.safetensors", {key: STATE[key] for key in SHARDS[0]}, license="MIT", part="1"
    )
    write(tmp_path / "model-00002-of-00003.safetensors", {SHARDS[1][0]: W + 2, "extra": W}, license="MIT", part="2")
    with pytest.warns(UserWarning) as warned:
        checkpoint = Sharded(index)
    assert_same(contents(checkpoint), {**STATE, "extra": W})
    assert checkpoint.metadata == {"license": "MIT"}
    assert [str(one.message).partition(": ")[2] for one in warned] == [
        "does not name extra, which its shards have and which are read",
        "metadata differs between shards and is not kept: part",
    ]


def test_tied_tensors_in_a_shard(tmp_path):
    torch.save({"a": W, "b": W}, tmp_path / "pytorch_model-00001-of-00001.bin")
    names = dict.fromkeys("ab", "pytorch_model-00001-of-00001.bin")
    assert Sharded(indexed(tmp_path, {"weight_map": names})).aliases == {"b": "a"}


def without(folder, *names):
    index = sharded(folder)
    for name in names:
        (folder / f"model-0000{name}-of-00003.safetensors").unlink()
    return index


def changed(folder, number, state):
    index = sharded(folder)
    write(folder / f"model-0000{number}-of-00003.safetensors", state)
    return index


def mapped(name):
    return lambda d: indexed(d, {"weight_map": {"w": name}})


WRONG_INDEX = {
    "missing shards": (lambda d: without(d, 2, 3), "missing are model-00002-of-00003.safetensors, model-00003"),
    "lacking": (lambda d: changed(d, 2, {"x": W}), "model-00002-of-00003.safetensors: lacks layers.10.weight, which"),
    "twice": (
        lambda d: changed(d, 3, {"layers.2.weight": W, "head.bias": W + 1}),
        "head.bias is in two shards, model-",
    ),
    "corrupt shard": (
        lambda d: [sharded(d), (d / "model-00002-of-00003.safetensors").write_bytes(b"x" * 99)][0],
        "model-00002-of-00003.safetensors: is truncated, corrupt",
    ),
    "traversal": (mapped("../a.safetensors"), "w is in '../a.safetensors', which is not the name of a file in its"),
    "absolute": (mapped("/etc/a.safetensors"), "is not the name of a file"),
    "backslash": (mapped("..\\a.safetensors"), "is not the name of a file"),
    "parent": (mapped(".."), "is not the name of a file"),
    "no text": (mapped(3), "w is in 3, which is not the name of a file"),
    "zero": (mapped("a\0.safetensors"), "missing are a"),
    "other kind": (lambda d: [mapped("a.gguf")(d), (d / "a.gguf").touch()][0], "a.gguf: unknown kind of checkpoint"),
    "no JSON": (lambda d: indexed(d, "{"), "is no JSON of an index"),
    "no text at all": (lambda d: indexed(d, "\ud800".encode("utf-8", "surrogatepass").decode("latin1")), "is no JSON"),
    "too deep": (lambda d: indexed(d, "[" * 100_000), "is no JSON of an index (RecursionError"),
    "a name twice": (lambda d: indexed(d, '{"weight_map": {"w": "a", "w": "b"}}'), "a name occurs twice"),
    "a list": (lambda d: indexed(d, []), "has no weight_map"),
    "empty": (lambda d: indexed(d, {"weight_map": {}}), "has no weight_map"),
    "a list of shards": (lambda d: indexed(d, {"weight_map": ["a"]}), "has no weight_map"),
}


@pytest.mark.parametrize("kind", WRONG_INDEX)
def test_wrong_indices(tmp_path, kind):
    make, message = WRONG_INDEX[kind]
    index = make(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        opened(index)
    assert_line(caught, str(tmp_path), message)


def test_an_index_that_is_not_there_or_no_file_and_a_key(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        opened(tmp_path / "model.safetensors.index.json")
    os.mkfifo(tmp_path / "fifo.index.json")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        opened(tmp_path / "fifo.index.json")
    with pytest.raises(CheckpointError, match="has no entry 'ema'"):
        opened(sharded(tmp_path), key="ema")


PLACES = [  # files of a folder, the one that is read, those that a warning names
    (["pytorch_model.bin", "training_args.bin", "optimizer.pt"], "pytorch_model.bin", ""),
    (["pytorch_model.bin", "model.safetensors"], "model.safetensors", "pytorch_model.bin"),
    (["model.safetensors.index.json", "model.safetensors"], "model.safetensors", "model.safetensors.index.json"),
    (
        ["model.safetensors.index.json", "pytorch_model.bin.index.json"],
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
    ),
    (
        ["model.safetensors.index.json", "consolidated.safetensors"],
        "model.safetensors.index.json",
        "consolidated.safetensors",
    ),
    (["diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model.safetensors", ""),
    (["adapter_model.safetensors", "optimizer.pt"], "adapter_model.safetensors", ""),
    (
        ["model.fp16.safetensors.index.json", "model.fp16-00001-of-00002.safetensors"],
        "model.fp16.safetensors.index.json",
        "",
    ),
    (["model-00001-of-00002.fp16.safetensors", "model.safetensors.index.fp16.json", "last.ckpt"], "last.ckpt", ""),
    (["model_best.pth.tar", "log.txt"], "model_best.pth.tar", ""),
]


@pytest.mark.parametrize(("names", "expected", "beside"), PLACES)
def test_the_checkpoint_of_a_folder(tmp_path, names, expected, beside):
    for name in names:
        (tmp_path / name).touch()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert chosen(tmp_path) == tmp_path / expected
    assert [str(one.message) for one in warned] == [f"{tmp_path}: {expected} is read, not {beside}"] * bool(beside)


DCP = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
REFUSED_FOLDERS = [
    ([], "is a directory without a checkpoint (.safetensors, .pt, .pth, .bin, .ckpt, .tar, or the .index.json of"),
    (["unet/model.safetensors", "vae/a.pt", "text/a.txt"], "shards); there are some in unet, vae"),
    (["a.pt", "b.pth"], "holds several checkpoints; give the path of one: a.pt, b.pth"),
    (["a.safetensors", "b.safetensors"], "give the path of one: a.safetensors, b.safetensors"),
    ([f"a{i}.pt" for i in range(20)], "a0.pt, a1.pt, a2.pt, a3.pt, a4.pt, a5.pt, a6.pt, a7.pt and 12 more"),
    (["model-00001-of-00002.safetensors"], "but no index of them, such as model.safetensors.index.json"),
    ([".metadata", "__0_0.distcp"], DCP),
    (["latest", "zero_to_fp32.py", "rng_state.pth"], "python -m deepspeed.utils.zero_to_fp32 {} OUT"),
    (["mp_rank_00_model_states.pt"], "python -m deepspeed.utils.zero_to_fp32 {.parent} OUT"),
]


@pytest.mark.parametrize(("names", "message"), REFUSED_FOLDERS)
def test_folders_that_are_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path)
    assert_line(caught, str(tmp_path), message.format(tmp_path))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_is_read_once_it_is_converted(tmp_path):
    distributed.save({"model": STATE}, checkpoint_id=tmp_path / "a", no_dist=True)
    for path in (tmp_path / "a", tmp_path / "a" / "__0_0.distcp", tmp_path / "a" / ".metadata"):
        with pytest.raises(CheckpointError) as caught:
            opened(path)
        assert_line(caught, "pickle that can run code", f"{DCP} {tmp_path / 'a'} OUT.pt")
    dcp_to_torch_save(tmp_path / "a", tmp_path / "a.pt")
    assert_same(contents(opened(tmp_path / "a.pt")))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "last.ckpt", "model_best.pth.tar"])
def test_names_of_files_of_torch_save(tmp_path, name):
    lightning = {
        "epoch": 3,
        "state_dict": STATE,
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"exp_avg": W}}}],
        "hyper_parameters": {"lr": 0.1},
    }
    checkpoint = opened(write(tmp_path / name, lightning))
    assert_same(contents(checkpoint))
    assert checkpoint.unread == {"callbacks": 1, "optimizer_states": 1}


def nested(depth):
    value = [W]
    for _ in range(depth):
        value = [value, value]
    return value


REFUSED_FILES = {
    "Namespace": (
        {"state_dict": STATE, "hyper_parameters": argparse.Namespace(lr=0.1)},
        ["pickled object (argparse.Namespace)", "can run code", "torch.load(file, weights_only=False)"],
    ),
    "numpy": ({"model": STATE, "best": torch.ones(1).numpy()[0]}, ["multiarray.scalar)"]),
    "a module": ({"model": torch.nn.Linear(2, 2), "epoch": 1}, ["(torch.nn.modules.linear.Linear)", "state_dict()"]),
    "parts": (
        {"encoder": STATE, "net": {"decoder": {"w": W}}, "epoch": 1},
        ["holds no tensors of its own; --key NAME reads one of encoder, net.decoder"],
    ),
    "parts of a model": ({"model": {"a": {"w": W}, "b": {1: W}}}, ["--key NAME reads one of model.a, model.b"]),
    "lists": ({"model": {"layers": [W, W]}}, ["holds no tensors in a state dict; a checkpoint is"]),
    "many lists": (nested(40), ["holds a list"]),
    "many lists in it": ({"layers": nested(40)}, ["holds no tensors in a state dict"]),
    "one name": ({0: W, "0": W}, ["has two tensors of the name '0'"]),
    "jagged": ({"w": torch.nested.nested_tensor([W, W[:1]], layout=torch.jagged)}, ["w is a nested tensor"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED_FILES)
def test_files_that_are_refused(tmp_path, kind):
    data, messages = REFUSED_FILES[kind]
    with pytest.raises(CheckpointError) as caught:
        opened(write(tmp_path / "a.bin", data))
    assert_line(caught, f"{tmp_path / 'a.bin'}: ", *messages)


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_refused(tmp_path):
    for tensor, kind in [
        (torch.quantize_per_tensor(W, 0.1, 0, torch.qint8), "quantized tensor (torch.qint8)"),
        (torch.nested.nested_tensor([W, W[:1]]), "nested tensor (torch.float32)"),
    ]:
        with pytest.raises(CheckpointError) as caught:
            opened(write(tmp_path / "a.pt", {"w": tensor}))
        assert_line(caught, f"w is a {kind}; only dense tensors with data")


def test_what_holds_itself_and_what_is_nested_too_deep(tmp_path):
    loop = [W]
    loop.append(loop)
    checkpoint = opened(write(tmp_path / "a.pt", {**STATE, "loop": loop, "twice": [loop, loop]}))
    assert_same(contents(checkpoint))
    assert checkpoint.unread == {"loop": 1, "twice": 2}
    deep = b"\x80\x02}X\x01\0\0\0a" + b"]" * 3000 + b"a" * 2999 + b"s."
    with zipfile.ZipFile(write(tmp_path / "b.pt", {}), "r") as made, zipfile.ZipFile(tmp_path / "c.pt", "w") as file:
        for name in made.namelist():
            file.writestr(name, deep if name.endswith("data.pkl") else made.read(name))
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path / "c.pt")
    assert_line(caught, "is nested too deep")


def test_keys_that_are_numbers(tmp_path):
    path = write(tmp_path / "a.pt", {"nets": {0: STATE, 1: {7: W}}})
    assert_same(contents(opened(path, "nets.0")))
    assert_same(contents(opened(path, "nets.1")), {"7": W})


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_pointers_of_git_lfs(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(CheckpointError, match="is a pointer of Git LFS in place of the file; `git lfs pull`"):
        opened(tmp_path)


@pytest.mark.parametrize("kind", ["F4", "F6_E2M3"])
def test_dtypes_that_torch_does_not_have(tmp_path, kind):
    size = {"F4": 8, "F6_E2M3": 12}[kind]
    header = json.dumps({"w": {"dtype": kind, "shape": [2, 8], "data_offsets": [0, size]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path / "a.safetensors")
    assert_line(caught, f"w has dtype {kind}, which cannot be read")


F8 = torch.ones(2, 3).to(torch.float8_e4m3fn)
QUANTIZED = {
    "deepseek": ({"a.weight": F8, "a.weight_scale_inv": W}, {"a.weight", "a.weight_scale_inv"}),
    "gptq": ({"a.qweight": W.int(), "a.qzeros": W.int(), "a.scales": W}, {"a.scales"}),
    "mlx": ({"a.weight": W.to(torch.uint32), "a.scales": W, "a.biases": W, "a.bias": W[0]}, {"a.scales", "a.biases"}),
    "packed": ({"a.weight_packed": W.int(), "a.weight_scale": F8}, {"a.weight_scale"}),
    "swin": ({"a.relative_position_index": W.long(), "a.logit_scale": W}, set()),
    "vectors": ({"a.weight": F8[0], "a.weight_scale": W[0]}, set()),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_layers_that_are_quantized_already(tmp_path, kind):
    state, expected = QUANTIZED[kind]
    checkpoint = opened(write(tmp_path / "a.pt", {**state, "b.weight": W}))
    assert checkpoint.quantized == expected
    assert {entry.name for entry in checkpoint.weights} == {"b.weight", *(["a.logit_scale"] if kind == "swin" else [])}
