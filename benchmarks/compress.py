"""What `r2kernels compress` costs on a checkpoint of the shapes of a language model: `python benchmarks/compress.py`.

Writes a synthetic bf16 checkpoint (layers of Llama-2-7B, an embedding, norms) to a temporary folder, compresses it in
processes of their own, and writes to results/ the MB of the checkpoint per second, the CPU time per 4,096 weights and
the peak of resident memory, with 1 and 2 threads and, once interrupted half-way, what going on adds. All files must be
the same.
"""

import argparse
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import report
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


def sizes(layers):
    return [2 * torch.Size(shape).numel() for shape in shapes(layers).values()]


def generate(path, layers):
    """Gaussian rows of different scales, with a few outliers; one tensor at a time."""
    planned, total = shapes(layers), sum(sizes(layers))
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


def compressed(checkpoint, out, jobs, *more, stop_at=None):
    """(seconds, CPU seconds, peak bytes) of one process; with stop_at interrupted once so many bytes are written."""
    command = [sys.executable, "-m", "r2kernels", "compress", checkpoint, "-o", out, *OPTIONS, "--json"]
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(jobs)}
    command = [*map(str, command), "--jobs", str(jobs), *more]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as running:
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
    return time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measure(layers, rounds, folder):
    checkpoint, out = folder / "model.safetensors", folder / "small.safetensors"
    # in a process of its own: the memory of this one counts to the peak of those that it starts
    writing = multiprocessing.get_context("spawn").Process(target=generate, args=(checkpoint, layers))
    writing.start()
    writing.join()
    size, largest = sum(sizes(layers)), max(sizes(layers))
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
        threads = 1 if row["case"] == "1 thread" else 2
        row["MB/s at full speed"] = threads * size / 1e6 / row["cpu"]
        row |= {"MB/s": size / 1e6 / row["seconds"], "us of CPU per row": row["cpu"] * 1e6 / (size / 2 / 4096)}
    return {"bytes": size, "largest": largest, "stored": stored, "rows": rows}


def markdown(data):
    bar = (2 * data["largest"] + 3e8) / 1e6
    lines = [
        f"# compress on {data['machine']['device']}, {data['date']}",
        "",
        report.facts(data) + f"- {data['bytes'] / 1e9:.2f} GB of bf16 to 4-bit tables of channels in fp16 "
        f"(`{' '.join(OPTIONS)}`), {data['stored'] / 1e9:.3f} GB, the same bytes in every row; a row is 4,096 weights",
        f"- largest tensor: {data['largest'] / 1e6:.0f} MB; the peak may be twice that and 300 MB: {bar:.0f} MB",
        "- *at full speed*: MB per second if each thread had had a core, from CPU time; the start of Python is in it",
        "",
        "| | s | MB/s | CPU s | CPU us per row | MB/s at full speed | peak MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in data["rows"]:
        cells = (row["MB/s"], row["cpu"], row["us of CPU per row"], row["MB/s at full speed"], row["peak"] / 1e6)
        lines.append(f"| {row['case']} | {row['seconds']:.1f} | {' | '.join(f'{cell:.0f}' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=4, help="layers of Llama-2-7B (default 4: 2 GB)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", help="where the checkpoint is written (default: the folder for temporary files)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    data = report.header("cpu")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        data |= measure(args.layers, args.rounds, Path(folder))
    data["most load"] = max(data["most load"], report.load())
    report.write(data, args.results / f"compress-{report.file_stem(data)}", sys.modules[__name__])
    print(markdown(data))


if __name__ == "__main__":
    main()
