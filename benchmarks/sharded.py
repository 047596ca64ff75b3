"""What it costs that weights are sharded: collectives, bytes and time of every op on DTensors, on gloo.

python benchmarks/sharded.py --ranks 2 4          # writes benchmarks/results/sharded-MACHINE-DATE.{json,md}

Beside each op runs the same kernel on the local shards alone; what the op takes longer is what merging costs.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import report
import torch
from torch import distributed
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from sharding.laid import Messages  # noqa: E402

import r2kernels as r2  # noqa: E402

LAYERS, SHAPE, K, ROUNDS = 16, (512, 512), 16, 41
COUNTS, SMALL = (4, 16, 64, 256), (32, 32)  # of layers, for the time that each takes
AGREE = 1e-4  # of the largest number: both are float32
GPUS, LATENCY = 64, 20e-6
SLOPES = ("soft_min_max", "lsq", "dkm, T = 5")


def llama():
    """The 226 matrices of Llama-3-8B: embeddings, head and seven linear weights in each of 32 blocks."""
    block = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    return [(128256, 4096)] * 2 + block * 32


def _numbers(value, count, shape=()):
    return [torch.full((count, *shape), value).requires_grad_()]


def _dkm(gradient):
    def call(ws, *cs):
        hats, fresh = r2.dkm(ws, list(cs), 0.01, iterations=5, gradient=gradient)
        return [*hats, *fresh]

    return call


def _centroids(count):
    return [torch.linspace(-0.15, 0.15, K).requires_grad_() for _ in range(count)]


def _terms(ws, alpha):
    return list(
        r2.weight_terms(ws, {"soft_min_max": {"alpha": alpha}, "l_inf": {}, "kure": {}, "bin_reg": BIN}).values()
    )


BIN = {"step": 0.02, "bits": 4}
# name -> (call, makes the parameters for so many layers)
OPS = {
    "l_inf": (r2.l_inf, lambda n: []),
    "margin": (lambda ws, M: r2.margin(ws, M, k=0.01), lambda n: _numbers(0.1, n)),
    "soft_min_max": (r2.soft_min_max, lambda n: _numbers(20.0, n)),
    "kure": (r2.kure, lambda n: []),
    "msqe, 4 bits": (lambda ws, s: r2.msqe(ws, s, 4), lambda n: _numbers(0.02, n)),
    "bin_reg, 4 bits": (lambda ws: r2.bin_reg(ws, **BIN), lambda n: []),
    "partial_l2": (lambda ws: r2.partial_l2(ws, 0.4), lambda n: []),
    "weight_terms, four": (_terms, lambda n: _numbers(20.0, n)),
    "lsq, 4 bits": (lambda ws, s: r2.lsq(ws, s, 4), lambda n: _numbers(0.02, n)),
    "ewgs, 4 bits": (lambda ws, a, b: r2.ewgs(ws, a, b, 4), lambda n: [*_numbers(-0.1, n), *_numbers(0.1, n)]),
    "pact, 4 bits": (lambda ws, a: r2.pact(ws, a, 4), lambda n: _numbers(0.1, n)),
    "dorefa, 4 bits": (lambda ws: r2.dorefa(ws, 4), lambda n: []),
    "dkm, T = 5": (_dkm("unrolled"), _centroids),
    'dkm, T = 5, "last"': (_dkm("last"), _centroids),
}


def step(call, ws, parameters, forward=None, backward=None):
    """(results, gradients) of one forward and backward."""
    outputs = call(ws, *parameters) if forward is None else _counted(forward, call, ws, *parameters)
    outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    inputs = [t for t in (*ws, *parameters) if t.requires_grad]
    args = outputs, inputs, [o.detach() for o in outputs]
    options = {"allow_unused": True}
    gradients = (
        torch.autograd.grad(*args, **options)
        if backward is None
        else _counted(backward, torch.autograd.grad, *args, **options)
    )
    return [*outputs, *[g for g in gradients if g is not None]]


def _counted(messages, call, *args, **options):
    with messages.counted():
        return call(*args, **options)


def layers(count, shape, mesh):
    """Weights as DTensors, their shards as plain tensors, and whole."""
    g = torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=g) * 0.05 for _ in range(count)]
    laid = [distribute_tensor(w, mesh, [Shard(0)], src_data_rank=None).requires_grad_() for w in whole]
    shards = [w.detach().to_local().clone().requires_grad_() for w in laid]
    return laid, shards, [w.requires_grad_() for w in whole]


def agrees(call, make, laid, whole):
    """Whether results, and gradients of half their squares, are those of whole tensors."""
    count = len(laid)
    for found, expected in zip(step(call, laid, make(count)), step(call, whole, make(count)), strict=True):
        found = found.full_tensor() if isinstance(found, DTensor) else found
        if not (found - expected).abs().max() <= AGREE * expected.abs().max():
            return False
    return True


def timed(call, make, laid, shards, rounds):
    """Seconds of (the op on DTensors, the kernel on the local shards) in each round, of the slowest rank."""
    contenders, times, shuffle = {0: laid, 1: shards}, [[], []], random.Random(0).shuffle
    parameters, order = make(len(laid)), [0, 1]
    for turn in range(rounds + 2):
        shuffle(order)
        for i in order:
            distributed.barrier()
            start = time.perf_counter()
            kept = step(call, contenders[i], parameters)
            elapsed = time.perf_counter() - start
            del kept
            if turn > 1:  # two rounds to warm up
                times[i].append(elapsed)
    table = torch.tensor(times, dtype=torch.float64)
    distributed.all_reduce(table, op=distributed.ReduceOp.MAX)
    return table


def work(path):
    """In one rank: measures every op, and rank 0 writes the rows."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    world = distributed.get_world_size()
    mesh = distributed.init_device_mesh("cpu", (world,))
    rows = []
    laid, shards, whole = layers(LAYERS, SHAPE, mesh)
    for name, (call, make) in OPS.items():
        assert agrees(call, make, laid, whole), f"{name} on shards is not {name}: not timed"
        forward, backward = Messages(), Messages()
        step(call, laid, make(LAYERS), forward, backward)
        sharded, alone = timed(call, make, laid, shards, ROUNDS)
        rows.append(
            {
                "ranks": world,
                "op": name,
                "collectives": [forward.collectives, backward.collectives],
                "bytes": [forward.bytes / LAYERS, backward.bytes / LAYERS],
                "ms": 1e3 * sharded.median().item(),
                "alone_ms": 1e3 * alone.median().item(),
                "extra_ms": (1e3 * (sharded - alone)).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist(),
            }
        )
    slopes = [_slope(name, mesh) for name in OPS if name.startswith(SLOPES) and "last" not in name]
    if distributed.get_rank() == 0:
        Path(path).write_text(json.dumps({"rows": rows, "slopes": slopes}))
    distributed.barrier()
    os._exit(0)  # destroy_process_group sometimes aborts


def _slope(name, mesh):
    """Extra milliseconds for numbers of layers, and the line through them."""
    call, make = OPS[name]
    extra = []
    for count in COUNTS:
        laid, shards, _ = layers(count, SMALL, mesh)
        sharded, alone = timed(call, make, laid, shards, ROUNDS // 2)
        extra.append(1e3 * (sharded - alone).median().item())
    slope, start = statistics.linear_regression(COUNTS, extra)
    return {"ranks": mesh.size(), "op": name, "layers": list(COUNTS), "extra_ms": extra, "slope_us": 1e3 * slope,
            "start_ms": start}  # fmt: skip


def launch(world):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
        subprocess.run([*command, __file__, "--worker", str(path)], check=True, env=environment)
        return json.loads(path.read_text())


ABOUT = f"""- every rank has one thread; {LAYERS} layers of {SHAPE[0]} x {SHAPE[1]} float32, `Shard(0)`; forward and
  backward, with gradients of weights and parameters
- *collectives*, *bytes*: counted, forward + backward; bytes are those that a rank sends for each layer; they do not
  depend on the size of the weights
- *on shards*: the op on DTensors; *kernel alone*: the same kernel on the local shards, without a message; medians of
  the slowest rank; *extra*: the median of the rounds' differences, and its quartiles; timed only where all results are
  those of whole weights"""


def paper(row):
    """(collectives, bytes sent, bytes received, seconds) of a step of Llama-3-8B on GPUS ranks."""
    collectives, sent = sum(row["collectives"]), sum(row["bytes"]) * len(llama())
    return collectives, sent, sent * GPUS, collectives * LATENCY


def markdown(data):
    number = report.number
    parts = [
        f"# Sharded weights on {data['machine']['device']}, {data['date']}",
        report.facts(data, " per rank") + ABOUT,
    ]
    for ranks in dict.fromkeys(row["ranks"] for row in data["rows"]):
        lines = [
            ("op", "collectives", "bytes", "on shards, ms", "kernel alone, ms", "extra, ms", "quartiles"),
            ("---", *["---:"] * 6),
        ]
        for row in data["rows"]:
            if row["ranks"] == ranks:
                low, middle, high = row["extra_ms"]
                lines.append(
                    (
                        row["op"],
                        " + ".join(map(str, row["collectives"])),
                        " + ".join(f"{b:,.0f}" for b in row["bytes"]),
                        number(row["ms"]),
                        number(row["alone_ms"]),
                        f"{middle:.2f}",
                        f"{low:.2f} to {high:.2f}",
                    )
                )
        parts += [f"## {ranks} ranks", report.table(lines)]
    head = ("ranks", "op", *[f"{n} layers" for n in COUNTS], "slope, us per layer", "start, ms")
    lines = [head, ("---:", "---", *["---:"] * (len(COUNTS) + 2))]
    for row in data["slopes"]:
        extra = [f"{ms:.2f}" for ms in row["extra_ms"]]
        lines.append((str(row["ranks"]), row["op"], *extra, number(row["slope_us"]), number(row["start_ms"])))
    shape = f"{SMALL[0]} x {SMALL[1]}"
    parts += [f"## Extra milliseconds against the number of layers, {shape} each", report.table(lines)]
    total = sum(a * b for a, b in llama())
    parts += [
        f"## On paper: Llama-3-8B on {GPUS} GPUs",
        f"The {len(llama())} matrices of {total / 1e9:.2f}e9 parameters, all sharded over {GPUS} ranks, in one call. "
        f"Not measured: bytes and collectives are those counted above, which depend on the number of layers alone; "
        f"latency is {LATENCY * 1e6:.0f} us for each collective. To gather the weights themselves in bfloat16 every "
        f"rank would receive {2 * total / 1e9:.1f} GB.",
    ]
    lines = [("op", "collectives", "kB a rank sends", "MB a rank receives", "latency, ms"), ("---", *["---:"] * 4)]
    for row in data["rows"]:
        if row["ranks"] == data["rows"][0]["ranks"]:
            collectives, sent, received, seconds = paper(row)
            cells = str(collectives), number(sent / 1e3), number(received / 1e6), f"{1e3 * seconds:.2f}"
            lines.append((row["op"], *cells))
    return "\n\n".join([*parts, report.table(lines)]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
    torch.set_num_threads(1)
    data = {**report.header("cpu"), "slopes": []}
    for world in args.ranks:
        found = launch(world)
        data["rows"] += found["rows"]
        data["slopes"] += found["slopes"]
        data["most load"] = max(data["most load"], report.load())
    stem = args.results / ("sharded-" + report.file_stem(data))
    report.write(data, stem, sys.modules[__name__])
    print(markdown(data))


if __name__ == "__main__":
    main()
