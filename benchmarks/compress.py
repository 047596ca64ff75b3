"""What `r2kernels compress` costs on a checkpoint of the shapes of a language model: `python benchmarks/compress.py`.

Writes a synthetic bf16 checkpoint (layers of Llama-2-7B, an embedding, norms) to a temporary folder, compresses it in
processes of their own, and prints MB of the checkpoint per second, CPU time per 4,096 weights and the peak of resident
memory, with 1 and 2 threads and, once interrupted half-way, what going on adds. The last file is the same as the first.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from r2kernels.files import container

LAYER = {
    **{f"self_attn.{name}_proj.weight": (4096, 4096) for name in "qkvo"},
    "mlp.gate_proj.weight": (11008, 4096),
    "mlp.up_proj.weight": (11008, 4096),
    "mlp.down_proj.weight": (4096, 11008),
    "input_layernorm.weight": (4096,),
    "post_attention_layernorm.weight": (4096,),
}
ENDS = {"model.embed_tokens.weight": (32000, 4096), "model.norm.weight": (4096,)}
OPTIONS = ["--bits", "4", "--group-size", "1", "--lut-dtype", "fp16"]


def shapes(layers):
    return ENDS | {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in LAYER.items()}


def generate(path, layers):
    """Gaussian rows of different scales, with a few outliers; one tensor at a time. Bytes of the data."""
    planned = shapes(layers)
    total = sum(2 * torch.Size(shape).numel() for shape in planned.values())
    entries = {name: container.entry(torch.bfloat16, shape, total, total) for name, shape in planned.items()}
    generator = torch.Generator().manual_seed(0)
    with open(path, "w+b") as file:
        writer = container.Writer(file, len(container.header(entries, {"format": "pt"})))
        for name, shape in planned.items():
            w = torch.randn(shape, generator=generator).mul_(0.02)
            if len(shape) > 1:
                w *= torch.rand(shape[0], 1, generator=generator) + 0.5
                w.view(-1)[:: 2**16] *= 8
            writer.add(name, w.bfloat16())
        writer.finish({"format": "pt"})
    return total


def compressed(checkpoint, out, jobs, *more, stop_at=None):
    """(seconds, CPU seconds, peak bytes) of one process; with stop_at interrupted once so many bytes are written."""
    command = [sys.executable, "-m", "r2kernels", "compress", checkpoint, "-o", out, *OPTIONS, "--json"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with subprocess.Popen([*map(str, command), "--jobs", str(jobs), *more], stdout=subprocess.DEVNULL) as running:
        while stop_at is not None and running.poll() is None:
            data = Path(f"{out}.partial") / "data"
            if data.exists() and data.stat().st_size >= stop_at:
                running.send_signal(signal.SIGINT)
                break
            time.sleep(0.05)
        _, status, used = os.wait4(running.pid, 0)
        running.returncode = os.waitstatus_to_exitcode(status)
    if running.returncode != (0 if stop_at is None else 130):
        raise RuntimeError(f"the command ended with {running.returncode}")
    del before
    return time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measure(layers, rounds, folder):
    checkpoint, out = folder / "model.safetensors", folder / "small.safetensors"
    size = generate(checkpoint, layers)
    largest = max(2 * torch.Size(shape).numel() for shape in shapes(layers).values())
    rows, digests = [], set()
    for _ in range(rounds):
        for jobs in (1, 2):
            seconds, cpu, peak = compressed(checkpoint, out, jobs)
            rows.append({"case": f"{jobs} thread{'s' * (jobs > 1)}", "seconds": seconds, "cpu": cpu, "peak": peak})
            digests.add(digest(out))
            stored = out.stat().st_size
            out.unlink()
    first = compressed(checkpoint, out, 2, stop_at=stored // 2)
    second = compressed(checkpoint, out, 2, "--resume")
    digests.add(digest(out))
    rows.append(
        {
            "case": "2 threads, interrupted half-way and gone on with",
            "seconds": first[0] + second[0],
            "cpu": first[1] + second[1],
            "peak": max(first[2], second[2]),
        }
    )
    if len(digests) != 1:
        raise RuntimeError("the files differ")
    for row in rows:
        row |= {"MB/s": size / 1e6 / row["seconds"], "us of CPU per row": row["cpu"] * 1e6 / (size / 2 / 4096)}
    return {"bytes": size, "largest": largest, "stored": stored, "rows": rows}


def text(found, machine):
    lines = [
        f"# compress: {found['bytes'] / 1e9:.2f} GB of bf16 to 4-bit tables of channels",
        "",
        machine,
        "",
        f"Written: {found['stored'] / 1e9:.3f} GB, the same bytes in every row. Largest tensor: "
        f"{found['largest'] / 1e6:.0f} MB; the bar for the peak is twice that and 300 MB, "
        f"{(2 * found['largest'] + 3e8) / 1e6:.0f} MB. A row is 4,096 weights.",
        "",
        "| | s | MB/s | CPU s | CPU us per row | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {row['case']} | {row['seconds']:.1f} | {row['MB/s']:.0f} | {row['cpu']:.1f} | "
            f"{row['us of CPU per row']:.0f} | {row['peak'] / 1e6:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=4, help="layers of Llama-2-7B (default 4: 2 GB)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", help="where the checkpoint is written (default: the folder for temporary files)")
    parser.add_argument("--results", type=Path, help="a name without suffix, for .json and .md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(args.layers, args.rounds, Path(folder))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, Python "
    machine += f"{platform.python_version()}, {time.strftime('%Y-%m-%d')}"
    print(text(found, machine))
    if args.results:
        args.results.with_suffix(".json").write_text(json.dumps({"machine": machine, **found}, indent=1) + "\n")
        args.results.with_suffix(".md").write_text(text(found, machine))


if __name__ == "__main__":
    main()
