"""The quantizers' results as JSON, Markdown and a figure.

python benchmarks/quantizers_report.py benchmarks/results/quantizers-NAME.json [MORE.json]
"""

import sys

import report
from report import header, load, number  # noqa: F401

ONE, LIST = "one tensor 11.7M", "ResNet-18"
PEER = "PyTorch's fake quantize"
# (table, case, {ratio: limit}): `over X` at least, `x X` at most
TARGETS = (
    (ONE, "lsq", {"x floor": 1.5, "over eager": 4, f"over {PEER}": 3, "over torch.compile": 1}),
    *(
        (ONE, op, {"x floor": 1.7, "over torch.compile": 1})
        for op in ("ewgs", "pact", "dorefa", "msqe", "bin_reg, 2 bits", "bin_reg, 4 bits", "partial_l2")
    ),
    (LIST, "weight_terms", {"x the dearest term alone": 1.5}),
    (ONE, "weight_terms", {"x the dearest term alone": 1.5}),
)
ABOUT = (
    "- forward and backward; times: medians over rounds in which every contender of a case takes its turn, the second "
    "of two calls; ratios: medians of the\n"
    "  rounds' ratios\n"
    "- *floor*: PyTorch moving the fewest bytes: two reads of x, one of g, two fresh writes (regularizers: two reads, "
    "one fresh write)\n"
    "- *eager*: `r2kernels.reference` under autograd; *torch.compile*: of the same; *PyTorch's fake quantize*: "
    "`torch._fake_quantize_learnable_per_tensor_affine`\n"
    "- 4 bits where not said otherwise; normal numbers, sigma 0.05; the parameters have gradients too; ours are timed "
    "only where they agree with the reference\n"
    "- *alone*: one of the five terms of `weight_terms`, by `weight_terms`"
)


def file_stem(data):
    return "quantizers-" + report.file_stem(data)


def markdown(data):
    parts = [
        f"# Quantizers and regularizers on {data['machine']['device']}, {data['date']}",
        report.facts(data) + ABOUT,
        "## Targets",
        targets(data),
    ]
    for table in dict.fromkeys(row["table"] for row in data["rows"]):
        shown = report.measured(data, table)
        lines = [("op", "contender", "ms", "IQR", "rounds", "ns per number", "times ours"), ["---"] * 2 + ["---:"] * 5]
        for row in shown:
            name = f"**{row['contender']}**" if row["default"] else row["contender"]
            lines.append(
                (
                    row["case"],
                    name,
                    number(row["median_ms"]),
                    number(row["iqr_ms"]),
                    str(row["rounds"]),
                    number(row["ns_per_number"]),
                    "" if row["default"] else number(row["slower"][1]) + "x",
                )
            )
        parts += [f"## {table}", report.table(lines)]
    return "\n\n".join([*parts, "## Absent rows", report.absent_rows(data)]) + "\n"


def rows_of(data, table, case):
    """contender -> row"""
    return {row["contender"]: row for row in report.measured(data, table) if row["case"] == case}


def ratio(data, table, case, what):
    """`over X`: how many times longer X takes than ours; `x X`: the inverse. None where not measured."""
    rows = rows_of(data, table, case)
    if what == "x the dearest term alone":
        found = [row["slower"][1] for name, row in rows.items() if name.endswith(" alone")]
        return 1 / max(found) if found else None
    row = rows.get(what.removeprefix("over ").removeprefix("x "))
    if row is None or not any(r["default"] for r in rows.values()):
        return None
    return row["slower"][1] if what.startswith("over ") else 1 / row["slower"][1]


def targets(data, plain=False):
    checked = (
        (f"{case}, {table}", what, limit, ratio(data, table, case, what))
        for table, case, limits in TARGETS
        for what, limit in limits.items()
    )
    return report.simple_targets(data, checked, "{:36} {:36} {:>8}  {}", plain)


def plot(data, path):
    """Of each op the time of every contender, in floors."""
    from matplotlib.figure import Figure

    ops = [case for table, case, _ in TARGETS if table == ONE and "floor" in rows_of(data, ONE, case)]
    shown = [
        name
        for name in ("triton", "cuda", "cpu", "torch.compile", PEER, "eager")
        if any(name in rows_of(data, ONE, op) for op in ops)
    ]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    ax = figure.subplots()
    width = 0.8 / max(len(shown), 1)
    for i, name in enumerate(shown):
        found = [
            (j, rows[name]["median_ms"] / rows["floor"]["median_ms"])
            for j, op in enumerate(ops)
            if name in (rows := rows_of(data, ONE, op))
        ]
        ax.bar(
            [j + (i - (len(shown) - 1) / 2) * width for j, _ in found], [value for _, value in found], width, label=name
        )
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xticks(range(len(ops)), [op.replace(", ", "\n") for op in ops])
    ax.set_ylabel("times the floor (fewest bytes)")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False)
    ax.set_title(f"{ONE}, forward + backward, {report.where(data)}", fontsize=9)
    report.save(figure, path)


if __name__ == "__main__":
    report.run(sys.modules[__name__], "Markdown and a figure from the quantizers' benchmark results.")
