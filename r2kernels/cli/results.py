"""What compressing a checkpoint gave: a table, lines, JSON and a figure."""

import math
from typing import NamedTuple

import torch

from ..files.checkpoint import CheckpointError
from .console import count, number, table
from .report import PANELS, figure, unread_lines


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
    bits: int  # of a code

    @classmethod
    def of(cls, fields):
        """From what `_asdict` gave, also as it comes back from JSON."""
        return cls(**{**fields, "shape": tuple(fields["shape"]), "energies": tuple(fields["energies"])})


class Result(NamedTuple):
    """A checkpoint that was written with its weights as codes."""

    rows: list
    kept: dict  # name -> why a weight stays dense
    unread: dict  # name -> tensors of what is beside the state dict
    others: int  # tensors that are no weights
    dense: int  # bytes of all tensors
    stored: int


def relative_error(energy, noise):
    """(relative error, signal-to-noise ratio in dB)"""
    ratio = noise / energy if energy else 0.0
    return math.sqrt(ratio), -10 * math.log10(ratio) if ratio else math.inf


def result_table(result):
    total = [sum(getattr(row, field) for row in result.rows) for field in ("numel", "dense", "stored", "bound")]
    error, snr = relative_error(*[math.fsum(row.energies[i] for row in result.rows) for i in range(2)])
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
