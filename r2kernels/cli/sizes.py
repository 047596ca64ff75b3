"""What a checkpoint would take at 4, 2 and 1 bits: the paper's Table 2 for any model."""

import fnmatch

from ..files.checkpoint import CheckpointError
from ..files.clustered import Form
from ..files.saving import smallest
from .compress import cluster, too_small
from .console import count, table
from .report import unread_lines
from .results import size_text

BITS = (4, 2, 1)
KINDS = ("packed", "huffman", "entropy")
SCOPES = {"without_ends": "all but first and last", "all": "all"}


def measure(checkpoint, *, ends=(), advance=lambda elements: None):
    """Bytes of the whole checkpoint, each weight clustered by k-means.

    Gives {"dense": bytes, "ends": names, bits: {scope: {kind: bytes}}}. Tables are counted; what is no weight stays as
    it is. `entropy` is a bound: every code as long as its own entropy. ends: patterns of the first and last layers'
    names; by default the first and the last weight. Calls `advance` with the number of elements of weights done.
    """
    weights = [entry for entry in checkpoint.weights if entry.name not in checkpoint.aliases]
    outer = _ends(checkpoint, [entry.name for entry in weights], ends)
    inner = {entry.name for entry in weights} - {*outer}
    stored = [entry for entry in checkpoint.entries if entry.name not in checkpoint.aliases]
    dense = sum(entry.nbytes for entry in stored)
    found = {bits: {scope: dict.fromkeys(KINDS, dense) for scope in SCOPES} for bits in BITS}
    for entry, w in checkpoint.read(weights):
        for bits in BITS:
            saved = _saved(w, Form(bits))
            for scope in SCOPES if entry.name in inner else ("all",):
                for kind, less in saved.items():
                    found[bits][scope][kind] -= less
        advance(entry.numel)
    return {"dense": dense, "ends": outer, **found}


def _ends(checkpoint, names, patterns):
    """The names that are first and last layers."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            weights = count(len(names), "weight")
            raise CheckpointError(f"{checkpoint.path}: --ends {pattern} matches none of its {weights}")
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    return chosen or list(dict.fromkeys((names[0], names[-1])))


def _saved(w, form):
    """Bytes less than dense, of every kind; none for a weight that stays as it is."""
    clustered = None if too_small(w.shape, form) else cluster(w, form)
    if clustered is None:
        return dict.fromkeys(KINDS, 0)
    packed, coded = (
        sum(part.nbytes for part in smallest(clustered, entropy)[1].values()) for entropy in (None, "huffman")
    )
    return {"packed": w.nbytes - packed, "huffman": w.nbytes - coded, "entropy": w.nbytes - clustered.size().coded}


def size_table(sizes):
    rows = [("dense", "none", *[size_text(sizes["dense"])] * len(KINDS))]
    for bits in BITS:
        for scope in SCOPES:
            rows.append((str(bits), SCOPES[scope], *[size_text(sizes[bits][scope][kind]) for kind in KINDS]))
    return table(("bits", "clustered", "packed", "Huffman", "entropy bound"), rows, left=2)


def size_lines(checkpoint, sizes):
    weights = {entry.name for entry in checkpoint.weights}
    others = sum(e.nbytes for e in checkpoint.entries if e.name not in weights)
    return [
        f"first and last: {', '.join(sizes['ends'])}",
        f"{size_text(others)} that are no weights are counted everywhere, and all look-up tables",
        *unread_lines(checkpoint.unread),
    ]
