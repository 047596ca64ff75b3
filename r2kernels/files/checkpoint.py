"""Reading checkpoints tensor by tensor: .safetensors, .pt, .pth.

A large file is mapped into memory, never loaded whole; the exceptions are a .pt or .pth in torch's format from before
1.6 and one whose archive was compressed anew, which can only be loaded at once. No code from a file is ever run.
"""

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
    def is_weight(self):
        """Whether it is a weight matrix or kernel: floating point, two or more dimensions, not empty."""
        return self.dtype in DTYPES and len(self.shape) >= 2 and self.numel > 0


class Checkpoint:
    """A state dict in the file at `path`; CheckpointError where it cannot be read.

    key: of which entry of a .pt or .pth file, with dots for entries of entries; by default the first of `NESTED`.
    `entries`: name, shape and dtype of every tensor; `read` gives the tensors, one at a time. `aliases`: of those that
    are one tensor under several names, name -> the first of them. `unread`: name of every entry beside the state dict
    that holds tensors -> how many. `metadata`: text that a .safetensors file holds beside its tensors, but for
    the usual format "pt".
    """

    def __init__(self, path, key=None):
        self.path = Path(path)
        opener = _OPENERS.get(self.path.suffix.lower())
        if opener is None:
            raise CheckpointError(
                f"{path}: unknown kind of checkpoint {self.path.suffix!r}; allowed are {', '.join(_OPENERS)}"
            )
        _check_file(self.path)
        self.aliases, self.unread, self.metadata = {}, {}, {}
        opener(self, key)

    @property
    def weights(self):
        """The entries that are weights, at least one."""
        found = [entry for entry in self.entries if entry.is_weight]
        if not found:
            raise CheckpointError(
                f"{self.path}: no weight (floating point, two or more dimensions) among its {len(self.entries)} tensors"
            )
        return found

    def read(self, entries=None):
        """Yields (entry, tensor on the CPU) for all entries or for these, in order."""
        for entry in self.entries if entries is None else entries:
            yield entry, self.tensor(entry.name)

    def tensor(self, name):
        return self._get(name)


def _check_file(path):
    try:
        if path.is_dir():
            raise CheckpointError(f"{path}: is a directory; a checkpoint is one {', '.join(_OPENERS)} file")
        with open_regular(path) as file:
            if not file.read(1):
                raise CheckpointError(f"{path}: is empty")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def _open_safetensors(checkpoint, key):
    from safetensors import SafetensorError, safe_open

    path = checkpoint.path
    refuse_key(path, key)
    try:
        file = safe_open(path, framework="pt")
        checkpoint.entries = [_safetensors_entry(file, name) for name in sorted(file.keys(), key=natural)]
        checkpoint._get, metadata = file.get_tensor, sorted((file.metadata() or {}).items())
        checkpoint.metadata = dict(pair for pair in metadata if pair != ("format", "pt"))
    except (SafetensorError, OSError) as error:
        reason = f"is truncated, corrupt or not a safetensors file ({_first_line(error)})"
        raise CheckpointError(f"{path}: {reason}") from error


def refuse_key(path, key):
    if key is not None:
        raise CheckpointError(f"{path}: has no entry {key!r}; only .pt and .pth files hold several state dicts")


def _safetensors_entry(file, name):
    stored = file.get_slice(name)
    shape = tuple(stored.get_shape())
    return Entry(name, shape, (stored[:0] if shape else file.get_tensor(name)).dtype)


def natural(name):
    """Sorts layers.2 before layers.10."""
    parts = re.split(r"(\d+)", name)
    return [(len(part.lstrip("0")), part.lstrip("0")) if part.isdecimal() else (-1, part) for part in parts]


def _open_torch(checkpoint, key):
    path = checkpoint.path
    found, checkpoint.unread = _state_dict(path, _load_torch(path), key)
    tensors = {str(name): value.detach() for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors; {_EXPECTED}")
    for name, tensor in tensors.items():
        if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = f"{type(tensor).__name__} ({tensor.layout}, {tensor.device})"
            raise CheckpointError(f"{path}: {name} is a {kind}; only dense tensors with data are supported")
    checkpoint.entries = [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    checkpoint._get, checkpoint.aliases = tensors.get, same_tensors(tensors)
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors.values())}
    reason = too_repeated((e for e in checkpoint.entries if e.name not in checkpoint.aliases), sum(storages.values()))
    if reason:
        raise CheckpointError(f"{path}: {reason}")


def too_repeated(entries, held):
    """Why a file that holds so many bytes may not make tensors like these of them, or None."""
    sizes = {entry.name: math.prod(entry.shape) * entry.dtype.itemsize for entry in entries}
    total = sum(sizes.values())
    if total <= max(MOST_TIMES * held, ALWAYS_READ):
        return None
    name = max(sizes, key=sizes.get)
    return (
        f"its tensors would take {total:,} bytes (the largest, {name}, {sizes[name]:,}) but share {held:,}; "
        f"allowed are {MOST_TIMES} times as many, or {ALWAYS_READ:,}"
    )


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
        f"holds a pickled object ({unsafe[1]}), refused because loading it can run code; "
        "save the model's state_dict() instead"
    )


def _state_dict(path, loaded, key=None):
    """(the mapping of names to tensors in what was loaded, which may be nested; name -> tensors of what is beside)."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}; {_EXPECTED}")
    chosen, unread = [], {}

    def enter(name):
        nonlocal loaded
        for other, value in loaded.items():
            if other != name:
                unread[".".join([*chosen, str(other)])] = _tensors_in(value)
        chosen.append(name)
        loaded = loaded[name]

    while key:
        name = _entry_of(loaded, key)
        if name is None or not isinstance(loaded[name], Mapping):
            held = [".".join([*chosen, str(n)]) for n, v in loaded.items() if isinstance(v, Mapping) and _tensors_in(v)]
            reason = f"allowed are {', '.join(held)}" if held else "it holds none but the one that is read without"
            raise CheckpointError(f"{path}: has no state dict {'.'.join([*chosen, key])!r}; {reason}")
        enter(name)
        key = key[len(name) + 1 :]
    for _ in NESTED:
        name = next((name for name in NESTED if isinstance(loaded.get(name), Mapping)), None)
        if name:
            enter(name)
    for name, value in loaded.items():
        if not isinstance(value, Tensor):
            unread[".".join([*chosen, str(name)])] = _tensors_in(value)
    return loaded, {name: count for name, count in unread.items() if count}


def _entry_of(mapping, key):
    """The longest name in the mapping that is the key, or that the key goes on from after a dot."""
    names = [name for name in mapping if isinstance(name, str) and (key == name or key.startswith(f"{name}."))]
    return max(names, key=len, default=None)


def _tensors_in(value, above=()):
    """How many tensors there are in a value, in mappings and lists too; each once where it holds itself."""
    if isinstance(value, Tensor):
        return 1
    if not isinstance(value, (Mapping, list, tuple)) or id(value) in above:
        return 0
    inner = value.values() if isinstance(value, Mapping) else value
    return sum(_tensors_in(one, (*above, id(value))) for one in inner)


def _first_line(error):
    """A library's error, without the advice that follows it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].split('. ')[0]}" if lines else type(error).__name__


_OPENERS = {".safetensors": _open_safetensors, ".pt": _open_torch, ".pth": _open_torch}
