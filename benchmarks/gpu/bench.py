"""The benchmarks of every family on the device, and the README's table of them."""

import importlib.util
import sys

from .processes import Task

WORKERS = 1
FAMILIES = {"range_losses": 190, "dkm": 160, "quantizers": 130}  # seconds
CASE_SECONDS = 1
LAST = 30  # seconds for the case under way and the figure
REHEARSED = {
    "range_losses": "l_inf and MobileNet-V2 and forward and not backward",
    "dkm": "assignment and scalars",
    "quantizers": "lsq and ResNet-18 and not axis",
}


def task(family, plan):
    seconds = FAMILIES[family]
    command = [sys.executable, "-m", "pytest", f"benchmarks/bench_{family}.py", "-q", "-p", "no:cacheprovider"]
    command += ["--bench-device", plan.device, "--bench-results", str(plan.extra), "--tb=short"]
    if plan.device == "cpu":
        command += ["-k", REHEARSED[family], "--bench-case-seconds", "0.01"]
        return Task(f"bench_{family}", command, 100)
    command += ["--bench-case-seconds", str(CASE_SECONDS), "--bench-seconds", str(seconds - LAST)]
    if importlib.util.find_spec("pytest_benchmark"):
        command.append("--benchmark-quiet")
    return Task(f"bench_{family}", command, seconds)


def batches(plan, done):
    if "pytest" in plan.absent:
        return
    command = [sys.executable, "benchmarks/readme_table.py", "--of", str(plan.extra)]
    drawn = Task("the README's table", command, 30)
    every = [task(family, plan) for family in FAMILIES]
    for some in [every] if plan.device == "cpu" else [[one] for one in every]:
        yield some
        yield [drawn]  # of what there is so far: the time may be up before the next has ended


def table(tasks):
    """The README's table, as its script has printed it."""
    drawn = [task["printed"] for task in tasks if "readme_table" in task["command"] and task["state"] == "passed"]
    return drawn[-1] if drawn else "no table was made"
