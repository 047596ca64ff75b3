"""The paper's tables in shape, from the results of many jobs, beside the paper's own figures."""

import json
import statistics
from pathlib import Path

from training import LOSSES, METHODS, NONE

PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())
TABLES = {
    "Full precision (table 1)": ("fp32",),
    "Weights and activations quantized, trained on (table 1)": tuple(
        name for name in METHODS if name.split()[0] in ("PACT", "LSQ", "EWGS")
    ),
    "DKM, scalars (table 3)": tuple(name for name in METHODS if name.endswith("1-dim")),
    "DKM, vectors (table 4)": tuple(name for name in METHODS if name.endswith(("2-dim", "4-dim"))),
    "Post-training quantization, weights of 2 bits by their extremes, activations of 8": ("PTQ W2A8",),
}
RANGES = ("range", "range/std")


def values(jobs, network, loss, what):
    """What all seeds found."""
    return [
        job["found"][what] for job in jobs if (job["network"], job["loss"]) == (network, loss) and what in job["found"]
    ]


def spread(found):
    return statistics.stdev(found) if len(found) > 1 else 0.0


def _accuracy(jobs, network, loss, method):
    found = [100 * v for v in values(jobs, network, loss, method)]
    paper = PAPER.get(method, {}).get(network, {}).get(loss)
    beside = f" ({paper:.2f})" if paper is not None else ""
    return f"{statistics.fmean(found):.1f} ± {spread(found):.1f}{beside}" if found else f"-{beside}"


def _range(jobs, network, loss, what):
    found = values(jobs, network, loss, what)
    return f"{statistics.fmean(found):.2f} ± {spread(found):.2f}" if found else "-"


def tables(jobs):
    """(title, header, rows) of each table that has a figure."""
    networks = list(dict.fromkeys(job["network"] for job in jobs))
    losses = [loss for loss in LOSSES if any(job["loss"] == loss for job in jobs)]
    for title, methods in TABLES.items():
        shown = [method for method in methods if any(method in job["found"] for job in jobs)]
        for network in networks if shown else ():
            yield (
                f"{title}: {network}",
                ("trained with", *shown),
                [(loss, *(_accuracy(jobs, network, loss, m) for m in shown)) for loss in losses],
            )
    columns = [(network, what) for network in networks for what in RANGES]
    rows = [(loss, *(_range(jobs, *column[:1], loss, column[1]) for column in columns)) for loss in losses]
    yield (
        "Range (max - min) of the weights, mean over the layers (table 6)",
        ("trained with", *(f"{network}, {what}" for network, what in columns)),
        rows,
    )


def helps(jobs):
    """(lines on where a range loss gained more than the spreads of both, lines on where the best of them did not)."""
    gained, not_gained = [], []
    for method in ("fp32", *METHODS):
        for network in dict.fromkeys(job["network"] for job in jobs):
            plain = values(jobs, network, NONE, method)
            best = max(
                (
                    (statistics.fmean(found), loss, found)
                    for loss in list(LOSSES)[1:4]
                    if (found := values(jobs, network, loss, method))
                ),
                default=None,
            )
            if not plain or best is None:
                continue
            gain, noise = (
                100 * (best[0] - statistics.fmean(plain)),
                100 * (spread(plain) ** 2 + spread(best[2]) ** 2) ** 0.5,
            )
            line = f"{method}, {network}: best is {best[1]}, {gain:+.1f} points (spread of the difference {noise:.1f})"
            (gained if gain > noise and gain > 0 else not_gained).append(line)
    return gained, not_gained


def markdown(data):
    facts = [f"- {name}: {value}" for name, value in data["setting"].items()]
    parts = [
        f"# The paper's tables in shape, {data['date']}",
        "Test accuracy in %, mean ± standard deviation over the seeds; in brackets the paper's own figure on ImageNet, "
        "which is not comparable in height, only in what the range losses change.",
        "\n".join([*facts, f"- {PAPER['source']}"]),
    ]
    for title, header, rows in tables(data["jobs"]):
        lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] + ["---:"] * (len(header) - 1), *rows)]
        parts += [f"## {title}", "\n".join(lines)]
    gained, not_gained = helps(data["jobs"])
    for title, lines in (("Where a range loss helps", gained), ("Where none does, beyond the spread", not_gained)):
        parts += [f"## {title}", "\n".join(f"- {line}" for line in lines) or "nowhere"]
    return "\n\n".join(parts) + "\n"
