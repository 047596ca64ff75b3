"""k-means' results as JSON, Markdown and a figure.

python benchmarks/kmeans_report.py benchmarks/results/kmeans-NAME.json [MORE.json]
"""

import sys

import report
from kmeans_contenders import AGAINST_GROUPS, AGAINST_K, AGAINST_N, CUT, MEMORY, ROWS, TILES
from report import header, load, number  # noqa: F401

WHOLE = "1 x 2,097,152, K = 16, float32"
CPU = "us of CPU time per group"
# (table, case, what, limit)
TARGETS = (
    (CUT, "128 x 16,384, K = 16, float32", "times the whole", 1.3),
    (CUT, "4,096 x 512, K = 16, float32", "times the whole", 1.3),
    (ROWS, "512 x 4,096, K = 16, float32", CPU, 250),
    (ROWS, "512 x 4,096, K = 16, bfloat16", CPU, 120),
    (TILES, "4,096 x 512, K = 8, float32", CPU, 40),
    (ROWS, "512 x 4,096, K = 16, float32", "over scikit-learn, 10 restarts: least inertia", 1),
    (TILES, "4,096 x 512, K = 8, float32", "over scikit-learn, 10 restarts: least inertia", 1),
    (MEMORY, "1 x 50,000,000, K = 16, float32", "copies of the weights", 4),
)
ABOUT = (
    "- weights are normal with sigma 0.02, and one in 4,096 is eight times as large; a group is clustered on its own\n"
    "- *inertia*: what a contender leaves over what ours leaves, the mean and the least over the groups it was given: "
    "below 1 ours would be worse\n"
    "- *given*: groups that a contender clustered; slow ones get fewer. Times are medians over rounds in which every "
    "contender takes its turn; CPU time is of all threads\n"
    "- *coremltools*: what its palettization after training calls, with its exact programme forced; *flash-kmeans' "
    "formula*: in eager PyTorch, distances by a product of\n"
    "  matrices; *faiss*: `faiss.Kmeans`, 25 rounds\n"
    "- *copies*: the most resident memory during a call beyond the weights, in copies of them"
)
COLUMNS = (
    *("groups x weights, clusters", "contender", "given", "us per group", "CPU us per group", "CPU ns per weight"),
    *("CPU time over ours", "inertia", "least", "copies"),
)


def file_stem(data):
    return "kmeans-" + report.file_stem(data)


def markdown(data):
    parts = [f"# k-means on {data['machine']['device']}, {data['date']}", report.facts(data) + ABOUT]
    parts += ["## Targets", targets(data)]
    for table in dict.fromkeys(row["table"] for row in data["rows"]):
        parts += [f"## {table[0].upper()}{table[1:]}", _table(data, table)]
    return "\n\n".join([*parts, "## Absent rows", report.absent_rows(data)]) + "\n"


def _table(data, table):
    lines = [COLUMNS, ["---"] * 2 + ["---:"] * 8]
    for row in report.measured(data, table):
        best = find(data, table, row["case"])
        lines.append(
            (
                row["case"],
                f"**{row['contender']}**" if row["default"] else row["contender"],
                f"{row['given']:,}",
                *(number(row[key]) for key in ("us_per_group", "cpu_us_per_group", "cpu_ns_per_weight")),
                "" if row["default"] else number(row["cpu_us_per_group"] / best["cpu_us_per_group"]) + "x",
                *("" if row["default"] else f"{row[key]:.4f}" for key in ("inertia", "least_inertia")),
                number(row.get("copies")),
            )
        )
    return report.table(lines)


def find(data, table, case, contender="r2kernels"):
    return next(
        (row for row in report.measured(data, table) if (row["case"], row["contender"]) == (case, contender)), None
    )


def value_of(data, table, case, what):
    """The number that a target is about, or None."""
    if what.startswith("over "):
        row = find(data, table, case, what.removeprefix("over ").partition(":")[0])
        return row and round(row["least_inertia"], 6)
    row = find(data, table, case)
    if row is None:
        return None
    if what == "times the whole":
        whole = find(data, table, WHOLE)
        return whole and row["cpu_ns_per_weight"] / whole["cpu_ns_per_weight"]
    return row.get("copies") if what == "copies of the weights" else row["cpu_us_per_group"]


def targets(data, plain=False):
    checked = ((f"{t}: {case}", what, limit, value_of(data, t, case, what)) for t, case, what, limit in TARGETS)
    return report.simple_targets(data, checked, "{:76} {:50} {:>8}  {}", plain)


def plot(data, path):
    """CPU time per weight against the size of a group, clusters, and the number of groups."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    colours = {}
    for ax, table, key, label in zip(
        panels,
        (AGAINST_N, AGAINST_K, AGAINST_GROUPS),
        ("n", "clusters", "groups"),
        ("weights N of one group (K = 16)", "clusters K (rows of 4,096)", "groups (tiles of 512, K = 8)"),
        strict=True,
    ):
        rows = report.measured(data, table)
        for name in dict.fromkeys(row["contender"] for row in rows):
            points = sorted((row[key], row["cpu_ns_per_weight"]) for row in rows if row["contender"] == name)
            ours, colour = name == "r2kernels", colours.setdefault(name, f"C{len(colours)}")
            style = {"linewidth": 2.5, "zorder": 3} if ours else {"linewidth": 1, "linestyle": ":"}
            ax.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=name, **style)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel(label)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ns of CPU time per weight")
    panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"k-means of single numbers, {report.where(data)}", fontsize=9)
    report.save(figure, path)


if __name__ == "__main__":
    report.run(sys.modules[__name__], "Markdown and a figure from the benchmark results of k-means.")
