"""Folders as Hugging Face has them: which of its files is the checkpoint, and checkpoints in shards beside an index."""

import json
import re
import warnings
from pathlib import Path

from .checkpoint import SUFFIXES, Checkpoint, CheckpointError, natural, some
from .paths import open_regular

INDEX = ".index.json"
# in the order in which transformers and diffusers look for them
USUAL = tuple(
    f"{model}{index}"
    for model in (
        "model.safetensors",
        "diffusion_pytorch_model.safetensors",
        "pytorch_model.bin",
        "diffusion_pytorch_model.bin",
    )
    for index in ("", INDEX)
)
_SHARD = re.compile(r"-\d+-of-\d+\b")


def chosen(path):
    """A path, or where it is a folder that of the checkpoint in it.

    One of the `USUAL` names, the first; else the only .safetensors file or index, else the only index or file of
    torch.save. Warns of other weights beside it. CheckpointError where there is none or where several would do, and for
    the folders of torch.distributed.checkpoint and DeepSpeed, with the command that converts them.
    """
    path = Path(path)
    if path.name == ".metadata" or path.suffix == ".distcp":
        raise _distributed(path, path.parent)
    if not path.is_dir():
        return path
    names = _names(path)
    tensors = [name for name in names if name.endswith((f".safetensors{INDEX}", ".safetensors"))]
    indices = [name for name in names if name.endswith(INDEX)]
    usual = [name for name in USUAL if name in names]
    if not usual:
        _refuse_parts(path)
    found = usual[:1] or tensors or indices or names
    if len(found) != 1:
        raise CheckpointError(f"{path}: {_which(path, found)}")
    beside = [name for name in dict.fromkeys([*usual, *tensors, *indices]) if name not in found]
    if beside:
        warnings.warn(f"{path}: {found[0]} is read, not {', '.join(beside)}", stacklevel=2)
    return path / found[0]


def _names(path, shards=False):
    """Names of the indices and checkpoints in a folder, or of the shards in it."""
    try:
        names = sorted((file.name for file in path.iterdir() if not file.is_dir()), key=natural)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    return [name for name in names if name.endswith((INDEX, *SUFFIXES)) and bool(_SHARD.search(name)) == shards]


def _which(path, found):
    """Why a folder is not one checkpoint."""
    if found:
        return f"holds several checkpoints; give the path of one: {some(found)}"
    shards = _names(path, shards=True)
    if shards:
        return f"holds shards ({some(shards)}) but no index of them, such as {USUAL[1]}"
    inside = [folder.name for folder in sorted(path.iterdir()) if folder.is_dir() and _names(folder)]
    there = f"; there are some in {some(inside)}" if inside else ""
    return f"is a directory without a checkpoint ({', '.join(SUFFIXES)}, or the {INDEX} of shards){there}"


def _refuse_parts(path):
    """An error for the folders in which training leaves the parts of every process."""
    names = {file.name for file in path.iterdir()}
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        raise _distributed(path, path)
    parts = any(name.endswith("_model_states.pt") for name in names)
    if parts or "zero_to_fp32.py" in names:
        folder = path.absolute().parent if parts else path
        command = f"python -m deepspeed.utils.zero_to_fp32 {folder} OUT"
        pickles = "in pickled parts that can run code; where you trust them"
        raise CheckpointError(f"{path}: is a checkpoint of DeepSpeed, {pickles} `{command}` merges them")


def _distributed(path, folder):
    command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} OUT.pt"
    return CheckpointError(
        f"{path}: is a checkpoint of torch.distributed.checkpoint (DCP, FSDP), whose index is a pickle that can run "
        f"code; where you trust it `{command}` converts it"
    )


class Sharded(Checkpoint):
    """The checkpoint whose shards and tensors the index at `path` names: files of any kind in the index's folder.

    Only one shard is open at a time. A tensor that is in a shard but not in the index is read too, with a warning;
    metadata on which shards do not agree are not kept, with a warning. CheckpointError names the index or the shard
    with what is wrong: a shard that is missing or not in the folder, a tensor that its shard lacks or two shards have.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.aliases, self.unread, self._shard = {}, {}, None
        named = _tensors_of_shards(self.path)
        missing = [name for name in named if not (self.path.parent / name).exists()]
        if missing:
            raise CheckpointError(f"{path}: its shards are not all there; missing are {some(missing)}")
        self._shard_of, self.entries, metadata, more = {}, [], {}, []
        for name, expected in named.items():
            more += self._take(name, expected, metadata)
        self.entries.sort(key=lambda entry: natural(entry.name))
        self.metadata = {key: min(values) for key, values in metadata.items() if len(values) == 1}
        if more:
            warnings.warn(f"{path}: does not name {some(more)}, which its shards have and which are read", stacklevel=3)
        differ = [key for key, values in metadata.items() if len(values) > 1]
        if differ:
            warnings.warn(f"{path}: metadata differs between shards and is not kept: {some(differ)}", stacklevel=3)

    def _take(self, name, expected, metadata):
        """Notes what is in a shard, its metadata too; the names of tensors that are not expected in it."""
        shard = self._opened(name)
        found = {entry.name for entry in shard.entries}
        lacking = sorted(expected - found, key=natural)
        if lacking:
            raise CheckpointError(f"{shard.path}: lacks {some(lacking)}, which {self.path.name} says that it holds")
        for tensor in found:
            if tensor in self._shard_of:
                raise CheckpointError(f"{self.path}: {tensor} is in two shards, {self._shard_of[tensor]} and {name}")
            self._shard_of[tensor] = name
        self.entries += shard.entries
        for key, value in shard.metadata.items():
            metadata.setdefault(key, set()).add(value)
        self.aliases |= shard.aliases
        self.unread |= {f"{name}: {key}": count for key, count in shard.unread.items()}
        return sorted(found - expected, key=natural)

    def _opened(self, name):
        if self._shard is None or self._shard.path.name != name:
            self._shard = None  # memory of the one before is free before the next takes its own
            self._shard = self._open(self.path.parent / name)
        return self._shard

    def _open(self, path):
        return Checkpoint(path)

    def tensor(self, name):
        return self._opened(self._shard_of[name]).tensor(name)

    def part(self, name, begin=0, end=None):
        return self._opened(self._shard_of[name]).part(name, begin, end)

    def files(self):
        return [self.path, *[self.path.parent / name for name in sorted({*self._shard_of.values()}, key=natural)]]


def first_shard(path):
    """The path of the first shard that an index names."""
    return path.parent / next(iter(_tensors_of_shards(path)))


def _tensors_of_shards(path):
    """Name of every shard that an index names, in order -> names of the tensors it is said to hold."""

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        with open_regular(path) as file:
            found = json.loads(file.read(), object_pairs_hook=unique)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON of an index ({type(error).__name__}: {str(error)[:80]})") from error
    mapped = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(mapped, dict) or not mapped:
        raise CheckpointError(f"{path}: has no weight_map (tensor -> shard)")
    shards = {}
    for tensor, name in mapped.items():
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\"):
            raise CheckpointError(f"{path}: {tensor} is in {name!r:.80}, which is not the name of a file in its folder")
        shards.setdefault(name, set()).add(tensor)
    return {name: shards[name] for name in sorted(shards, key=natural)}
