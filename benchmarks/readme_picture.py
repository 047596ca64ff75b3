"""The picture of README.md: the weights of one layer of the demo's network, trained without and with R2.

    python benchmarks/readme_picture.py             writes benchmarks/results/readme.png and .json, in under a minute

Both trainings start from seed 0. The layer is the one with the most weights; the lines are the four values that its
weights may take at 2 bits. The JSON file has the figures that are drawn, and what they were made with.
"""

import datetime
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from report import header

from r2kernels.cli import demo

RESULTS = Path(__file__).parent / "results"
SEED, EPOCHS, BITS, BINS = 0, 40, 2, 64
CASES = (demo.CASES[0], demo.CASES[3])
COLOURS = ("#b5532f", "#2a6f97")
LEVEL = "#222222"


def trained():
    """[(case, weights of each layer, accuracy by bits)]: the first seed of the demo."""
    images, labels = demo.load_images(torch.device("cpu"))
    found = []
    for case in CASES:
        model, regularizer, split = demo.train(case, SEED, EPOCHS, images, labels, lambda steps: None)
        weights = {name: w.detach().clone() for name, w in demo.weight_matrices(model).items()}
        found.append((case, weights, demo.measure(model, regularizer, split, images, labels).accuracy))
    return found


def figure(layer, found):
    """Two histograms over one axis: 800 pixels wide at 100 dots an inch."""
    drawn = Figure(figsize=(8, 4.6), layout="constrained")
    axes = drawn.subplots(len(found), 1, sharex=True, sharey=True)
    low, high = found[0][1][layer].aminmax()
    room = 0.04 * (high - low).item()
    for ax, colour, (case, weights, accuracy) in zip(axes, COLOURS, found, strict=True):
        w = weights[layer]
        first, last = w.aminmax()
        counts = torch.histc(w, BINS, low, high)
        ax.stairs(counts, torch.linspace(low, high, BINS + 1), fill=True, color=colour)
        for level in demo.round_min_max(w, BITS).unique():
            ax.axvline(level, color=LEVEL, linewidth=1.2, linestyle=(0, (4, 3)))
        name = "without R2" if case.options is None else "with R2"
        ax.set_title(
            f"{name}: range {last - first:.2f}, std {w.std():.3f}. "
            f"Test accuracy {accuracy[32]:.1%}, with {BITS}-bit weights {accuracy[BITS]:.1%}",
            fontsize=12,
            loc="left",
        )
        ax.set_yscale("log")
        ax.set_ylim(0.7, 5e3)
        ax.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
        ax.set_xlim(low - room, high + room)
        ax.set_ylabel("weights per bin", fontsize=11)
        ax.tick_params(labelsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    count = f"{found[0][1][layer].numel():,} weights of {layer}"
    axes[-1].set_xlabel(f"{count}; dashed: the {2**BITS} values that {BITS} bits leave them", fontsize=11)
    return drawn


def main():
    found = trained()
    plain = found[0][1]
    layer = max(plain, key=lambda name: plain[name].numel())
    made = header("cpu")
    data = {
        "date": datetime.date.today().isoformat(),
        "machine": made["machine"],
        "versions": made["versions"],
        "seed": SEED,
        "epochs": EPOCHS,
        "layer": layer,
        "weights": plain[layer].numel(),
        "cases": {
            case.name: {
                "options": case.options,
                "min": weights[layer].min().item(),
                "max": weights[layer].max().item(),
                "std": weights[layer].std().item(),
                "levels": demo.round_min_max(weights[layer], BITS).unique().tolist(),
                "accuracy": accuracy,
            }
            for case, weights, accuracy in found
        },
    }
    (RESULTS / "readme.json").write_text(json.dumps(data, indent=1) + "\n")
    figure(layer, found).savefig(RESULTS / "readme.png", dpi=100)
    print(json.dumps(data["cases"], indent=1))


if __name__ == "__main__":
    main()
