"""Results as JSON, Markdown and a figure; the table in README.md.

python benchmarks/report.py benchmarks/results/NAME.json [MORE.json]              writes NAME.md and NAME.png again, prints the targets
python benchmarks/report.py benchmarks/results/NAME.json [MORE.json] --readme     puts the short tables between the markers of README.md
"""

import argparse
import datetime
import json
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
OTHERS = ("eager", "torch.compile", "floor", "copy")
LIST, ONE, LLAMA = "ResNet-18", "one tensor 11.7M", "Llama-7B block"
FORWARD, BOTH, ACCUMULATE, BACKWARD = "forward", "forward + backward", "accumulate_grad_", "backward"

# device -> (op, table, work, {ratio: limit}); `to_*` is at most the limit, `over_*` at least
TARGETS = {
    "cpu": (
        ("soft_min_max", LIST, BOTH, {"to_floor": 1.8, "over_eager": 10, "over_compile": 6}),
        ("soft_min_max", LIST, ACCUMULATE, {"to_floor": 1.5, "over_eager": 15, "over_compile": 8}),
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


def header(device):
    """What a reader must know of the machine; `rows` is empty."""
    import torch

    import r2kernels
    from r2kernels.backends import versions

    machine = {"device": _cpu(), "cores": len(os.sched_getaffinity(0)), "os": platform.platform()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine = {
            "device": properties.name,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"),
            "CUDA": torch.version.cuda,
            "L2 bytes": properties.L2_cache_size,
            "host": _cpu(),
            **{k: machine[k] for k in ("cores", "os")},
        }
    found = {"python": platform.python_version(), "r2kernels": r2kernels.__version__, **versions()}
    return {
        "kind": device,
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "versions": found,
        "threads": torch.get_num_threads(),
        "load at start": load(),
        "most load": load(),
        "backends": r2kernels.backends(),
        "rows": [],
    }


def load():
    return round(os.getloadavg()[0], 2)


def _cpu():
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def file_stem(data):
    """<device>-<date>, as a file may be called."""
    machine = data["machine"]
    device = machine["device"] if data["kind"] == "cuda" else f"{machine['device']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + "-" + data["date"]


def write(data, stem, module, figure=False):
    """Writes the files whole or not at all. `module` has `markdown`, `plot`, `targets` and `readme_tables` for its kind of results."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    data = {**data, "rows": [{k: v for k, v in row.items() if k != "samples"} for row in data["rows"]]}
    _replace(stem.with_name(stem.name + ".json"), json.dumps(data, indent=1))
    _replace(stem.with_name(stem.name + ".md"), module.markdown(data))
    if figure:
        module.plot(data, stem.with_name(stem.name + ".png"))


def _replace(path, text):
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def markdown(data):
    parts = [
        f"# Range losses on {data['machine']['device']}, {data['date']}",
        _about(data),
        "## Targets",
        targets(data),
    ]
    for table in dict.fromkeys(row["table"] for row in data["rows"]):
        parts += [f"## {table}", _full_table([row for row in data["rows"] if row["table"] == table])]
    absent = {}
    for row in data["rows"]:
        if "absent" in row:
            absent.setdefault((row["contender"], row["absent"]), []).append(
                f"{row['op']}, {row['table']}, {row['work']}"
            )
    parts += ["## Absent rows"] + [
        f"- **{name}**: {reason} ({'; '.join(cases)})" for (name, reason), cases in absent.items()
    ]
    return "\n\n".join(parts) + "\n"


ABOUT = """- times: medians over rounds in which every contender of a case takes its turn; ratios: medians of the rounds' ratios
- *floor*: torch reads each weight once (forward), twice and writes a new list (forward + backward), or twice and adds to the gradients (accumulate_grad_)
- *copy*: the same number of bytes at the rate of `Tensor.copy_` into memory that exists
- *extra*: the most memory of torch's allocator in use during a call, beyond weights and gradients
- only contenders whose numbers are right are timed: an error of at most twice the eager reference's plus one ulp, against float64 (`tests/budget.py`)"""


def _about(data):
    lines = [
        ("machine", data["machine"]),
        ("versions", data["versions"]),
        ("backends", {k: v or "usable" for k, v in data["backends"].items()}),
    ]
    facts = [f"- {name}: " + ", ".join(f"{k} {v}" for k, v in items.items()) for name, items in lines]
    timed = [row for row in data["rows"] if "absent" not in row]
    noisy = sum(row["iqr_ms"] > row["median_ms"] / 2 for row in timed)
    facts.append(f"- threads: {data['threads']}; IQR above half the median in {noisy} of {len(timed)} rows")
    facts.append(_busy(data))
    return "\n".join(facts) + "\n" + ABOUT


def _busy(data):
    """Whether others worked on the machine: what calls many small parallel loops, as eager and the floor do on a list, then suffers most."""
    text = f"- load average: {data['load at start']} at the start, {data['most load']} at most, {data['machine']['cores']} cores"
    own = data["threads"] if data["kind"] == "cpu" else 1
    busy = data["load at start"] > 0.5 * data["machine"]["cores"] or data["most load"] > data["machine"]["cores"] + own
    return text + "; **the machine was busy with other work: the ratios mean little**" * busy


def _full_table(rows):
    cuda = any(row.get("launches") for row in rows)
    head = [
        "op",
        "work",
        "contender",
        "ms",
        "IQR",
        "MB",
        "GB/s",
        "x floor",
        "x copy",
        "over eager",
        "over compile",
        "extra MB",
    ] + ["launches"] * cuda
    lines = [head, ["---"] * 3 + ["---:"] * (len(head) - 3)]
    for row in rows:
        if "absent" in row:
            continue
        name = row["contender"] if row["contender"] in OTHERS else f"**{row['contender']}**"
        extra = row["extra_bytes"] / 1e6 if "extra_bytes" in row else None
        numbers = [
            row["median_ms"],
            row["iqr_ms"],
            row["bytes"] / 1e6,
            row["gb_per_s"],
            *(row[ratio] for ratio in RATIOS),
            extra,
        ]
        lines.append([row["op"], row["work"], name, *map(number, numbers)] + [str(row.get("launches") or "")] * cuda)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(value):
    """Three digits, no exponent."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    return f"{value:,.{min(max(2 - math.floor(math.log10(abs(value))), 0), 5)}f}"


def find(data, op, table, work, contender=None):
    """The row of a contender, else of the default backend."""
    rows = (r for r in data["rows"] if (r["op"], r["table"], r["work"]) == (op, table, work) and "absent" not in r)
    return next((r for r in rows if (r["contender"] == contender if contender else r["default"])), None)


def targets(data, plain=False):
    """Each target as reached or missed. What the floor would have: no way of doing the work can be much better."""
    lines = [] if plain else ["| work | target | measured | the floor has | |", "|---|---|---:|---:|---|"]
    for op, table, work, limits in TARGETS[data["kind"]]:
        row = find(data, op, table, work)
        for ratio, limit in limits.items():
            measured = row and row.get(ratio)
            fewer = ratio.startswith("to_")
            verdict = "not measured" if measured is None else _verdict(measured, limit, fewer, row["quartiles"][ratio])
            floor = (
                "" if measured is None or ratio == "to_floor" else number(find(data, op, table, work, "floor")[ratio])
            )
            cells = (
                f"{op} {work}, {table}",
                f"{'≤' if fewer else '≥'} {limit:.3g} {RATIOS[ratio]}",
                number(measured),
                floor,
                verdict,
            )
            lines.append(
                "{:50} {:32} {:>8} {:>8}  {}".format(*cells).replace("**", "")
                if plain
                else "| " + " | ".join(cells) + " |"
            )
    return "\n".join([*lines, "", _busy(data)[2:].replace("**", "")] if plain else lines)


def _verdict(measured, limit, fewer, quartiles):
    low, high = quartiles
    reached = measured <= limit if fewer else measured >= limit
    doubt = f" (half of the rounds: {number(low)} to {number(high)})" if low < limit < high else ""
    return ("reached" if reached else "**missed**") + doubt


def plot(data, path):
    """How many times faster than eager, for every op, shape and work; torch.compile beside it."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch
    except ImportError:
        print(f"matplotlib is not installed: {path.name} is not drawn")
        return
    rows = {(r["op"], r["table"], r["work"]): r for r in data["rows"] if r.get("default") and "absent" not in r}
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
    version = data["versions"]
    figure.suptitle(
        f"r2kernels on {data['machine']['device']} ({data['threads']} threads), torch {version['torch']}, {data['date']}",
        fontsize=10,
    )
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=150)
    part.replace(path)


def readme_tables(found):
    """soft_min_max with the default backend, one short table for each machine."""
    parts = []
    for data in found:
        lines = [
            "| weights | work | r2kernels | eager | torch.compile | over eager | over compile | x floor |",
            "|---|---|---:|---:|---:|---:|---:|---:|",
        ]
        rows = [row for row in data["rows"] if row["op"] == "soft_min_max" and "absent" not in row]
        for row in rows:
            if not row["default"]:
                continue
            beside = {r["contender"]: r for r in rows if (r["table"], r["work"]) == (row["table"], row["work"])}
            times = [
                number(r["median_ms"]) + " ms" if (r := beside.get(name)) else ""
                for name in (row["contender"], "eager", "torch.compile")
            ]
            ratios = [number(row[key]) + "x" if row[key] else "" for key in ("over_eager", "over_compile", "to_floor")]
            lines.append("| " + " | ".join([row["table"], row["work"], *times, *ratios]) + " |")
        machine, version = data["machine"], data["versions"]
        where = f"{machine['device']}" + (
            f", {machine['cores']} cores, {data['threads']} threads" if data["kind"] == "cpu" else ""
        )
        parts.append(
            f"`soft_min_max`, float32 unless it says otherwise, on {where}; torch {version['torch']}; {data['date']}. "
            f"Medians; full tables in `benchmarks/results/{file_stem(data)}.md`.\n\n" + "\n".join(lines)
        )
    return "\n\n".join(parts)


def insert(begin, end, tables, fail):
    """Puts `tables` between two markers of README.md."""
    text = README.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        fail(f"{README.name} must hold {begin} and, after it, {end}, once each")
    before, after = text.split(begin)[0], text.split(end)[1]
    _replace(README, f"{before}{begin}\n{tables}\n{end}{after}")


def run(module, description):
    """The command line of a module of results."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument("--readme", action="store_true", help="replace the tables between the markers of README.md")
    args = parser.parse_args()
    found = [json.loads(path.read_text()) for path in args.results]
    if args.readme:
        insert(module.BEGIN, module.END, module.readme_tables(found), parser.error)
        return
    for path, data in zip(args.results, found, strict=True):
        write(data, path.with_suffix(""), module, figure=True)
        print(module.targets(data, plain=True))


if __name__ == "__main__":
    run(sys.modules[__name__], "Markdown and a figure from benchmark results.")
