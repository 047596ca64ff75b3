"""The range losses' results as JSON, Markdown and a figure.

python benchmarks/range_losses_report.py benchmarks/results/NAME.json [MORE.json]

writes NAME.md and NAME.png again and prints the targets.
"""

import sys

import report
from report import file_stem, header, load, number  # noqa: F401

OTHERS = ("eager", "torch.compile", "floor", "copy")
LIST, ONE, LLAMA = "ResNet-18", "one tensor 11.7M", "Llama-7B block"
FORWARD, BOTH, ACCUMULATE, BACKWARD = "forward", "forward + backward", "accumulate_grad_", "backward"
IN_STD = "accumulate_grad_, alpha in std"

# device -> (op, table, work, {ratio: limit}); `to_*` is at most the limit, `over_*` at least
TARGETS = {
    "cpu": (
        ("soft_min_max", LIST, BOTH, {"to_floor": 1.8, "over_eager": 10, "over_compile": 6}),
        ("soft_min_max", LIST, ACCUMULATE, {"to_floor": 1.5, "over_eager": 15, "over_compile": 8}),
        ("soft_min_max", LIST, IN_STD, {"to_raw": 1.15}),
        ("soft_min_max", ONE, BOTH, {"to_floor": 1.8, "over_eager": 30, "over_compile": 6}),
        ("soft_min_max", LIST, FORWARD, {"to_floor": 1.5, "over_eager": 10, "over_compile": 2}),
        ("l_inf", LIST, BOTH, {"to_floor": 1.4, "over_eager": 2, "over_compile": 1}),
        ("margin", LIST, BOTH, {"to_floor": 1.4, "over_eager": 2, "over_compile": 1}),
        ("soft_min_max", "1,000 x 1,000", BOTH, {"over_eager": 20}),
        ("soft_min_max", "1,000 x 1,000", ACCUMULATE, {"over_eager": 50}),
        ("soft_min_max", "one tensor 10k", BOTH, {"over_eager": 3, "over_compile": 1}),
    ),
    "cuda": (
        ("soft_min_max", LIST, BOTH, {"over_eager": 50, "over_compile": 10}),
        ("soft_min_max", LLAMA, FORWARD, {"to_floor": 1 / 0.85}),
        ("soft_min_max", LLAMA, BACKWARD, {"to_copy": 1 / 0.85}),
    ),
}
RATIOS = {
    "to_floor": "x the floor",
    "to_copy": "x a copy",
    "over_eager": "x over eager",
    "over_compile": "x over torch.compile",
}
TO_RAW = {"to_raw": "x alpha given"}


def markdown(data):
    timed = [row for row in data["rows"] if "absent" not in row]
    noisy = sum(row["iqr_ms"] > row["median_ms"] / 2 for row in timed)
    parts = [
        f"# Range losses on {data['machine']['device']}, {data['date']}",
        report.facts(data, f"; IQR above half the median in {noisy} of {len(timed)} rows") + ABOUT,
        "## Targets",
        targets(data),
    ]
    for table in dict.fromkeys(row["table"] for row in data["rows"]):
        parts += [f"## {table}", _full_table([row for row in timed if row["table"] == table])]
    absent = {}
    for row in data["rows"]:
        if "absent" in row:
            cases = absent.setdefault((row["contender"], row["absent"]), [])
            cases.append(f"{row['op']}, {row['table']}, {row['work']}")
    lines = [f"- **{name}**: {reason} ({'; '.join(cases)})" for (name, reason), cases in absent.items()]
    return "\n\n".join([*parts, "## Absent rows", *lines]) + "\n"


ABOUT = (
    "- times: medians over rounds in which every contender of a case takes its turn; ratios: medians of the rounds' "
    "ratios\n"
    "- *floor*: torch reads each weight once (forward), twice and writes a new list (forward + backward), or twice and "
    "adds to the gradients (accumulate_grad_)\n"
    "- *copy*: the same number of bytes at the rate of `Tensor.copy_` into memory that exists\n"
    "- *extra*: the most memory of torch's allocator in use during a call, beyond weights and gradients\n"
    "- only contenders whose numbers are right are timed: an error of at most twice the eager reference's plus one "
    "ulp, against float64 (`tests/budget.py`)"
)
COLUMNS = (
    *("op", "work", "contender"),
    *("ms", "IQR", "MB", "GB/s", "x floor", "x copy", "over eager", "over compile", "extra MB"),
)


def _full_table(rows):
    cuda = any(row.get("launches") for row in rows)
    head = [*COLUMNS] + ["launches"] * cuda
    lines = [head, ["---"] * 3 + ["---:"] * (len(head) - 3)]
    for row in rows:
        name = row["contender"] if row["contender"] in OTHERS else f"**{row['contender']}**"
        extra = row["extra_bytes"] / 1e6 if "extra_bytes" in row else None
        numbers = row["median_ms"], row["iqr_ms"], row["bytes"] / 1e6, row["gb_per_s"], *(row[r] for r in RATIOS), extra
        lines.append([row["op"], row["work"], name, *map(number, numbers)] + [str(row.get("launches") or "")] * cuda)
    return report.table(lines)


def find(data, op, table, work, contender=None):
    """The row of a contender, else of the default backend."""
    rows = (r for r in data["rows"] if (r["op"], r["table"], r["work"]) == (op, table, work) and "absent" not in r)
    return next((r for r in rows if (r["contender"] == contender if contender else r["default"])), None)


def targets(data, plain=False):
    """Each target as reached or missed. What the floor would have: no way of doing the work can be much better."""
    rows = []
    for op, table, work, limits in TARGETS[data["kind"]]:
        row, floor = find(data, op, table, work), find(data, op, table, work, "floor")
        for ratio, limit in limits.items():
            measured = row and row.get(ratio)
            fewer = ratio.startswith("to_")
            verdict = "not measured" if measured is None else _verdict(measured, limit, fewer, row["quartiles"][ratio])
            rows.append(
                (
                    f"{op} {work}, {table}",
                    f"{'≤' if fewer else '≥'} {limit:.3g} {(RATIOS | TO_RAW)[ratio]}",
                    number(measured),
                    "" if measured is None or ratio in ("to_floor", "to_raw") else number(floor[ratio]),
                    verdict,
                )
            )
    head = "| work | target | measured | the floor has | |\n|---|---|---:|---:|---|"
    return report.target_table(data, head, rows, "{:50} {:32} {:>8} {:>8}  {}", plain)


def _verdict(measured, limit, fewer, quartiles):
    low, high = quartiles
    reached = measured <= limit if fewer else measured >= limit
    doubt = f" (half of the rounds: {number(low)} to {number(high)})" if low < limit < high else ""
    return ("reached" if reached else "**missed**") + doubt


def plot(data, path):
    """How many times faster than eager, for every op, shape and work; torch.compile beside it."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = {
        (r["op"], r["table"], r["work"]): r
        for r in data["rows"]
        if r.get("default") and "absent" not in r and r["work"] != IN_STD
    }
    compiled = {
        (r["op"], r["table"], r["work"]): r
        for r in data["rows"]
        if r["contender"] == "torch.compile" and "absent" not in r
    }
    if not rows:
        return
    ops, tables, works = (list(dict.fromkeys(key[i] for key in rows)) for i in range(3))
    figure = Figure(figsize=(4.6 * len(works), 1.2 + (0.17 * len(ops) + 0.15) * len(tables)), layout="constrained")
    axes = figure.subplots(1, len(works), sharey=True, sharex=True, squeeze=False)[0]
    height = 0.84 / len(ops)
    for ax, work in zip(axes, works, strict=True):
        for i, op in enumerate(ops):
            keys = [(j + (i + 0.5) * height - 0.42, (op, table, work)) for j, table in enumerate(tables)]
            bars = [(y, rows[key]["over_eager"]) for y, key in keys if key in rows]
            ax.barh([y for y, _ in bars], [x - 1 for _, x in bars], height * 0.9, left=1, color=f"C{i}")
            for y, x in bars:
                ax.text(max(x, 1) * 1.06, y, f"{number(x)}x", va="center", fontsize=6.5)
            marks = [(y, compiled[key]["over_eager"]) for y, key in keys if key in compiled]
            ax.plot([x for _, x in marks], [y for y, _ in marks], "k|", markersize=7)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_title(work, fontsize=10)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_xlabel("times faster than eager PyTorch")
        ax.grid(axis="x", alpha=0.3)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(tables)), tables)
    axes[0].set_ylim(len(tables) - 0.5, -0.5)
    low, high = axes[0].get_xlim()
    axes[0].set_xlim(low, high * 1.8)
    handles = [Patch(color=f"C{i}", label=op) for i, op in enumerate(ops)] + [
        Line2D([], [], color="k", marker="|", linestyle="", label="torch.compile")
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.suptitle(f"r2kernels {report.where(data)}", fontsize=10)
    report.save(figure, path)


if __name__ == "__main__":
    report.run(sys.modules[__name__], "Markdown and a figure from the range losses' benchmark results.")
