"""The quantizers' results as JSON, Markdown and a figure; the method table in README.md.

python benchmarks/quantizer_report.py benchmarks/results/quantizers-NAME.json [MORE.json] [--readme]
"""

import sys

import report
from report import header, load, number  # noqa: F401

BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
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
# (call, paper, formula, the case that is its headline)
METHODS = (
    (
        "`lsq(x, step, bits)`",
        "[LSQ](https://arxiv.org/abs/1902.08153)",
        "s·round(clip(x/s, -QN, QP)), s learned",
        "lsq",
    ),
    (
        "`ewgs(x, lower, upper, bits)`",
        "[EWGS](https://arxiv.org/abs/2104.00903)",
        "round(n·clip((x - l)/(u - l), 0, 1))/n; the gradient g passes as g + δ·\\|g\\|·(x - xq)",
        "ewgs",
    ),
    (
        "`pact(x, alpha, bits)`",
        "[PACT](https://arxiv.org/abs/1805.06085)",
        "s·round(clip(x, 0, a)/s), s = a/n, a learned",
        "pact",
    ),
    (
        "`dorefa(w, bits)`",
        "[DoReFa-Net](https://arxiv.org/abs/1606.06160)",
        "2·round(n·(tanh w/(2·max\\|tanh w\\|) + 1/2))/n - 1",
        "dorefa",
    ),
    (
        "`bin_reg(W, step, bits)`",
        "[Bin regularization](https://openaccess.thecvf.com/content/ICCV2021/html/Han_Improving_Low-Precision_Network_Quantization_via_Bin_Regularization_ICCV_2021_paper.html)",
        "Σ over bins of (mean of the bin - its level)² + its variance",
        "bin_reg, 4 bits",
    ),
    ("`msqe(W, step, bits)`", "[Choi et al. 2020](https://arxiv.org/abs/1809.00095)", "(1/N) Σ (w - Q(w; s))²", "msqe"),
    (
        "`partial_l2(W, fraction)`",
        "[Choi et al. 2020](https://arxiv.org/abs/1809.00095)",
        "(1/N) Σ w² over the smallest `fraction` of \\|w\\|",
        "partial_l2",
    ),
    ("`kure(W, target=1.8)`", "[KURE](https://arxiv.org/abs/2002.07686)", "(kurtosis - target)²", None),
    (
        "`weight_terms(W, terms)`",
        "",
        "several of these and the range losses from one read of W; here five",
        "weight_terms",
    ),
)
ABOUT = """- forward and backward; times: medians over rounds in which every contender of a case takes its turn, the second of two calls; ratios: medians of the
  rounds' ratios
- *floor*: PyTorch moving the fewest bytes: two reads of x, one of g, two fresh writes (regularizers: two reads, one fresh write)
- *eager*: `r2kernels.reference` under autograd; *torch.compile*: of the same; *PyTorch's fake quantize*: `torch._fake_quantize_learnable_per_tensor_affine`
- 4 bits where not said otherwise; normal numbers, sigma 0.05; the parameters have gradients too; ours are timed only where they agree with the reference
- *alone*: one of the five terms of `weight_terms`, by `weight_terms`"""


def file_stem(data):
    return "quantizers-" + report.file_stem(data)


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
        f"# Quantizers and regularizers on {data['machine']['device']}, {data['date']}",
        "\n".join(facts) + "\n" + ABOUT,
        "## Targets",
        targets(data),
    ]
    for table in dict.fromkeys(row["table"] for row in data["rows"]):
        shown = [row for row in data["rows"] if row["table"] == table and "absent" not in row]
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
        parts += [f"## {table}", "\n".join("| " + " | ".join(cells) + " |" for cells in lines)]
    absent = [
        f"- **{row['contender']}**, {row['table']}, {row['case']}: {row['absent']}"
        for row in data["rows"]
        if "absent" in row
    ]
    return "\n\n".join([*parts, "## Absent rows", "\n".join(absent) or "none"]) + "\n"


def rows_of(data, table, case):
    """contender -> row"""
    return {
        row["contender"]: row
        for row in data["rows"]
        if (row["table"], row["case"]) == (table, case) and "absent" not in row
    }


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
    lines = [] if plain else ["| work | target | measured | |", "|---|---|---:|---|"]
    for table, case, limits in TARGETS:
        for what, limit in limits.items():
            measured, least = ratio(data, table, case, what), what.startswith("over ")
            reached = measured is not None and (measured >= limit if least else measured <= limit)
            verdict = "not measured" if measured is None else "reached" if reached else "**missed**"
            cells = f"{case}, {table}", f"{'≥' if least else '≤'} {limit:g} {what}", number(measured), verdict
            lines.append(
                "{:36} {:36} {:>8}  {}".format(*cells).replace("**", "") if plain else "| " + " | ".join(cells) + " |"
            )
    return "\n".join([*lines, "", report._busy(data)[2:].replace("**", "")] if plain else lines)


def plot(data, path):
    """Of each op the time of every contender, in floors."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"matplotlib is not installed: {path.name} is not drawn")
        return
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
    ax.set_title(
        f"{ONE}, forward + backward, on {data['machine']['device']} ({data['threads']} threads), torch {data['versions']['torch']}, {data['date']}",
        fontsize=9,
    )
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=150)
    part.replace(path)


def readme_tables(found):
    parts = []
    for data in found:
        lines = [
            "| call | paper | formula | r2kernels | over eager | over torch.compile | times the floor |",
            "|---|---|---|---:|---:|---:|---:|",
        ]
        for call, paper, formula, case in METHODS:
            rows = rows_of(data, ONE, case)
            ours = next((row for row in rows.values() if row["default"]), None)
            cells = (
                ["", "", "", ""]
                if ours is None
                else [
                    number(ours["median_ms"]) + " ms",
                    *(
                        "" if (value := ratio(data, ONE, case, what)) is None else number(value) + "x"
                        for what in ("over eager", "over torch.compile", "x floor")
                    ),
                ]
            )
            lines.append("| " + " | ".join([call, paper, formula, *cells]) + " |")
        machine, version = data["machine"], data["versions"]
        where = f"{machine['device']}" + (
            f", {machine['cores']} cores, {data['threads']} threads" if data["kind"] == "cpu" else ""
        )
        parts.append(
            f"Forward and backward of 11.7 million float32 numbers, 4 bits, on {where}; torch {version['torch']}; {data['date']}. "
            "The floor: PyTorch moving the fewest bytes, its results in small fresh pages, ours in large ones. kure is among the range losses. "
            f"Full tables in `benchmarks/results/{file_stem(data)}.md`.\n\n" + "\n".join(lines)
        )
    return "\n\n".join(parts)


if __name__ == "__main__":
    report.run(sys.modules[__name__], "Markdown and a figure from the quantizers' benchmark results.")
