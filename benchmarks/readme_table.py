"""The tables of README.md, from the files in benchmarks/results.

    python benchmarks/readme_table.py               writes them between their markers in README.md
    python benchmarks/readme_table.py --of FOLDER   prints the table of times from the results in another folder

tests/test_readme.py holds README.md to what is written here.
"""

import argparse
import json
import statistics
from pathlib import Path

from report import number, replace

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results"
CPU = "amd-epyc-2-cores-2026-11-21"
RANGE, DKM, QUANTIZERS = "", "dkm-", "quantizers-"  # what the names of their files begin with
BOTH, ONE = "forward + backward", "one tensor 11.7M"
SCALARS = "forward + backward, T = 5, scalars, euclidean"
PEERS = ("eager", "torch.compile", "coremltools")
HEAD = ("r2kernels", "eager PyTorch", "torch.compile", "coremltools")

# (what is shown, family, what its rows have in common)
ROWS = (
    ("`soft_min_max`, ResNet-18", RANGE, {"op": "soft_min_max", "table": "ResNet-18", "work": BOTH}),
    ("the same, `accumulate_grad_`", RANGE, {"op": "soft_min_max", "table": "ResNet-18", "work": "accumulate_grad_"}),
    ("one weight of 10,000", RANGE, {"op": "soft_min_max", "table": "one tensor 10k", "work": BOTH}),
    *((f"`{op}`, 4 bits", QUANTIZERS, {"table": ONE, "case": op}) for op in ("lsq", "ewgs", "pact", "msqe")),
    ("`weight_terms`, five terms", QUANTIZERS, {"table": ONE, "case": "weight_terms"}),
    ("`dkm`, 2,400,000 weights, K = 16", DKM, {"table": SCALARS, "case": "2,400,000, K = 16"}),
    ("`dkm`, 150,000 weights, K = 256", DKM, {"table": SCALARS, "case": "150,000, K = 256"}),
    (
        "`Palettizer`, ResNet-18, 2 bits",
        DKM,
        {"table": "Palettizer's step, T = 5, scalars, euclidean", "case": "ResNet-18, K = 4"},
    ),
    ("`kmeans`, 100,000 weights, K = 16", DKM, {"table": "k-means, scalars, euclidean", "case": "100,000, K = 16"}),
)
LOSSES = ("no R2", "L-infinity", "margin", "soft-min-max", "KURE", "clipping at 2.5 std")
V1, V2, RESNET = "MobileNet-V1", "MobileNet-V2", "ResNet-18"
# head of a column -> (network, what of its accuracies)
CELLS = {
    "full precision": (V1, "fp32"),
    **{what: (V1, what) for what in ("PTQ W2A8", "PACT 2 bit", "LSQ 2 bit", "EWGS 2 bit")},
    "DKM 1 bit": (V1, "DKM 1 bit, 1-dim"),
    "ResNet, W2A8": (RESNET, "PTQ W2A8"),
    "MobileNet-V2, W2A8": (V2, "PTQ W2A8"),
}


def read(name, folder=RESULTS):
    return json.loads((folder / f"{name}.json").read_text())


def measured():
    """Times of each family, those of others with how many times longer they took."""
    lines = [("call", *HEAD, "on a GPU"), ["---"] + ["---:"] * 4 + ["---"]]
    for label, family, common in ROWS:
        lines.append((label, *cells(read(family + CPU)["rows"], common), "not yet measured"))
    return table(lines)


def measured_in(folder):
    """The same of the results in a folder, whatever machine they are of; without the rows that were not reached."""
    lines = [("call", *HEAD), ["---"] + ["---:"] * 4]
    found = {path.name: read(path.stem, folder).get("rows", ()) for path in folder.glob("*.json")}
    for label, family, common in ROWS:
        rows = [row for name, rows in found.items() if family_of(name) == family for row in rows]
        if any(common.items() <= row.items() and row.get("default") for row in rows):
            lines.append((label, *cells(rows, common)))
    return table(lines)


def family_of(name):
    return next((family for family in (DKM, QUANTIZERS) if name.startswith(family)), RANGE)


def cells(rows, common):
    """A call's time by r2kernels and by its peers."""
    rows = [row for row in rows if common.items() <= row.items() and "absent" not in row]
    ours = next(row for row in rows if row["default"])
    found = [number(ours["median_ms"]) + " ms"]
    for peer in PEERS:
        row = next((row for row in rows if row["contender"] == peer), None)
        found.append(f"{number(row['median_ms'])} ms ({number(times(ours, row))}x)" if row else "")
    return found


def times(ours, row):
    """How many times longer another took: the median of the rounds' ratios, by the name each family has for it."""
    if "over_eager" in ours:
        return ours["over_eager" if row["contender"] == "eager" else "over_compile"]
    return row["faster" if "faster" in row else "slower"][1]


def accuracy():
    """What R2 is worth: test accuracy after quantization, mean ± standard deviation over the seeds."""
    jobs = read("paper")["jobs"]
    lines = [("trained with", *CELLS)]
    lines.append(["---"] + ["---:"] * len(CELLS))
    for loss in LOSSES:
        cells = []
        for network, what in CELLS.values():
            found = [100 * job["found"][what] for job in jobs if (job["network"], job["loss"]) == (network, loss)]
            cells.append(f"{statistics.fmean(found):.1f} ± {statistics.stdev(found):.1f}")
        lines.append((loss, *cells))
    return table(lines)


def table(lines):
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def insert(text, name, drawn):
    """`text` with a table between two markers."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{drawn}\n{end}{after}"


def filled(text):
    return insert(insert(text, "accuracy", accuracy()), "measured", measured())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--of", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.of:
        print(measured_in(args.of))
    else:
        replace(README, filled(README.read_text()))


if __name__ == "__main__":
    main()
