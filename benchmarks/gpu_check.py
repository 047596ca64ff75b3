"""What `make gpu-check` runs after the build: the tests on CUDA tensors, then the benchmarks, each within its own time.

    python benchmarks/gpu_check.py [--seconds 420] [--results FOLDER]

Needs no network. Writes gpu-check.log and gpu-check.json into benchmarks/results as it goes. Exit code 0 where all
that could run has passed. A package that is absent is named, and what needs it is left out.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDED = {"torch": "everything", "pytest": "the tests and the benchmarks"}
WANTED = {
    "triton": "the Triton backend",
    "pytest_benchmark": "pytest-benchmark's own report (the tables are written without it)",
    "hypothesis": "the property tests",
    "matplotlib": "the figure, and the tests of --plot",
    "rich": "the tests of the command line",
    "safetensors": "the tests of .safetensors",
    "sklearn": "the demo and its tests",
}
GRACE = 10  # seconds between asking a step to stop and killing it


def steps(results):
    """(name, command, part of the time left that it may take): the tests get at most half, the benchmarks share the
    rest."""
    python = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    yield "tests", [*python, "tests", "--device", "cuda", "-q", "--continue-on-collection-errors"], 1 / 2
    options = ["--bench-device", "cuda", "--bench-results", str(results), "--bench-case-seconds", "1"]
    if importlib.util.find_spec("pytest_benchmark"):
        options.append("--benchmark-quiet")
    for name, part in (("bench_range_losses", 1 / 2), ("bench_dkm", 1 / 2), ("bench_quantizers", 1)):
        yield name, [*python, f"benchmarks/{name}.py", "-q", *options], part


def run(name, command, seconds, log):
    """One step; what it prints goes to the log. Its processes are stopped when the time is up."""
    start = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    stopped = False
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        stopped, code = True, stop(process)
    except BaseException:
        stop(process)
        raise
    state = "stopped: its time was up" if stopped else "passed" if code == 0 else f"failed (exit code {code})"
    return {
        "step": name,
        "state": state,
        "seconds": round(time.monotonic() - start, 1),
        "allowed": round(seconds, 1),
        "command": " ".join(command[1:]),
    }


def stop(process):
    """Interrupts the step, so that it writes what it has, then kills what is left of it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def machine():
    """What the check ran on; raises where torch or its GPU is missing."""
    sys.path.insert(0, str(ROOT))
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__, "gpu": torch.cuda.get_device_name(0)}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    import r2kernels

    return {
        **found,
        "r2kernels": r2kernels.__version__,
        "backends": {name: reason or "usable" for name, reason in r2kernels.backends().items()},
    }


def check(results, seconds, say=print):
    """Runs the steps; the summary, written after each of them."""
    results.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    absent = {
        package: use for package, use in {**NEEDED, **WANTED}.items() if importlib.util.find_spec(package) is None
    }
    summary = {"machine": {}, "absent packages": absent, "steps": []}

    def save():
        part = results / "gpu-check.json.part"
        part.write_text(json.dumps(summary, indent=1))
        part.replace(results / "gpu-check.json")

    for package, use in absent.items():
        say(f"gpu-check: {package} is not installed; left out: {use}")
    save()
    if missing := [package for package in NEEDED if package in absent]:
        say(f"gpu-check: nothing can run without {' and '.join(missing)}")
        return summary
    try:
        summary["machine"] = machine()
    except (RuntimeError, AssertionError, ImportError, OSError) as error:
        summary["steps"].append({"step": "machine", "state": f"failed ({type(error).__name__}: {error})"})
        save()
        say(f"gpu-check: {error}")
        return summary
    say(f"gpu-check: {summary['machine']}")
    with (results / "gpu-check.log").open("w+") as log:
        for name, command, part in steps(results):
            allowed = part * (deadline - time.monotonic() - GRACE)
            if name != "tests":
                # a case under way, and the figure, take a while
                command = [*command, "--bench-seconds", f"{max(allowed - 45, 1):.0f}"]
            say(f"gpu-check: {name}, at most {allowed:.0f} s")
            at = log.seek(0, os.SEEK_END)
            summary["steps"].append({"step": name, "state": "running"})
            save()
            summary["steps"][-1] = run(name, command, max(allowed, 1), log)
            save()
            log.seek(at)
            say("".join(log.readlines()[-60:]))
    for step in summary["steps"]:
        say(f"gpu-check: {step['step']} {step['state']} after {step['seconds']} s of {step['allowed']}")
    return summary


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="The tests on CUDA tensors, then the benchmarks, within a time budget."
    )
    parser.add_argument("--seconds", type=float, default=420, help="for both together (default 420)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    args = parser.parse_args(argv)
    done = check(args.results.resolve(), args.seconds)["steps"]
    return 0 if done and all(step["state"] == "passed" for step in done) else 1


if __name__ == "__main__":
    sys.exit(main())
