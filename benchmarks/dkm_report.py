"""DKM's results as JSON, Markdown and a figure; its table in README.md.

python benchmarks/dkm_report.py benchmarks/results/dkm-NAME.json [MORE.json] [--readme]
"""

import sys

import report
from report import header, load, number  # noqa: F401

BEGIN, END = "<!-- dkm:begin -->", "<!-- dkm:end -->"
SCALAR = "forward + backward, T = 5, scalars, euclidean"
STEP = "Palettizer's step, T = 5, scalars, euclidean"
HEADLINE, WIDE, LARGE = "2,400,000, K = 16", "150,000, K = 256", "11,678,912, K = 16"

# (table, case, what, limit): `over X` at least, the others at most
TARGETS = (
    (SCALAR, HEADLINE, "over eager", 60),
    (SCALAR, HEADLINE, "over torch.compile", 10),
    (SCALAR, HEADLINE, "over coremltools", 100),
    (SCALAR, WIDE, "over eager", 500),
    (SCALAR, HEADLINE, "saved bytes per weight", 4.01),
    (SCALAR, "2,400,000, K = 2..256", "slowest over quickest K", 2),
    ("k-means, scalars, euclidean", LARGE, "seconds", 2),
    (STEP, "ResNet-18, K = 4", "over coremltools", 50),
    (STEP, "ResNet-18, K = 4", "copies of the weights", 3),
)
ABOUT = """- times: medians over rounds in which every contender of a case takes its turn; ratios: medians of the rounds' ratios
- *eager*: `r2kernels.reference` under autograd; *checkpointing*: the same, each iteration under `torch.utils.checkpoint`;
  *coremltools*: its `FakePalettize`, which has the squared metric alone
- *saved*: bytes that the forward keeps for the backward, per weight, W included; *extra*: the most memory of torch's allocator during a call beyond
  W_hat and dL/dW, per weight
- *Palettizer's step*: forward and backward of all palettized weights of a model in training, on hooks; *coremltools* clusters the same layers one by one;
  *copies*: the most memory of torch's allocator during a step, W_hat and dL/dW included, in copies of the weights
- *error*: RMS error of W_hat and of dL/dW against float64, relative to the RMS of W and of dL/dW, on 40,000 weights; ours are timed only within
  twice eager's plus one ulp
- weights are normal with sigma 0.05, centroids start from `kmeans` of a part, tau is a quarter of the mean distance of centroids (its square for the
  squared metric)"""
COLUMNS = (
    "weights, clusters",
    "contender",
    "ms",
    "IQR",
    "rounds",
    "ns per weight",
    "ours is faster by",
    "saved B/weight",
    "extra B/weight",
    "copies",
    "error of Ŵ",
    "error of dW",
)
PEERS = ("eager", "torch.compile", "checkpointing", "coremltools")


def file_stem(data):
    return "dkm-" + report.file_stem(data)


def markdown(data):
    lines = [
        ("machine", data["machine"]),
        ("versions", data["versions"]),
        ("backends", {k: v or "usable" for k, v in data["backends"].items()}),
    ]
    facts = [f"- {name}: " + ", ".join(f"{k} {v}" for k, v in items.items()) for name, items in lines] + [
        f"- threads: {data['threads']}",
        report._busy(data),
    ]
    parts = [
        f"# DKM on {data['machine']['device']}, {data['date']}",
        "\n".join(facts) + "\n" + ABOUT,
        "## Targets",
        targets(data),
    ]
    for table in dict.fromkeys(row["table"] for row in data["rows"]):
        parts += [f"## {table}", _table([row for row in data["rows"] if row["table"] == table and "absent" not in row])]
    absent = [
        f"- **{row['contender']}**, {row['table']}, {row['case']}: {row['absent']}"
        for row in data["rows"]
        if "absent" in row
    ]
    return "\n\n".join([*parts, "## Absent rows", "\n".join(absent) or "none"]) + "\n"


def _table(rows):
    lines = [COLUMNS, ["---"] * 2 + ["---:"] * 10]
    for row in rows:
        name = f"**{row['contender']}**" if row["default"] else row["contender"]
        faster = "" if row["default"] else number(row["faster"][1]) + "x"
        error = [f"{e:.1e}" for e in row["errors"]] if "errors" in row else ["", ""]
        numbers = (
            [row["median_ms"], row["iqr_ms"]],
            row["ns_per_weight"],
            [row.get("saved_per_weight"), row.get("extra_per_weight"), row.get("copies")],
        )
        lines.append(
            [
                row["case"],
                name,
                *map(number, numbers[0]),
                str(row["rounds"]),
                number(numbers[1]),
                faster,
                *map(number, numbers[2]),
                *error,
            ]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def find(data, table, case, contender=None):
    rows = (row for row in data["rows"] if (row["table"], row["case"]) == (table, case) and "absent" not in row)
    return next((row for row in rows if (row["contender"] == contender if contender else row["default"])), None)


def value_of(data, table, case, what):
    """The number that a target is about, or None."""
    if what == "slowest over quickest K":
        found = [row for k in (2, 4, 16, 64, 256) if (row := find(data, table, f"2,400,000, K = {k}"))]
        return (
            max(row["median_ms"] for row in found) / min(row["median_ms"] for row in found) if len(found) == 5 else None
        )
    row = find(data, table, case, what.removeprefix("over ") if what.startswith("over ") else None)
    if row is None:
        return None
    if what in (measured := {"saved bytes per weight": "saved_per_weight", "copies of the weights": "copies"}):
        return row.get(measured[what])
    return row["median_ms"] / 1e3 if what == "seconds" else row["faster"] and row["faster"][1]


def targets(data, plain=False):
    lines = [] if plain else ["| work | target | measured | |", "|---|---|---:|---|"]
    for table, case, what, limit in TARGETS:
        measured, least = value_of(data, table, case, what), what.startswith("over ")
        reached = measured is not None and (measured >= limit if least else measured <= limit)
        verdict = "not measured" if measured is None else "reached" if reached else "**missed**"
        cells = f"{table}: {case}", f"{'≥' if least else '≤'} {limit:g} {what}", number(measured), verdict
        lines.append(
            "{:66} {:30} {:>8}  {}".format(*cells).replace("**", "") if plain else "| " + " | ".join(cells) + " |"
        )
    return "\n".join([*lines, "", report._busy(data)[2:].replace("**", "")] if plain else lines)


def plot(data, path):
    """Nanoseconds per weight against K: ours does not grow."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"matplotlib is not installed: {path.name} is not drawn")
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()
    shown = [
        row["table"]
        for row in data["rows"]
        if row["table"].startswith("forward") and "bfloat16" not in row["table"] and "scalars" in row["table"]
    ]
    tables = list(dict.fromkeys(shown))
    for i, table in enumerate(tables):
        rows = [
            row
            for row in data["rows"]
            if row["table"] == table and "absent" not in row and row["weights"] != "ResNet-18"
        ]
        for name, marker in zip(dict.fromkeys(row["contender"] for row in rows), "osD^vP", strict=False):
            best = {
                row["clusters"]: row["ns_per_weight"]
                for row in sorted(rows, key=lambda row: -row["ns_per_weight"])
                if row["contender"] == name
            }
            points = sorted(best.items())
            ours = name in ("cpu", "cuda", "triton")
            label = f"{'r2kernels, ' if ours else ''}{name}, {table.rpartition(', ')[2]}"
            ax.plot(
                *zip(*points, strict=True),
                marker=marker,
                color=f"C{i}",
                linestyle="-" if ours else ":",
                linewidth=2 if ours else 1,
                label=label,
            )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("clusters K")
    ax.set_ylabel("ns per weight, forward + backward of 5 iterations")
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False)
    ax.set_title(
        f"DKM, scalars, on {data['machine']['device']} ({data['threads']} threads), torch {data['versions']['torch']}, {data['date']}",
        fontsize=9,
    )
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=150)
    part.replace(path)


def readme_tables(found):
    parts = []
    for data in found:
        lines = [
            f"| work | weights, K | r2kernels | {' | '.join(PEERS)} | saved, ours / eager |",
            "|---|---|---:|---:|---:|---:|---:|---:|",
        ]
        for row in data["rows"]:
            if not row.get("default") or "absent" in row:
                continue
            beside = {
                r["contender"]: r
                for r in data["rows"]
                if (r["table"], r["case"]) == (row["table"], row["case"]) and "absent" not in r
            }
            cells = [
                f"{number(r['median_ms'])} ms ({number(r['faster'][1])}x)" if (r := beside.get(name)) else ""
                for name in PEERS
            ]
            saved = " / ".join(
                number(r["saved_per_weight"])
                for name in (row["contender"], "eager")
                if (r := beside.get(name)) and "saved_per_weight" in r
            )
            work = row["table"].replace("forward + backward, T = 5, ", "")
            lines.append(
                "| "
                + " | ".join([work, row["case"], number(row["median_ms"]) + " ms", *cells, saved and saved + " B"])
                + " |"
            )
        machine, version = data["machine"], data["versions"]
        where = f"{machine['device']}" + (
            f", {machine['cores']} cores, {data['threads']} threads" if data["kind"] == "cpu" else ""
        )
        parts.append(
            f"Forward and backward through T = 5 iterations, float32 unless it says otherwise, on {where}; torch {version['torch']}; {data['date']}. "
            "Medians; in brackets how many times faster r2kernels was in the same rounds; saved: bytes kept for the backward per weight. "
            f"Full tables in `benchmarks/results/{file_stem(data)}.md`.\n\n" + "\n".join(lines)
        )
    return "\n\n".join(parts)


if __name__ == "__main__":
    report.run(sys.modules[__name__], "Markdown and a figure from DKM's benchmark results.")
