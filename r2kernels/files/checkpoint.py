"""Reading checkpoints tensor by tensor: .safetensors, and what torch.save writes. `folders` reads those in shards.

A large file is mapped into memory, never loaded whole; the exceptions are one in torch's format from before 1.6 and one
whose archive was compressed anew, which can only be loaded at once. No code from a file is ever run.
"""

import json
import math
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.checks import DTYPES
from .paths import open_regular

NESTED = ("state_dict", "model", "model_state_dict", "module")
_INTEGERS = {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
_POINTER = b"version https://git-lfs"
# Tensors that share what is stored once may take MOST_TIMES as many bytes as that, and always ALWAYS_READ together.
MOST_TIMES, ALWAYS_READ = 64, 2**26
_EXPECTED = f"a checkpoint is a state dict (name -> tensor), or has one under {', '.join(NESTED)}"


class CheckpointError(ValueError):
    """A file that cannot be read or written as a checkpoint.

    One line: the file, what is wrong with it, what is allowed.
    """


class Entry(NamedTuple):
    """What is known of a tensor before it is read."""

    name: str
    shape: tuple
    dtype: torch.dtype

    @property
    def numel(self):
        return math.prod(self.shape)

    @property
    def nbytes(self):
        return self.numel * self.dtype.itemsize

    @property
    def is_weight(self):
        """Whether it is a weight matrix or kernel: floating point, two or more dimensions, not empty."""
        return self.dtype in DTYPES and self.is_matrix

    @property
    def is_matrix(self):
        return len(self.shape) >= 2 and self.numel > 0

    @property
    def module(self):
        return self.name.rpartition(".")[0]


class Checkpoint:
    """A state dict in the file at `path`; CheckpointError where it cannot be read.

    key: of which entry of a file of torch.save, with dots for entries of entries; by default the first of `NESTED`.
    `entries`: name, shape and dtype of every tensor; `read` gives the tensors, one at a time. `aliases`: of those that
    are one tensor under several names, name -> the first of them. `unread`: name of every entry beside the state dict
    that holds tensors -> how many. `metadata`: text that a .safetensors file holds beside its tensors, but for
    the usual format "pt".
    """

    key, _part = None, None

    def __init__(self, path, key=None):
        self.path = Path(path)
        opener = _OPENERS.get(self.path.suffix.lower())
        if opener is None:
            raise CheckpointError(
                f"{path}: unknown kind of checkpoint {self.path.suffix!r}; "
                f"allowed are {', '.join(SUFFIXES)}, a folder with one of these, and its .index.json"
            )
        _check_file(self.path)
        self.key, self.aliases, self.unread, self.metadata = key, {}, {}, {}
        opener(self, key)

    @property
    def weights(self):
        """The entries that are weights, but for those `quantized`; at least one."""
        quantized = self.quantized
        found = [entry for entry in self.entries if entry.is_weight and entry.name not in quantized]
        if not found:
            already = f"; {len(quantized)} are of layers that are quantized already" if quantized else ""
            of = f"among its {len(self.entries)} tensors{already}"
            raise CheckpointError(f"{self.path}: no weight (floating point, two or more dimensions) {of}")
        return found

    @property
    def quantized(self):
        """Names of what was quantized before: matrices in float8, and scales in modules with weights in such or ints.

        Coded once more, the few scales of a layer would take all its weights with them.
        """
        low = {e.name for e in self.entries if e.is_matrix and e.dtype.is_floating_point and e.dtype.itemsize == 1}
        whole = {e.name for e in self.entries if e.is_matrix and e.dtype in _INTEGERS} | low
        modules = {e.module for e in self.entries if e.name in whole and "weight" in e.name.rpartition(".")[2]}
        return low | {e.name for e in self.entries if e.is_weight and e.module in modules}

    def read(self, entries=None):
        """Yields (entry, tensor on the CPU) for all entries or for these, in order."""
        for entry in self.entries if entries is None else entries:
            yield entry, self.tensor(entry.name)

    def tensor(self, name):
        return self._get(name)

    def part(self, name, begin=0, end=None):
        """Those indices of a tensor's first dimension. What was read of a .safetensors file takes memory only as long
        as it is used, unlike `tensor`, whose file is mapped."""
        if self._part:
            return self._part(name, begin, end)
        whole = self.tensor(name)
        return whole if end is None else whole[begin:end]

    def files(self):
        """Paths of the files that it is read from."""
        return [self.path]

    def identity(self):
        """[(name, bytes, time of the last change in ns)] of its files, and how it was read: it is another one where
        these differ."""
        found = [(path.name, path.stat()) for path in self.files()]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found] + [self.key]


def _check_file(path):
    try:
        if path.is_dir():
            raise CheckpointError(f"{path}: is a directory; a checkpoint is one {', '.join(_OPENERS)} file")
        with open_regular(path) as file:
            beginning = file.read(len(_POINTER))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if not beginning:
        raise CheckpointError(f"{path}: is empty")
    if beginning == _POINTER:
        raise CheckpointError(f"{path}: is a pointer of Git LFS in place of the file; `git lfs pull` fetches it")


def _open_safetensors(checkpoint, key):
    from safetensors import SafetensorError, safe_open

    path = checkpoint.path
    refuse_key(path, key)
    try:
        file = safe_open(path, framework="pt")
        checkpoint.entries = [_safetensors_entry(path, file, name) for name in sorted(file.keys(), key=natural)]
        checkpoint._get, checkpoint._part = file.get_tensor, _safetensors_parts(path, checkpoint.entries)
        metadata = sorted((file.metadata() or {}).items())
        checkpoint.metadata = dict(pair for pair in metadata if pair != ("format", "pt"))
    except (SafetensorError, OSError) as error:
        reason = f"is truncated, corrupt or not a safetensors file ({_first_line(error)})"
        raise CheckpointError(f"{path}: {reason}") from error


def _safetensors_parts(path, entries):
    """(name, begin, end) -> those indices of a tensor's first dimension, read from an intact file."""
    known = {entry.name: entry for entry in entries}
    with open_regular(path) as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()

    def part(name, begin, end):
        entry = known[name]
        inner, count = entry.shape[1:], 1
        if entry.shape:
            begin, end, _ = slice(begin, end).indices(entry.shape[0])
            inner, count = (end - begin, *inner), end - begin
        each = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        data = torch.empty(count * each, dtype=torch.uint8, device="cpu")
        with open_regular(path) as file:
            file.seek(start + header[name]["data_offsets"][0] + begin * each)
            if file.readinto(memoryview(data.numpy())) < len(data):
                raise CheckpointError(f"{path}: {name} is truncated")
        return data.view(entry.dtype).reshape(inner)

    return part


def refuse_key(path, key):
    if key is not None:
        raise CheckpointError(f"{path}: has no entry {key!r}; only files of torch.save hold several state dicts")


def _safetensors_entry(path, file, name):
    stored = file.get_slice(name)
    shape = tuple(stored.get_shape())
    try:
        return Entry(name, shape, (stored[:0] if shape else file.get_tensor(name)).dtype)
    except Exception as error:  # of many kinds, for what torch has no dtype
        reason = f"which cannot be read ({_first_line(error)})"
        raise CheckpointError(f"{path}: {name} has dtype {stored.get_dtype()}, {reason}") from error


def natural(name):
    """Sorts layers.2 before layers.10."""
    parts = re.split(r"(\d+)", name)
    return [(len(part.lstrip("0")), part.lstrip("0")) if part.isdecimal() else (-1, part) for part in parts]


def _open_torch(checkpoint, key):
    path = checkpoint.path
    loaded = _load_torch(path)
    try:
        found, checkpoint.unread = _state_dict(path, loaded, key)
    except RecursionError as error:
        raise CheckpointError(f"{path}: is nested too deep; {_EXPECTED}") from error
    tensors = {}
    for name, value in found.items():
        if isinstance(value, Tensor):
            if str(name) in tensors:
                raise CheckpointError(f"{path}: has two tensors of the name {str(name)!r}")
            tensors[str(name)] = value.detach()
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors {_elsewhere(loaded)}")
    for name, tensor in tensors.items():
        kind = _kind(tensor)
        if kind:
            raise CheckpointError(f"{path}: {name} is a {kind}; only dense tensors with data are supported")
    checkpoint.entries = [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    checkpoint._get, checkpoint.aliases = tensors.get, same_tensors(tensors)
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors.values())}
    reason = too_repeated((e for e in checkpoint.entries if e.name not in checkpoint.aliases), sum(storages.values()))
    if reason:
        raise CheckpointError(f"{path}: {reason}")


def too_repeated(entries, held):
    """Why a file that holds so many bytes may not make tensors like these of them, or None."""
    sizes = {entry.name: entry.nbytes for entry in entries}
    total = sum(sizes.values())
    if total <= max(MOST_TIMES * held, ALWAYS_READ):
        return None
    name = max(sizes, key=sizes.get)
    return (
        f"its tensors would take {total:,} bytes (the largest, {name}, {sizes[name]:,}) but share {held:,}; "
        f"allowed are {MOST_TIMES} times as many, or {ALWAYS_READ:,}"
    )


def _kind(tensor):
    """What a tensor is that is not dense or has no data, or None."""
    if tensor.is_quantized or tensor.is_nested:
        return f"{'quantized' if tensor.is_quantized else 'nested'} tensor ({tensor.dtype})"
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return f"{type(tensor).__name__} ({tensor.layout}, {tensor.device})"
    return None


def same_tensors(tensors):
    """name -> an earlier name of the same tensor: the same memory, read in the same way."""
    aliases, seen = {}, {}
    for name, tensor in tensors.items():
        first = seen.setdefault((tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), name)
        if first != name and tensor.numel():
            aliases[name] = first
    return aliases


def _load_torch(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_mappable(path))
    except Exception as error:  # bytes that are not a checkpoint make the unpickler raise anything
        reason = _refusal(str(error)) or f"is truncated, corrupt or not written by torch.save ({_first_line(error)})"
        raise CheckpointError(f"{path}: {reason}") from error


def _mappable(path):
    """Whether tensors lie in a file as they are in memory: a zip archive with no member compressed."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())


def _refusal(message):
    """Why torch refused an intact file, or None."""
    if "TorchScript" in message:
        return "is a TorchScript archive; save the model's state_dict() instead"
    unsafe = re.search(r"GLOBAL (\S+)", message)
    if not unsafe:
        return None
    return (
        f"holds a pickled object ({unsafe[1]}), refused because loading it can run code; save the model's state_dict() "
        "alone, where you trust the file after torch.load(file, weights_only=False)"
    )


def _state_dict(path, loaded, key=None):
    """(the mapping of names to tensors in what was loaded, which may be nested; name -> tensors of what is beside)."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}; {_EXPECTED}")
    chosen, unread, known = [], {}, {}

    def enter(name):
        nonlocal loaded
        for other, value in loaded.items():
            if other != name:
                unread[".".join([*chosen, str(other)])] = _tensors_in(value, known)
        chosen.append(str(name))
        loaded = loaded[name]

    while key:
        name = _entry_of(loaded, key)
        if name is None or not isinstance(loaded[name], Mapping):
            mappings = {str(name): value for name, value in loaded.items() if isinstance(value, Mapping)}
            held = [".".join([*chosen, name]) for name, value in mappings.items() if _tensors_in(value, known)]
            reason = f"allowed are {some(held)}" if held else "it holds none but the one that is read without"
            raise CheckpointError(f"{path}: has no state dict {'.'.join([*chosen, key])!r}; {reason}")
        enter(name)
        key = key[len(str(name)) + 1 :]
    for _ in NESTED:
        name = next((name for name in NESTED if isinstance(loaded.get(name), Mapping)), None)
        if name:
            enter(name)
    for name, value in loaded.items():
        if not isinstance(value, Tensor):
            unread[".".join([*chosen, str(name)])] = _tensors_in(value, known)
    return loaded, {name: count for name, count in unread.items() if count}


def _entry_of(mapping, key):
    """The longest name in the mapping that is the key, or that the key goes on from after a dot."""
    names = [name for name in mapping if key == str(name) or key.startswith(f"{name}.")]
    return max(names, key=lambda name: len(str(name)), default=None)


def _elsewhere(loaded):
    """What to do about a file without tensors: the keys of what else is in it, or what it should be."""
    held = list(_state_dicts(loaded, set(), ()))
    return f"of its own; --key NAME reads one of {some(held)}" if held else f"in a state dict; {_EXPECTED}"


def _state_dicts(mapping, seen, above):
    """Dotted keys of the mappings inside that hold tensors themselves, each mapping once."""
    for name, value in mapping.items():
        if isinstance(value, Mapping) and id(value) not in seen:
            seen.add(id(value))
            if any(isinstance(one, Tensor) for one in value.values()):
                yield ".".join([*above, str(name)])
            yield from _state_dicts(value, seen, [*above, str(name)])


def some(names, most=8):
    """The first of some names, and how many there are beside."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _tensors_in(value, known):
    """How many tensors there are in a value, in mappings and lists too. `known`: those of values seen before, by id."""
    if isinstance(value, Tensor):
        return 1
    if not isinstance(value, (Mapping, list, tuple)):
        return 0
    if id(value) not in known:
        known[id(value)] = 0  # of one that holds itself
        inner = value.values() if isinstance(value, Mapping) else value
        known[id(value)] = sum(_tensors_in(one, known) for one in inner)
    return known[id(value)]


def _first_line(error):
    """A library's error, without the advice that follows it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].split('. ')[0]}" if lines else type(error).__name__


TORCH = (".pt", ".pth", ".bin", ".ckpt", ".tar")  # as in model.pth.tar
_OPENERS = {".safetensors": _open_safetensors, **dict.fromkeys(TORCH, _open_torch)}
SUFFIXES = tuple(_OPENERS)
