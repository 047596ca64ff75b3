"""What data is worth to clustering after training, on small networks for digits: those of `r2kernels demo`.

python benchmarks/digits.py          # writes benchmarks/results/digits-MACHINE-DATE.{json,md}

MobileNet-V1's blocks trained on 1,200 of scikit-learn's digits with several seeds; k-means of all conv and linear
weights without training; batch norms re-estimated after it, for all alike. Importances are the Fisher diagonal of the
training images, one image a batch. Allocation may spend what plain k-means with one table a weight spends.
"""

import argparse
import statistics
import sys
from pathlib import Path

import report
import torch
from torch.nn.functional import cross_entropy

import r2kernels as r2
from r2kernels.cli import demo
from r2kernels.nn import reestimate_batchnorm

SEEDS, EPOCHS, FISHER = 5, 40, 256
BITS = 3, 2
WAYS = ("plain", "weighted", "allocated without data", "allocated")


def trained(seed, images, labels):
    """(model, training images and labels, test images and labels)"""
    model, _, split = demo.train(demo.CASES[0], seed, EPOCHS, images, labels, lambda steps: None)
    return model.eval(), *[(images[some], labels[some]) for some in split]


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def accuracy(model, data):
    return (model.eval()(data[0]).argmax(1) == data[1]).double().mean().item()


def ways(model, bits, importance):
    """way -> options of the Palettizer."""
    plain = {"lut_dtype": "fp16"}
    palettizer = r2.Palettizer(model, bits, **plain)
    budget = 8 * _stored(palettizer) / sum(layer.weight().numel() for layer in palettizer.layers)
    palettizer.remove(bake=False)
    return {
        "plain": plain,
        "weighted": {**plain, "weight": importance},
        "allocated without data": {"overrides": r2.allocate(model, budget)},
        "allocated": {"overrides": r2.allocate(model, budget, weight=importance), "weight": importance},
    }


def _stored(palettizer):
    return sum(size.packed for size in palettizer.sizes().values())


def judged(model, bits, options, train, test):
    """(bits per weight, accuracy on the hard weights)"""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    palettizer = r2.Palettizer(model, bits, **options)
    stored = 8 * _stored(palettizer) / sum(layer.weight().numel() for layer in palettizer.layers)
    palettizer.remove()
    reestimate_batchnorm(model, train[0].split(120))
    found = accuracy(model, test)
    model.load_state_dict(state)
    return stored, found


@torch.no_grad()
def ranks(model, importance, train, bits):
    """[(layer, predicted rise of the loss, its rise)] with one layer clustered at a time."""
    before, rows = loss(model, train).item(), []
    for name, h in importance.items():
        only = r2.Palettizer(model, bits, exclude=lambda other, p, name=name: other != name, lut_dtype="fp16")
        clustered = only.clustered()[name].decoded()
        only.remove(bake=False)
        w = model.get_parameter(name)
        kept = w.clone()
        predicted = 0.5 * (h * (clustered - w).square()).sum().item()
        w.copy_(clustered)
        rows.append((name, predicted, loss(model, train).item() - before))
        w.copy_(kept)
    return rows


def spearman(pairs):
    """Correlation of ranks."""
    a, b = (torch.tensor(column).argsort().argsort().double() for column in zip(*pairs, strict=True))
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def measure():
    images, labels = demo.load_images(torch.device("cpu"))
    for seed in range(SEEDS):
        model, train, test = trained(seed, images, labels)
        singles = [(train[0][i : i + 1], train[1][i : i + 1]) for i in range(FISHER)]
        importances = {
            "fisher of the loss": r2.sensitivity(model, singles, loss=loss),
            "fisher of the outputs": r2.sensitivity(model, singles),
        }
        row = {"seed": seed, "full": accuracy(model, test), "clustered": {}, "rank": {}}
        for kind, importance in importances.items():
            for bits in BITS:
                found = ranks(model, importance, train, bits)
                row["rank"][f"{kind}, {bits} bits"] = spearman([pair[1:] for pair in found])
        for bits in BITS:
            for way, options in ways(model, bits, importances["fisher of the loss"]).items():
                row["clustered"][f"{way}, {bits} bits"] = judged(model, bits, options, train, test)
        print(row, flush=True)
        yield row


def markdown(data):
    rows = data["rows"]
    lines = ["| how | bits per weight | accuracy, mean | lowest |", "| --- | ---: | ---: | ---: |"]
    full = [row["full"] for row in rows]
    lines.append(f"| full precision | 32 | {statistics.fmean(full):.3f} | {min(full):.3f} |")
    for key in rows[0]["clustered"]:
        stored, found = zip(*[row["clustered"][key] for row in rows], strict=True)
        lines.append(f"| {key} | {statistics.fmean(stored):.2f} | {statistics.fmean(found):.3f} | {min(found):.3f} |")
    lines += ["", "Spearman's correlation of the predicted and the measured rise of the loss, one layer at a time:", ""]
    for key in rows[0]["rank"]:
        found = [row["rank"][key] for row in rows]
        lines.append(f"- {key}: mean {statistics.fmean(found):.2f}, lowest {min(found):.2f}")
    return (
        f"# Clustering digits networks with and without data, {data['date']}\n\n{report.machine(data)}"
        f"- {SEEDS} seeds\n\n" + "\n".join(lines) + "\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = report.header("cpu")
    data["rows"] = list(measure())
    report.write(data, args.results / f"digits-{report.file_stem(data)}", sys.modules[__name__])


if __name__ == "__main__":
    main()
