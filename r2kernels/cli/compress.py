"""Checkpoints to palettized or quantized files and back: the work of `r2kernels compress`, `quantize` and `expand`.

Tensor by tensor: no more than one is in memory at a time.
"""

import fnmatch
import functools
import math
import mmap
import tempfile
import warnings
from typing import NamedTuple

import torch

from ..files import container
from ..files.checkpoint import CheckpointError
from ..files.clustered import Form
from ..files.format import Planned
from ..files.paths import replacing
from ..files.saving import by_alignment, saving
from ..nn.clipping import coded
from ..nn.clustering import clustered_weight, few_rows, lost
from .console import count, number, table
from .report import PANELS, figure, histogram, unread_lines

PART = 2**15  # elements of a weight whose error is summed at once: they stay in the cache, on one thread
SUFFIXES = (".safetensors", ".pt", ".pth")
FEW_ROWS, NOT_FINITE, SKIPPED = "fewer rows than centroids", "not finite", "skipped"
QUANTIZED = "of layers that are quantized already"


class Row(NamedTuple):
    """A clustered or quantized weight.

    Bytes: in the checkpoint (`dense`), in the file (`stored`), and there were each code as long as its entropy
    (`bound`).
    """

    name: str
    shape: tuple
    dtype: str
    numel: int
    error: float  # ||W - W_hat|| / ||W||
    snr: float  # the same in dB
    dense: int
    stored: int
    bound: int
    energies: tuple  # ||W||^2, ||W - W_hat||^2
    panel: tuple | None  # (low, high), counts of W and of W_hat in equal bins


class Result(NamedTuple):
    """A checkpoint that was written with its weights as codes."""

    rows: list
    kept: dict  # name -> why a weight stays dense
    unread: dict  # name -> tensors of what is beside the state dict
    others: int  # tensors that are no weights
    dense: int  # bytes of all tensors
    stored: int


def cluster(w, form, preserve_zeros=False, name="a weight"):
    """A weight clustered by k-means, or None where it is not finite. Warns of values and zeros that it loses."""
    centroids, clustered = clustered_weight(w, form, preserve_zeros)
    for text in lost(w, form, centroids, preserve_zeros) if clustered else ():
        warnings.warn(f"{name}: {text}", stacklevel=2)
    return clustered


def plan(checkpoint, form, skip=(), verb="cluster"):
    """(a `Planned` for every tensor of the checkpoint, name -> why a weight stays dense).

    CheckpointError where nothing is left to `verb`.
    """
    planned, kept, used = [], {}, set()
    weights, quantized = {entry.name for entry in checkpoint.weights}, checkpoint.quantized
    for entry in checkpoint.entries:
        matching = {
            pattern
            for pattern in skip
            if any(fnmatch.fnmatchcase(part, pattern) for part in (entry.name, entry.name.rpartition(".")[0]))
        }
        used |= matching
        if entry.name in checkpoint.aliases:
            continue
        reason = QUANTIZED if entry.name in quantized else None
        if entry.name in weights:
            reason = SKIPPED if matching else too_small(entry.shape, form)
        if reason:
            kept[entry.name] = reason
        coded_as = form if entry.name in weights and not reason else None
        planned.append(Planned(entry.name, entry.shape, entry.dtype, coded_as))
    for pattern in skip:
        if pattern not in used:
            raise CheckpointError(
                f"{checkpoint.path}: --skip {pattern} matches none of its {len(checkpoint.entries)} tensors"
            )
    if not any(p.form for p in planned):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in kept.items())
        raise CheckpointError(f"{checkpoint.path}: no weight is left to {verb} ({reasons})")
    return planned, kept


def too_small(shape, form):
    """Why a weight of this shape cannot be clustered, or None."""
    return FEW_ROWS if isinstance(form, Form) and few_rows(shape, form) is not None else None


def compress(checkpoint, path, form, *, preserve_zeros=False, **options):
    """Writes the palettized file of a checkpoint, its weights clustered by k-means. options: as in `write`."""
    encode = functools.partial(cluster, preserve_zeros=preserve_zeros)
    return write(checkpoint, path, form, encode, "cluster", **options)


def quantize(checkpoint, path, form, *, method="mse", symmetric=True, **options):
    """The same with its weights on uniform levels, whose steps and zero points are found by `method`."""

    def encode(w, form, name):
        return coded(w, form, method=method, symmetric=symmetric)

    return write(checkpoint, path, form, encode, "quantize", **options)


def write(
    checkpoint,
    path,
    form,
    encode,
    verb,
    *,
    skip=(),
    entropy=None,
    overwrite=False,
    plot=False,
    advance=lambda elements: None,
):
    """Writes a checkpoint with its weights as encode(weight, form, name=) codes them, or dense where that is None.

    skip: patterns of names of weights or modules that stay dense. plot: rows with panels. Calls `advance` with the
    number of elements of weights done.
    """
    planned, kept = plan(checkpoint, form, skip, verb)
    rows, dense = [], [p for p in planned if p.form is None]
    weights = {entry.name for entry in checkpoint.weights}
    with saving(
        path, planned, checkpoint.aliases, entropy=entropy, overwrite=overwrite, user=checkpoint.metadata
    ) as saver:
        for p in planned:
            if p.form is None:
                continue
            w = checkpoint.tensor(p.name)
            clustered = encode(w, form, name=p.name)
            if clustered is None:
                kept[p.name] = NOT_FINITE
                dense.append(p)
            else:
                rows.append(_row(p, w, clustered, saver.add(p.name, clustered), plot))
                advance(w.numel())
        if not rows:
            raise CheckpointError(f"{checkpoint.path}: no weight is left to {verb}: all have a NaN or an infinity")
        for p in by_alignment(dense):
            saver.add(p.name, checkpoint.tensor(p.name))
            advance(math.prod(p.shape) if p.name in weights else 0)
    bytes_of_all = sum(math.prod(p.shape) * p.dtype.itemsize for p in planned)
    others = len(planned) - len(rows) - len(kept)
    return Result(rows, kept, checkpoint.unread, others, bytes_of_all, path.stat().st_size)


def _row(p, w, clustered, stored, plot):
    hat, size = clustered.decoded(), clustered.size()
    flat, near = w.reshape(-1), hat.reshape(-1)
    energies = [0.0, 0.0]
    for a, b in zip(flat.split(PART), near.split(PART), strict=True):
        a = a.double()
        energies = [energies[0] + a.square().sum().item(), energies[1] + (a - b).square().sum().item()]
    panel = None
    if plot:
        low, high = (x.item() for x in w.aminmax())
        panel = (low, high), histogram(w, low, high), histogram(hat.clamp(low, high), low, high)
    sizes, dtype = (size.dense, stored, size.coded), str(w.dtype).removeprefix("torch.")
    return Row(p.name, p.shape, dtype, w.numel(), *_error(*energies), *sizes, tuple(energies), panel)


def _error(energy, noise):
    """(relative error, signal-to-noise ratio in dB)"""
    ratio = noise / energy if energy else 0.0
    return math.sqrt(ratio), -10 * math.log10(ratio) if ratio else math.inf


def expand(file, path, *, overwrite=False, advance=lambda elements: None):
    """Writes the dense checkpoint of a `Palettized` file, .safetensors or torch's. Bytes of all its tensors.

    A torch file has no place for the user's metadata, of which a warning is given.
    """
    entries = file.entries if path.suffix.lower() == ".safetensors" else file.own
    planned = by_alignment([Planned(*entry) for entry in entries])
    size = sum(math.prod(p.shape) * p.dtype.itemsize for p in planned)
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
        writer.add(p.name, file.tensor(p.name))
        advance(math.prod(p.shape))
    writer.finish(metadata)


def _expand_torch(file, planned, out, folder, advance):
    """torch.save takes all tensors at once: they lie in an unnamed file that is mapped into memory."""
    if file.metadata:
        warnings.warn(f"metadata is not in a torch file: {', '.join(file.metadata)}", stacklevel=3)
    with tempfile.TemporaryFile(dir=folder) as spool:
        places = {}
        for p in planned:
            places[p.name] = p, spool.tell()
            spool.write(container.as_bytes(file.tensor(p.name)))
            advance(math.prod(p.shape))
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


def result_table(result):
    total = [sum(getattr(row, field) for row in result.rows) for field in ("numel", "dense", "stored", "bound")]
    error, snr = _error(*[math.fsum(row.energies[i] for row in result.rows) for i in range(2)])
    return table(
        ("weight", "shape", "dtype", "numel", "rel. error", "SNR dB", "dense", "stored", "entropy bound"),
        [
            (
                row.name,
                "x".join(map(str, row.shape)),
                row.dtype,
                f"{row.numel:,}",
                number(row.error),
                number(row.snr),
                size_text(row.dense),
                size_text(row.stored),
                size_text(row.bound),
            )
            for row in result.rows
        ],
        (
            count(len(result.rows), "weight"),
            "",
            "",
            f"{total[0]:,}",
            number(error),
            number(snr),
            *map(size_text, total[1:]),
        ),
        left=3,
    )


def result_lines(result, path):
    reasons = {}
    for name, reason in result.kept.items():
        reasons.setdefault(reason, []).append(name)
    kept = [
        f"{count(len(names), 'weight')} {reason} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for reason, names in reasons.items()
    ]
    kept += [count(result.others, "other tensor")] * (result.others > 0)
    ratio = f"{size_text(result.dense)} -> {size_text(result.stored)}, {result.dense / result.stored:.2f}x smaller"
    lines = [f"kept as they are: {'; '.join(kept)}"] * bool(kept) + unread_lines(result.unread)
    return [*lines, f"{path}: {ratio}"]


def result_json(result, checkpoint, path, form, **options):
    hidden = ("energies", "panel")
    weights = [{key: value for key, value in row._asdict().items() if key not in hidden} for row in result.rows]
    return {
        "checkpoint": str(checkpoint.path),
        "out": str(path),
        **form._asdict(),
        **options,
        "weights": weights,
        "kept": result.kept,
        "unread": result.unread,
        "others": result.others,
        "dense": result.dense,
        "stored": result.stored,
    }


def size_text(size):
    """Bytes in the largest unit of which there is one."""
    power = min(int(math.log10(max(size, 1))) // 3, 4)
    return f"{size} B" if power == 0 else f"{size / 1000**power:#.4g} {'kMGT'[power - 1]}B"


def result_figure(result, title):
    """Distributions of the weights with the lowest SNR, and over each that of W_hat: its centroids or levels."""
    drawn = sorted((row for row in result.rows if row.panel and row.panel[1]), key=lambda row: row.snr)[:PANELS]
    if len(drawn) < len(result.rows):
        title += f"\n{len(drawn)} of {len(result.rows)} weights: those with the lowest SNR"
    if not drawn:
        raise CheckpointError("all weights are constant: there is nothing to draw")
    made = figure(title, [(f"{row.name[-36:]}\nSNR {row.snr:.1f} dB", *row.panel[:2]) for row in drawn])
    for axes, row in zip(made.axes, drawn, strict=True):
        (low, high), _, near = row.panel
        edges = torch.linspace(low, high, len(near) + 1, dtype=torch.float32, device="cpu").tolist()
        axes.stairs(near, edges, color="tab:red", fill=True, alpha=0.7)
        axes.set_ylim(top=2 * max(near))
    return made
