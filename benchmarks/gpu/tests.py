"""Each file of tests that takes CUDA tensors in a process of its own, with each backend; its tests of the CPU alone are
left out."""

import re
import sys

from .processes import ROOT, Task

WORKERS = 6
SECONDS = 240  # of a file
EACH = 90  # of a test, where pytest-timeout is installed
FAILURES = 10  # after which the rest of a file is given up: one illegal access fails all that follow
TAKES_A_DEVICE = re.compile(r"def \w+\([^)]*\b(device|variants?)\b")
CHOSEN = re.compile(r"def \w+\([^)]*\bvariants?\b")
OF_THE_CPU = ("static", "gpu_check")  # these look as if they took a device
NEEDED = {"test_properties.py": "hypothesis"}
REHEARSED = "regularizers/test_weight_stats.py"
SUMMARY = re.compile(r"^=*\s*(.*\d+ (?:passed|failed|error|skipped|deselected).*?)\s*=*$", re.M)


def files():
    """(the files whose tests are of backends, those that take the default one)"""
    every = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda path: (path.parent == ROOT / "tests", path))
    texts = {path: path.read_text() for path in every}
    taking = [path for path in every if TAKES_A_DEVICE.search(texts[path])]
    taking = [path for path in taking if not any(part in path.name for part in OF_THE_CPU)]
    of_backends = [path for path in taking if CHOSEN.search(texts[path])]
    return of_backends, [path for path in taking if path not in of_backends]


def task(path, plan, *options):
    limits = [] if "pytest_timeout" in plan.absent else ["--timeout", str(EACH)]
    command = [sys.executable, "-m", "pytest", str(path), "--device", plan.device, *options, *limits]
    command += ["-q", "-p", "no:cacheprovider", "-p", "gpu.takes_device", f"--maxfail={FAILURES}", "--tb=short"]
    name = ", ".join([str(path.relative_to(ROOT / "tests")), *options[1:]])
    return Task(name, command, SECONDS)


def batches(plan, done):
    if "pytest" in plan.absent:
        return
    if plan.device == "cpu":
        yield [task(ROOT / "tests" / REHEARSED, plan)]
        return
    of_backends, others = ([path for path in some if NEEDED.get(path.name) not in plan.absent] for some in files())
    yield [task(path, plan, "--backend", backend) for path in of_backends for backend in plan.backends]
    yield [task(path, plan) for path in others]


def table(tasks):
    """What pytest said last of each file."""
    said = {task["task"]: SUMMARY.findall(task["printed"]) for task in tasks if "pytest" in task["command"]}
    return "\n".join(f"{name}: {found[-1]}" for name, found in said.items() if found) or "no test was run"
