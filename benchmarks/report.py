"""What the reports of all families share: the machine, the files written, numbers and tables, the command line.

A family's module (range_losses_report.py, ...) has `markdown`, `plot` and `targets` for its kind of results.
"""

import argparse
import datetime
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
from pathlib import Path


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
    """Writes the files whole or not at all. `module` has `markdown`, and for a figure `plot`, for its kind of data."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    data = {**data, "rows": [{k: v for k, v in row.items() if k != "samples"} for row in data["rows"]]}
    replace(stem.with_name(stem.name + ".json"), json.dumps(data, indent=1))
    replace(stem.with_name(stem.name + ".md"), module.markdown(data))
    if figure and importlib.util.find_spec("matplotlib") is None:
        print(f"matplotlib is not installed: {stem.name}.png is not drawn")
    elif figure:
        module.plot(data, stem.with_name(stem.name + ".png"))


def measured(data, table):
    """The rows of a table that are not absent."""
    return [row for row in data["rows"] if row["table"] == table and "absent" not in row]


def replace(path, text):
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def save(figure, path):
    """A figure as PNG, whole or not at all."""
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=150)
    part.replace(path)


def facts(data, threads=""):
    """What every report begins with: the machine, the versions, how busy it was. `threads` goes on in their line."""
    lines = [
        ("machine", data["machine"]),
        ("versions", data["versions"]),
        ("backends", {k: v or "usable" for k, v in data["backends"].items()}),
    ]
    found = [f"- {name}: " + ", ".join(f"{k} {v}" for k, v in items.items()) for name, items in lines]
    return "\n".join([*found, f"- threads: {data['threads']}{threads}", busy(data)]) + "\n"


def machine(data):
    """What a report without times begins with: the machine and the versions."""
    found = {name: ", ".join(f"{k} {v}" for k, v in data[name].items()) for name in ("machine", "versions")}
    return "".join(f"- {name}: {text}\n" for name, text in found.items())


def busy(data):
    """Whether others worked on the machine: what calls many small parallel loops suffers most, as eager and the floor
    do on a list."""
    cores = data["machine"]["cores"]
    text = f"- load average: {data['load at start']} at the start, {data['most load']} at most, {cores} cores"
    own = data["threads"] if data["kind"] == "cpu" else 1
    others = data["load at start"] > 0.5 * cores or data["most load"] > cores + own
    return text + "; **the machine was busy with other work: the ratios mean little**" * others


def table(lines):
    """Rows of cells as a Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def target_table(data, head, rows, widths, plain):
    """Targets as a Markdown table; `plain`: as lines of text in columns, and how busy the machine was."""
    if not plain:
        return f"{head}\n{table(rows)}"
    lines = [widths.format(*cells).replace("**", "") for cells in rows]
    return "\n".join([*lines, "", busy(data)[2:].replace("**", "")])


def simple_targets(data, checked, widths, plain):
    """`checked`: (work, what, limit, measured or None); `over X` is at least the limit, all others at most."""
    rows = []
    for work, what, limit, measured in checked:
        least = what.startswith("over ")
        reached = measured is not None and (measured >= limit if least else measured <= limit)
        verdict = "not measured" if measured is None else "reached" if reached else "**missed**"
        rows.append((work, f"{'≥' if least else '≤'} {limit:g} {what}", number(measured), verdict))
    return target_table(data, "| work | target | measured | |\n|---|---|---:|---|", rows, widths, plain)


def absent_rows(data):
    lines = [f"- **{r['contender']}**, {r['table']}, {r['case']}: {r['absent']}" for r in data["rows"] if "absent" in r]
    return "\n".join(lines) or "none"


def where(data):
    """The machine, the versions and the day, for the title of a figure."""
    version = data["versions"]["torch"]
    return f"on {data['machine']['device']} ({data['threads']} threads), torch {version}, {data['date']}"


def number(value):
    """Three digits, no exponent."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    return f"{value:,.{min(max(2 - math.floor(math.log10(abs(value))), 0), 5)}f}"


def run(module, description):
    """The command line of a family's module."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json")
    for path in parser.parse_args().results:
        data = json.loads(path.read_text())
        write(data, path.with_suffix(""), module, figure=True)
        print(module.targets(data, plain=True))
