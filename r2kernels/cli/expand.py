"""Palettized and quantized files to dense checkpoints: the work of `r2kernels expand`."""

import math
import mmap
import tempfile
import warnings

import torch

from ..files import container
from ..files.format import Planned
from ..files.paths import replacing
from ..files.saving import by_alignment

SUFFIXES = (".safetensors", ".pt", ".pth")


def expand(file, path, *, overwrite=False, advance=lambda nbytes: None):
    """Writes the dense checkpoint of a `Palettized` file, .safetensors or torch's. Bytes of all its tensors.

    A torch file has no place for the user's metadata, of which a warning is given.
    """
    entries = file.entries if path.suffix.lower() == ".safetensors" else file.own
    planned = by_alignment([Planned(*entry) for entry in entries])
    size = sum(p.nbytes for p in planned)
    with replacing(path, overwrite) as out:
        if path.suffix.lower() == ".safetensors":
            write_dense(file, planned, out, size, advance)
        else:
            _expand_torch(file, planned, out, path.parent, advance)
    return size


def write_dense(file, planned, out, size, advance):
    """Writes those tensors of a `Palettized` file, of `size` bytes together, as a safetensors file."""
    metadata = {"format": "pt"} | file.metadata
    entries = {p.name: container.entry(p.dtype, p.shape, size, size) for p in planned}
    writer = container.Writer(out, len(container.header(entries, metadata)))
    for p in planned:
        w = file.tensor(p.name)
        writer.add(p.name, w)
        advance(w.nbytes)
    writer.finish(metadata)


def _expand_torch(file, planned, out, folder, advance):
    """torch.save takes all tensors at once: they lie in an unnamed file that is mapped into memory."""
    if file.metadata:
        warnings.warn(f"metadata is not in a torch file: {', '.join(file.metadata)}", stacklevel=3)
    with tempfile.TemporaryFile(dir=folder) as spool:
        places = {}
        for p in planned:
            places[p.name] = p, spool.tell()
            w = file.tensor(p.name)
            spool.write(container.as_bytes(w))
            advance(w.nbytes)
        spool.flush()
        mapped = mmap.mmap(spool.fileno(), 0) if spool.tell() else b""
        tensors = {name: _mapped(mapped, *place) for name, place in places.items()}
        state = {entry.name: tensors[file.aliases.get(entry.name, entry.name)] for entry in file.entries}
        try:
            torch.save(state, out)
        except RuntimeError as error:  # torch's own, of its archive, hides a full disk or Ctrl-C
            raise (error.__context__ or error) from None


def _mapped(memory, planned, at):
    """The tensor whose bytes lie at a place of the memory."""
    numel = math.prod(planned.shape)
    if not numel:
        return torch.empty(planned.shape, dtype=planned.dtype, device="cpu")
    return torch.frombuffer(memory, dtype=planned.dtype, count=numel, offset=at).reshape(planned.shape)
