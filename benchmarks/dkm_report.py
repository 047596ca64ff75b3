"""DKM's results as JSON, Markdown and a figure.

python benchmarks/dkm_report.py benchmarks/results/dkm-NAME.json [MORE.json]
"""

import sys

import report
from report import header, load, number  # noqa: F401

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
ABOUT = (
    "- times: medians over rounds in which every contender of a case takes its turn; ratios: medians of the rounds' "
    "ratios\n"
    "- *eager*: `r2kernels.reference` under autograd; *checkpointing*: the same, each iteration under "
    "`torch.utils.checkpoint`;\n"
    "  *coremltools*: its `FakePalettize`, which has the squared metric alone\n"
    "- *saved*: bytes that the forward keeps for the backward, per weight, W included; *extra*: the most memory of "
    "torch's allocator during a call beyond\n"
    "  W_hat and dL/dW, per weight\n"
    "- *Palettizer's step*: forward and backward of all palettized weights of a model in training, on hooks; "
    "*coremltools* clusters the same layers one by one;\n"
    "  *copies*: the most memory of torch's allocator during a step, W_hat and dL/dW included, in copies of the "
    "weights\n"
    "- *error*: RMS error of W_hat and of dL/dW against float64, relative to the RMS of W and of dL/dW, on 40,000 "
    "weights; ours are timed only within\n"
    "  twice eager's plus one ulp\n"
    "- weights are normal with sigma 0.05, centroids start from `kmeans` of a part, tau is a quarter of the mean "
    "distance of centroids (its square for the\n"
    "  squared metric)"
)
COLUMNS = (
    *("weights, clusters", "contender", "ms", "IQR", "rounds", "ns per weight", "ours is faster by"),
    *("saved B/weight", "extra B/weight", "copies", "error of Ŵ", "error of dW"),
)


def file_stem(data):
    return "dkm-" + report.file_stem(data)


def markdown(data):
    parts = [
        f"# DKM on {data['machine']['device']}, {data['date']}",
        report.facts(data) + ABOUT,
        "## Targets",
        targets(data),
    ]
    for table in dict.fromkeys(row["table"] for row in data["rows"]):
        parts += [f"## {table}", _table(report.measured(data, table))]
    return "\n\n".join([*parts, "## Absent rows", report.absent_rows(data)]) + "\n"


def _table(rows):
    lines = [COLUMNS, ["---"] * 2 + ["---:"] * 10]
    for row in rows:
        lines.append(
            (
                row["case"],
                f"**{row['contender']}**" if row["default"] else row["contender"],
                number(row["median_ms"]),
                number(row["iqr_ms"]),
                str(row["rounds"]),
                number(row["ns_per_weight"]),
                "" if row["default"] else number(row["faster"][1]) + "x",
                *(number(row.get(key)) for key in ("saved_per_weight", "extra_per_weight", "copies")),
                *([f"{e:.1e}" for e in row["errors"]] if "errors" in row else ["", ""]),
            )
        )
    return report.table(lines)


def find(data, table, case, contender=None):
    rows = (row for row in report.measured(data, table) if row["case"] == case)
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
    checked = (
        (f"{table}: {case}", what, limit, value_of(data, table, case, what)) for table, case, what, limit in TARGETS
    )
    return report.simple_targets(data, checked, "{:66} {:30} {:>8}  {}", plain)


def plot(data, path):
    """Nanoseconds per weight against K: ours does not grow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()
    shown = [
        row["table"]
        for row in data["rows"]
        if row["table"].startswith("forward") and "bfloat16" not in row["table"] and "scalars" in row["table"]
    ]
    tables = list(dict.fromkeys(shown))
    for i, table in enumerate(tables):
        rows = [row for row in report.measured(data, table) if row["weights"] != "ResNet-18"]
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
    ax.set_title(f"DKM, scalars, {report.where(data)}", fontsize=9)
    report.save(figure, path)


if __name__ == "__main__":
    report.run(sys.modules[__name__], "Markdown and a figure from DKM's benchmark results.")
