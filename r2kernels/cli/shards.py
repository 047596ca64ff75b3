"""Folders as transformers reads them: shards of safetensors and the index that names them."""

import contextlib
import json
import os
import shutil
from pathlib import Path

from ..files.folders import INDEX
from ..files.format import Planned
from ..files.paths import beside, replacing
from ..files.saving import by_alignment
from .expand import SUFFIXES, write_dense
from .outputs import BadInput

MOST = 5 * 10**9
MODEL = "model.safetensors"
SLASHES = tuple({"/", os.sep})


def folder_path(name):
    """The path of a folder that does not exist, checked before any work is done for it."""
    path = Path(name).absolute() if Path(name).name in ("", "..") else Path(name)
    if not name.endswith(SLASHES) and path.suffix.lower() in SUFFIXES:
        raise BadInput(f"{path}: --shard-size writes a folder, not a {path.suffix} file")
    if path.exists():
        raise BadInput(f"{path}: exists already; shards are written to a new folder")
    if not path.parent.is_dir():
        raise BadInput(f"{path}: there is no directory {path.parent}")
    return path


def expand(file, path, most, *, advance=lambda nbytes: None):
    """Writes the dense checkpoint of a `Palettized` file to the new folder `path`, which appears as a whole.

    In shards of at most `most` bytes, or one larger tensor; where there is one shard alone, without an index. Gives
    the bytes of all tensors and the names of the files.
    """
    shards = split([Planned(*entry) for entry in file.entries], most, lambda p: p.nbytes)
    total, files = 0, dict(zip(names(len(shards)), shards, strict=True))
    with _new_folder(path) as folder:
        for name, shard in files.items():
            size = sum(p.nbytes for p in shard)
            with replacing(folder / name) as out:
                write_dense(file, by_alignment(shard), out, size, advance)
            total += size
        index = write_index(folder, {p.name: name for name, shard in files.items() for p in shard}, total)
    return total, [*files, *index]


def names(count):
    """Of so many shards, or of the only file."""
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)] if count > 1 else [MODEL]


def write_index(folder, weight_map, total):
    """Writes the index of tensor -> file, unless there is one file alone; the names of what was written."""
    if len({*weight_map.values()}) == 1:
        return []
    with replacing(folder / f"{MODEL}{INDEX}") as out:
        out.write(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode())
    return [f"{MODEL}{INDEX}"]


def split(planned, most, size_of):
    """Consecutive lists of tensors, of at most so many bytes each, or one larger tensor."""
    shards, size = [[]], 0
    for p in planned:
        size += size_of(p)
        if shards[-1] and size > most:
            shards.append([])
            size = size_of(p)
        shards[-1].append(p)
    return shards


@contextlib.contextmanager
def _new_folder(path):
    """A new folder that is `path` at the end of the block, or vanishes on an error."""
    temporary = beside(path)
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary)
        raise
