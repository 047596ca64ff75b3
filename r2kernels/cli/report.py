"""What the weights of a checkpoint look like.

The paper's Table 6 (range and std of every layer) and Figure 2 (weight distributions).
"""

import heapq
import math
from typing import NamedTuple

import torch

from ..files.checkpoint import CheckpointError
from ..functional.regularizers import weight_stats
from ..reference.columns import accumulator
from .console import count, number, table

BATCH_ELEMENTS = 2**26
HISTOGRAM_ELEMENTS = 2**24  # a float32 counter is exact up to here
BINS = 100
PANELS = 12


class LayerStats(NamedTuple):
    """One row of the report. `histogram` holds the counts of `BINS` equal bins from min to max, or None."""

    name: str
    shape: tuple
    dtype: str
    numel: int
    min: float
    max: float
    range: float
    std: float
    range_per_std: float
    kurtosis: float
    histogram: list | None


NUMBERS = ("min", "max", "range", "std", "range_per_std", "kurtosis")
MEANS = ("range", "std", "range_per_std", "kurtosis")


def layers(checkpoint, *, histograms=False, batch_elements=BATCH_ELEMENTS, advance=lambda elements: None):
    """Yields the `LayerStats` of every weight of the checkpoint, in order.

    Reads it in batches of at most `batch_elements` (or one larger tensor). Calls `advance` with the number of elements
    done.
    """
    for batch in _batches(checkpoint.read(checkpoint.weights), batch_elements):
        entries, tensors = zip(*batch, strict=True)
        stats = weight_stats(tensors)
        columns = (stats.min, stats.max, stats.std, stats.kurtosis)
        for entry, tensor, row in zip(entries, tensors, torch.stack(columns, 1).tolist(), strict=True):
            yield _layer(entry, *row, histogram(tensor, *row[:2]) if histograms else None)
        advance(sum(entry.numel for entry in entries))


def _batches(pairs, most):
    """Consecutive (entry, tensor) pairs of one dtype, of at most `most` elements together."""
    batch, size = [], 0
    for entry, tensor in pairs:
        if batch and (size + entry.numel > most or entry.dtype != batch[0][0].dtype):
            yield batch
            batch, size = [], 0
        batch.append((entry, tensor))
        size += entry.numel
    if batch:
        yield batch


def _layer(entry, low, high, std, kurtosis, counts):
    spread = high - low
    ratio = spread / std if std else 0.0
    dtype = str(entry.dtype).removeprefix("torch.")
    numbers = (low, high, spread, std, ratio, kurtosis)
    return LayerStats(entry.name, entry.shape, dtype, entry.numel, *numbers, counts)


def histogram(tensor, low, high, bins=BINS):
    """Counts of `bins` equal bins from low to high, or None where these are not finite or equal."""
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        return None
    parts = tensor.reshape(-1).split(HISTOGRAM_ELEMENTS)
    return sum(torch.histc(part.to(accumulator(tensor.dtype)), bins, low, high) for part in parts).tolist()


def means(rows):
    """The mean over the layers of every column that has one."""
    return {name: math.fsum(getattr(row, name) for row in rows) / len(rows) for name in MEANS}


def as_json(checkpoint, rows):
    """The report as plain data; a number that is not finite is None, so that it is valid JSON."""
    weights = [{name: value for name, value in row._asdict().items() if name != "histogram"} for row in rows]
    left_out = len(checkpoint.entries) - len(rows)
    found = {"checkpoint": str(checkpoint.path), "weights": weights, "mean": means(rows), "left_out": left_out}
    return finite(found | {"unread": checkpoint.unread})


def finite(data):
    """A copy of plain data with None in place of NaN and infinities."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def layer_table(rows):
    mean = means(rows)
    return table(
        ("weight", "shape", "dtype", "numel", "min", "max", "range", "std", "range/std", "kurtosis"),
        [
            (
                row.name,
                "x".join(map(str, row.shape)),
                row.dtype,
                f"{row.numel:,}",
                *(number(getattr(row, name)) for name in NUMBERS),
            )
            for row in rows
        ],
        ("mean", "", "", "", "", "", *(number(mean[name]) for name in MEANS)),
        left=3,
    )


def summary(checkpoint, rows):
    """One line: how many weights, how many tensors are not in the table and why."""
    others = len(checkpoint.entries) - len(rows)
    elements = sum(row.numel for row in rows)
    quantized = len(checkpoint.quantized)
    reasons = "not floating point, fewer than two dimensions, or empty"
    reasons += f"; {quantized} of layers that are quantized already" if quantized else ""
    return f"{count(len(rows), 'weight')}, {elements:,} elements; {count(others, 'tensor')} left out ({reasons})"


def unread_lines(unread):
    """A line that names what a checkpoint holds beside the state dict that was read, or none."""
    held = ", ".join(f"{name} ({count(tensors, 'tensor')})" for name, tensors in unread.items())
    return [f"not read: {held}; --key NAME reads another state dict"] if held else []


def extremes(rows, most=PANELS):
    """The rows to draw, in their order: of those with a histogram all, or the `most` with the largest range/std."""
    drawn = [(i, row) for i, row in enumerate(rows) if row.histogram]
    largest = heapq.nlargest(most, drawn, key=lambda pair: pair[1].range_per_std)
    return [row for _, row in sorted(largest, key=lambda pair: pair[0])]


def layer_figure(rows, title):
    """Figure 2 for a checkpoint: the distributions of its weights, or of those with the largest range/std.

    The title says which.
    """
    drawn = extremes(rows)
    if not drawn:
        raise CheckpointError(f"{title}: there is no distribution to plot, every weight is constant or not finite")
    blank = sum(row.histogram is None for row in rows)
    if len(drawn) + blank < len(rows):
        title += f"\n{len(drawn)} of {len(rows)} weights: those with the largest range/std"
    if blank:
        title += f"\n{count(blank, 'weight')} constant or not finite, left out"
    names = [f"{_end(row.name)}\nrange/std {row.range_per_std:.1f}" for row in drawn]
    return figure(title, [(name, (row.min, row.max), row.histogram) for name, row in zip(names, drawn, strict=True)])


def _end(name, most=36):
    """The last characters of a long name."""
    return name if len(name) <= most else "..." + name[3 - most :]


def figure(title, panels, columns=4):
    """A matplotlib figure, a grid of histograms.

    A panel is (title, (low, high), counts of equal bins from low to high). Counts are on a logarithmic axis, where
    outliers can be seen.
    """
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    lines = math.ceil(len(panels) / columns)
    drawn = Figure(figsize=(3.2 * columns + 0.4, 2.4 * lines + 0.8), layout="constrained")
    drawn.suptitle(title, parse_math=False)
    drawn.supylabel("weights per bin", fontsize="small")
    for i, (name, (low, high), counts) in enumerate(panels):
        axes = drawn.add_subplot(lines, columns, i + 1)
        edges = torch.linspace(low, high, len(counts) + 1, dtype=torch.float32, device="cpu").tolist()
        axes.stairs(counts, edges, fill=True)
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
        axes.set_title(name, fontsize="small", parse_math=False)
        axes.tick_params(which="both", labelsize="x-small")
        axes.locator_params(axis="x", nbins=5)
    return drawn
