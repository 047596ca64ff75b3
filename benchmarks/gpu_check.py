"""What there is to know of a GPU in half an hour, in stages that each fit into nine minutes.

    python benchmarks/gpu_check.py STAGE [--results FOLDER] [--seconds N] [--device cuda]

    smoke    builds; every op, dtype and alignment against float64; compute-sanitizer
    tests    each file of tests that takes CUDA tensors
    graphs   CUDA graphs, torch.compile(mode="reduce-overhead"), streams, 200 repetitions, more than 2^31 numbers
    kernels  device time of every kernel beside a copy and a read; ncu
    bench    the benchmarks beside eager PyTorch, torch.compile and others
    all      these in this order, as far as the time goes

Every family is a process of its own with its own time; one that crashes, hangs or prints without end stops no other.
Writes STAGE.json, gpu-check.txt and gpu-check.tar.gz into the folder as it goes. Fetches nothing; says which packages
and tools are absent, and what is left out for it. Exit code 0 where all has passed. `--device cpu` rehearses every
stage in seconds.
"""

import argparse
import concurrent.futures
import importlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu import machine, processes  # noqa: E402
from gpu.book import Book, failures, line  # noqa: E402

STAGES = ("smoke", "tests", "graphs", "kernels", "bench")
SECONDS = 540  # of a stage
ENOUGH = 15  # seconds: with less left no further task is begun


class Plan(NamedTuple):
    """What the stages need to know."""

    device: str
    extra: Path  # where benchmarks write
    backends: tuple = ()
    tools: dict = {}
    absent: dict = {}


def run_batch(tasks, book, deadline, workers, say):
    """Those that the time still allows, side by side; what has ended is written at once."""

    def one(task):
        left = deadline - time.monotonic()
        outcome = processes.run(task, min(task.seconds, left if left >= ENOUGH else 0))
        book.add(outcome)
        say("\n".join([line(outcome), *([] if outcome["state"] == "passed" else failures(outcome)[:8])]))

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            for future in [pool.submit(one, task) for task in tasks]:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.kill_all()
            raise


def prepared(plan, book, deadline, say):
    """(the plan with the backends that are usable, what every stage's results begin with)"""
    for tasks in machine.batches(plan, book.tasks):
        run_batch(tasks, book, deadline, 1, say)
    rows = book.tasks[-1]["rows"]
    header = rows[0].get("header", {}) if rows else {}
    ours = ("triton", "cuda") if plan.device == "cuda" else ("cpu",)
    found = header.get("backends", dict.fromkeys(ours))  # where even that failed, let each say so itself
    return plan._replace(backends=tuple(name for name in ours if found[name] is None)), header


def run_stage(stage, plan, about, folder, deadline, earlier, say):
    """The outcomes of a stage's tasks; `earlier` are those of the build."""
    module = importlib.import_module(f"gpu.{stage}")
    book = Book(folder, stage, module.table, about, plan.extra)
    for outcome in earlier:
        book.add(outcome)
    for name in ("triton", "cuda") if plan.device == "cuda" else ():
        if name not in plan.backends:
            say(f"gpu-check: backend {name} is not usable: {about.get('backends', {}).get(name)}")
    for tasks in module.batches(plan, book.tasks):
        run_batch(tasks, book, deadline, module.WORKERS if plan.device == "cuda" else 2, say)
    return book.tasks


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "gpu-check", metavar="FOLDER")
    parser.add_argument("--seconds", type=float, help=f"for all that is run (default {SECONDS} for each stage)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder, stages = args.results.resolve(), STAGES if args.stage == "all" else (args.stage,)
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + (args.seconds or SECONDS * len(stages))

    def say(text):
        print(text, flush=True)

    tools = {name: machine.tool(name) for name in machine.TOOLS}
    absent = machine.absent()
    for name, use in absent.items():
        say(f"gpu-check: {name} is not installed; left out: {use}")
    for name, use in machine.TOOLS.items():
        if tools[name] is None:
            say(f"gpu-check: {name} was not found: {use}")
    if "torch" in absent:
        return 1
    about = {"absent packages": absent, "tools": tools}
    plan = Plan(args.device, Path(tempfile.mkdtemp(prefix="gpu-check-")), tools=tools, absent=absent)
    first = Book(folder, stages[0], lambda tasks: "", about, plan.extra)
    plan, header = prepared(plan, first, deadline, say)
    about |= header
    outcomes = []
    for i, stage in enumerate(stages):
        until = min(deadline, time.monotonic() + SECONDS)
        say(f"gpu-check: {stage}, at most {until - time.monotonic():.0f} s")
        outcomes += run_stage(stage, plan, about, folder, until, first.tasks if i == 0 else (), say)
    passed = sum(outcome["state"] == "passed" for outcome in outcomes)
    say(f"gpu-check: {passed} of {len(outcomes)} tasks passed; {folder / 'gpu-check.txt'}")
    return 0 if passed == len(outcomes) else 1


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
