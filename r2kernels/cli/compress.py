"""Checkpoints to palettized or quantized files, or folders of them: the work of `r2kernels compress` and `quantize`.

Weights are coded part by part, by several threads, and written in one order: the bytes are the same for any number of
threads, and where the work was interrupted and gone on with.
"""

import contextlib
import fnmatch
import functools
import math
import os
import warnings
from typing import NamedTuple

from ..files.checkpoint import CheckpointError
from ..files.clustered import Form
from ..files.format import Planned
from ..files.partial import keeping
from ..files.saving import Saver, by_alignment, most_bytes
from ..nn.clipping import coded
from ..nn.clustering import clustered_weight, few_rows, lost
from . import parts, shards
from .allocation import Importance, forms_within
from .results import Result, Row, relative_error

MOST_JOBS = 8
FEW_ROWS, NOT_FINITE, SKIPPED = "fewer rows than centroids", "not finite", "skipped"
QUANTIZED = "of layers that are quantized already"


def _nothing(nbytes):
    pass


def cluster(w, form, preserve_zeros=False, weight=None, tell=lambda text: None):
    """A weight clustered by k-means, or None where it is not finite. Tells of values and zeros that it loses.

    weight: its importances, or None.
    """
    centroids, clustered = clustered_weight(w, form, preserve_zeros, weight)
    for text in lost(w, form, centroids, preserve_zeros) if clustered else ():
        tell(text)
    return clustered


def quantized(w, form, method, symmetric, tell=None):
    """A weight on uniform levels, or None where it is not finite."""
    return coded(w, form, method=method, symmetric=symmetric)


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


def compress(
    checkpoint, path, form, *, preserve_zeros=False, importance=None, budget=None, skip=(), advance=_nothing, **options
):
    """Writes the palettized file of a checkpoint, its weights clustered by k-means. options: as in `write`.

    importance: a file of what an error of each number counts. budget: bits per weight; each weight then has a form of
    its own, and `advance` is called twice for each tensor.
    """
    importance, forms = importance and Importance(importance, checkpoint), {}
    if budget is not None:
        form = Form(1)
        planned, _ = plan(checkpoint, form, skip)
        shared = {"preserve_zeros": preserve_zeros, "importance": importance}
        forms = forms_within(checkpoint, planned, budget, **shared, advance=advance)
    encode = functools.partial(cluster, preserve_zeros=preserve_zeros)
    weighted = {"forms": forms, "importance": importance, "skip": skip, "advance": advance}
    return write(checkpoint, path, form, encode, "cluster", **weighted, **options)


def quantize(checkpoint, path, form, *, method="mse", symmetric=True, **options):
    """The same with its weights on uniform levels, whose steps and zero points are found by `method`."""
    encode = functools.partial(quantized, method=method, symmetric=symmetric)
    return write(checkpoint, path, form, encode, "quantize", **options)


class Shard(NamedTuple):
    """A file that is written: with all of the checkpoint, or a shard."""

    name: str
    planned: list
    aliases: dict

    @classmethod
    def all_of(cls, planned, aliases, shard_size, entropy):
        if shard_size is None:
            return [cls("data", planned, aliases)]
        lists = shards.split(planned, shard_size, functools.partial(most_bytes, entropy=entropy))
        names = [{p.name for p in of} for of in lists]
        return [
            cls(name, of, {alias: other for alias, other in aliases.items() if other in held})
            for name, of, held in zip(shards.names(len(lists)), lists, names, strict=True)
        ]

    @property
    def files_of(self):
        """Tensor -> this file, for an index."""
        return dict.fromkeys([*[p.name for p in self.planned], *self.aliases], self.name)


def default_jobs():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores, MOST_JOBS)


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
    jobs=None,
    resume=False,
    shard_size=None,
    forms=None,
    importance=None,
    advance=_nothing,
):
    """Writes a checkpoint with its weights as encode(weight, form, tell=) codes them, or dense where that is None.

    skip: patterns of names of weights or modules that stay dense. plot: rows with panels. jobs: threads that code, by
    default one for each core up to MOST_JOBS. shard_size: `path` is a new folder with files of at most so many bytes.
    resume: goes on with what an interrupted call of the same arguments left in PATH.partial; without, that is an error,
    or replaced with `overwrite`. forms: name -> another form. importance: an `Importance`, of which `encode` is given
    the part as `weight`. Calls `advance` with the bytes of tensors done.
    """
    planned, kept = plan(checkpoint, form, skip, verb)
    forms = forms or {}
    planned = [p._replace(form=forms.get(p.name, p.form)) for p in planned]
    files = Shard.all_of(planned, checkpoint.aliases, shard_size, entropy)
    identity = {
        "checkpoint": checkpoint.identity(),
        "form": [type(form).__name__, *form],
        "forms": {name: list(own) for name, own in forms.items()},
        "importance": importance and importance.identity(),
        "options": encode.keywords,
        "skip": sorted(skip),
        "entropy": entropy,
        "plot": plot,
        "shard size": shard_size,
    }
    with keeping(path, identity, resume=resume, overwrite=overwrite) as partial:
        written = _Written(checkpoint, entropy, plot, partial, kept, advance, importance)
        written.all_of(files, encode, jobs or default_jobs())
        if not written.rows:
            raise CheckpointError(f"{checkpoint.path}: no weight is left to {verb}: all have a NaN or an infinity")
        if shard_size is None:
            partial.finish_file(files[0].name, overwrite)
            stored = path.stat().st_size
        else:
            index = {tensor: file for shard in files for tensor, file in shard.files_of.items()}
            shards.write_index(partial.folder, index, sum(p.nbytes for p in planned))
            partial.finish_folder()
            stored = sum(file.stat().st_size for file in path.iterdir())
    others = len(planned) - len(written.rows) - len(kept)
    return Result(written.rows, kept, checkpoint.unread, others, sum(p.nbytes for p in planned), stored)


class _Written:
    """What is written of a checkpoint. `rows`: of its weights; `kept` is added to."""

    def __init__(self, checkpoint, entropy, plot, partial, kept, advance, importance):
        self.checkpoint, self.entropy, self.plot, self.partial = checkpoint, entropy, plot, partial
        self.importance = importance
        self.rows, self.kept, self.advance = [], kept, advance
        self.done = {}  # name -> its last record, in the order of the data
        for record in partial.records:
            if "name" in record:
                self.done.pop(record["name"], None)
                self.done[record["name"]] = record
        self.finished = {record["finished"] for record in partial.records if "finished" in record}

    def all_of(self, files, encode, jobs):
        pieces = {
            p.name: parts.cut(p, self.plot)
            for file in files
            for p in file.planned
            if p.form and p.name not in self.done
        }
        packed = self.entropy is None

        def read(part):
            place = part.planned.name, part.begin, part.end
            return self.checkpoint.part(*place), self.importance and self.importance.of(*place)

        def work(part, found):
            w, h = found
            how = encode if h is None else functools.partial(encode, weight=h)
            return parts.code(w, part.planned.form, how, packed=packed, plot=self.plot)

        stream = parts.in_order((part for some in pieces.values() for part in some), read, work, jobs)
        with warnings.catch_warnings(), contextlib.closing(stream):
            for file in files:
                self._file(file, pieces, stream)

    def _file(self, file, pieces, stream):
        before = {name: record for name, record in self.done.items() if record["file"] == file.name}
        planned = {p.name: p for p in file.planned}
        for name, record in before.items():
            self._tell_of(name, record)
            self.advance(planned[name].nbytes if record["added"] else 0)
        if file.name in self.finished:
            return
        with self.partial.file(file.name) as opened:
            saver = Saver(opened, file.planned, file.aliases, self.entropy, self.checkpoint.metadata)
            saver.restore([record["added"] for record in before.values() if record["added"]])
            for p in file.planned:
                if p.name in pieces:
                    self._weight(file, saver, p, [next(stream) for _ in pieces[p.name]])
            for p in by_alignment([p for p in file.planned if p.form is None or p.name in self.kept]):
                if p.name not in before or not before[p.name]["added"]:
                    saver.add(p.name, self.checkpoint.part(p.name))
                    self._note(file, saver, p, **({"kept": NOT_FINITE} if p.form else {}))
            saver.finish()
        self.partial.note({"finished": file.name})

    def _weight(self, file, saver, p, coded):
        if any(part.weight is None for part in coded):
            return self._note(file, None, p, kept=NOT_FINITE)
        for text in next((part.texts for part in coded if part.texts), ()):
            warnings.warn(f"{p.name}: {text}", stacklevel=2)
        weight, counts = parts.joined(p.shape, [part.weight for part in coded]), sum(part.counts for part in coded)
        energies = tuple(math.fsum(part.energies[i] for part in coded) for i in range(2))
        size, stored = weight.size(counts), saver.add(p.name, weight)
        row = Row(
            p.name,
            p.shape,
            str(p.dtype).removeprefix("torch."),
            math.prod(p.shape),
            *relative_error(*energies),
            size.dense,
            stored,
            size.coded,
            energies,
            coded[0].panel,
            p.form.bits,
        )
        self._note(file, saver, p, row=row._asdict())

    def _note(self, file, saver, p, **more):
        added = None
        if saver:
            saver.file.flush()
            added = saver.last
            self.advance(p.nbytes)
        record = {"name": p.name, "file": file.name, "added": added, **more}
        self._tell_of(p.name, record)
        self.partial.note(record)

    def _tell_of(self, name, record):
        if "row" in record:
            self.rows.append(Row.of(record["row"]))
        if "kept" in record:
            self.kept[name] = record["kept"]
