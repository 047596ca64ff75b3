"""The paper's tables in shape: `make paper`, or

    python benchmarks/paper [--full] [--seeds N] [--networks ...] [--losses ...] [--methods ...] [--results FOLDER]
    torchrun --nproc-per-node 8 benchmarks/paper --data IMAGENET --full

Trains every network with every loss on scikit-learn's digits, or on the pictures of DIR/train and DIR/val, then
quantizes each with every method. Results are written after every training; the next call with the same options goes on
from there.
"""

import argparse
import concurrent.futures
import datetime
import json
import multiprocessing
import os
import platform
import sys
from pathlib import Path

import torch
from networks import NETWORKS
from tables import helps, markdown, tables
from torch import distributed
from training import LOSSES, METHODS, Job, Plan, alone, processes, run

RESULTS = Path(__file__).parents[1] / "results"
# epochs of training and of each method, seeds
QUICK, FULL, PICTURES = (20, 3, 2), (60, 10, 5), (90, 20, 1)


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="benchmarks/paper", description="Trains with every loss, quantizes with every method."
    )
    parser.add_argument("--full", action="store_true", help="hours instead of minutes: more epochs, five seeds")
    parser.add_argument("--seeds", type=int, metavar="N")
    parser.add_argument("--epochs", type=int, metavar="N", help="of training")
    parser.add_argument("--tuning-epochs", type=int, metavar="N", help="of each quantization")
    for name, known in (("networks", NETWORKS), ("losses", LOSSES), ("methods", METHODS)):
        parser.add_argument(
            f"--{name}", nargs="+", choices=list(known), default=list(known), metavar="NAME", help=", ".join(known)
        )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="pictures in DIR/train/CLASS and DIR/val/CLASS instead of digits"
    )
    parser.add_argument(
        "--batch", type=int, default=256, help="pictures a step, of all processes together (default 256; digits: 120)"
    )
    parser.add_argument("--size", type=int, default=224, help="side of a picture (default 224)")
    parser.add_argument("--workers", type=int, default=4, help="processes that read pictures (default 4)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() if not torch.cuda.is_available() else 1,
        help="trainings side by side (digits)",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--fresh", action="store_true", help="do not go on from earlier results")
    args = parser.parse_args(argv)
    for name in ("seeds", "epochs", "tuning_epochs", "batch", "size", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.data is not None and not args.data.is_dir():
        parser.error(f"--data {args.data}: there is no such folder")
    epochs, tuning, seeds = FULL if args.full else QUICK
    if args.data is not None and args.full:
        epochs, tuning, seeds = PICTURES
    args.epochs, args.tuning_epochs, args.seeds = (
        args.epochs or epochs,
        args.tuning_epochs or tuning,
        args.seeds or seeds,
    )
    return args


def plan_of(args):
    usual = Plan(args.epochs, args.tuning_epochs)
    return (
        usual
        if args.data is None
        else usual._replace(
            data=str(args.data), batch=args.batch, size=args.size, workers=args.workers, learning_rate=0.1
        )
    )


def key(job):
    return json.dumps([job.network, job.loss, job.seed, list(job.methods), list(job.plan)])


class Results:
    """What is done, in a file that is always whole."""

    def __init__(self, args):
        name = "paper" if args.data is None else f"paper-{args.data.resolve().name}"
        self.path = args.results / f"{name}.json"
        setting = {
            "data": "scikit-learn digits" if args.data is None else args.data.name,
            "epochs": args.epochs,
            "epochs of each method": args.tuning_epochs,
            "seeds": args.seeds,
            "device": args.device,
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "torch": torch.__version__,
        }
        self.data = {"date": datetime.date.today().isoformat(), "setting": setting, "jobs": []}
        if self.path.exists() and not args.fresh:
            self.data["jobs"] = json.loads(self.path.read_text())["jobs"]

    def keep(self, keys):
        """Drops what earlier calls with other options found."""
        self.data["jobs"] = [job for job in self.data["jobs"] if job["key"] in keys]

    @property
    def done(self):
        return {job["key"] for job in self.data["jobs"]}

    def add(self, job, found):
        self.data["jobs"].append(
            {"key": key(job), "network": job.network, "loss": job.loss, "seed": job.seed, "found": found}
        )
        self.write()

    def write(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path, text in (
            (self.path, json.dumps(self.data, indent=1)),
            (self.path.with_suffix(".md"), markdown(self.data)),
        ):
            if path.exists() and path.read_text() == text:
                continue
            part = path.with_name(path.name + ".part")
            part.write_text(text)
            part.replace(path)


def work(args, jobs, results, progress):
    """All jobs that are not done: digits side by side, each in a process with one thread; pictures one after the other,
    in all processes of torchrun."""
    if args.data is None and args.jobs > 1 and args.device == "cpu" and len(jobs) > 1:
        with concurrent.futures.ProcessPoolExecutor(
            min(args.jobs, len(jobs)), multiprocessing.get_context("spawn")
        ) as pool:
            running = {pool.submit(alone, job): job for job in jobs}
            try:
                for finished in concurrent.futures.as_completed(running):
                    results.add(running[finished], finished.result())
                    progress.advance(0)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return
    for job in jobs:
        found = run(
            job,
            lambda what, job=job: progress.update(0, description=f"{job.network}, {job.loss}, seed {job.seed}: {what}"),
        )
        if not distributed.is_initialized() or distributed.get_rank() == 0:
            results.add(job, found)
        progress.advance(0)


def show(console, data):
    from rich.table import Table

    for title, header, rows in tables(data["jobs"]):
        table = Table(*header, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table, "")
    for title, lines in zip(("A range loss helps:", "None helps beyond the spread:"), helps(data["jobs"]), strict=True):
        console.print(title, *(f"  {line}" for line in lines or ["nowhere"]), sep="\n")


def main(argv=None):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    args = parse(argv)
    with processes(args.device) as device:
        first = not distributed.is_initialized() or distributed.get_rank() == 0
        everything = [
            Job(network, loss, seed, tuple(args.methods), plan_of(args), device)
            for seed in range(args.seeds)
            for network in args.networks
            for loss in args.losses
        ]
        results = Results(args)
        results.keep({key(job) for job in everything})
        left = [job for job in everything if key(job) not in results.done]
        console = Console(quiet=not first)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        try:
            with Progress(*columns, console=console) as progress:
                progress.add_task("trainings", total=len(everything), completed=len(everything) - len(left))
                work(args, left, results, progress)
        except ValueError as error:
            print(f"benchmarks/paper: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"stopped; what is done is in {results.path}, and the next call goes on from there", file=sys.stderr)
            return 130
        if first:
            results.write()  # with the setting of this call, also where all was done
            show(console, results.data)
            console.print(f"results: {results.path} and .md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
