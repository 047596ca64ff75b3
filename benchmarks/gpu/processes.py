"""Processes that may crash, hang or print without end: each in a session of its own, within its own time."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT, ROOT / "benchmarks", ROOT / "tests")
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(map(str, FOLDERS)) + os.pathsep + os.environ.get("PYTHONPATH", ""),
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
    "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // 8, 1)),  # several run beside each other
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # torch's own products are to repeat to the bit too
}
PRINTED = 64_000  # bytes of what a process prints last that are kept
GRACE = 8  # seconds between asking a process to stop and killing it
LOST = 3  # exit code of a process that can no longer use its device
RESTARTS = 6  # of one task: after each crash with the case that follows


class Task(NamedTuple):
    """`command` is run with the options --records FILE and --start INDEX where its `cases` are those of child.py."""

    name: str
    command: list
    seconds: float
    cases: bool = False
    environment: dict = {}


def child(stage, item, plan, seconds, *options, backend=None, wrapper=()):
    """The task that runs the cases of an item of a stage in a process of its own."""
    command = [*wrapper, sys.executable, "-m", "gpu.child", f"gpu.{stage}", item, "--device", plan.device]
    name = " ".join([*(Path(wrapper[0]).name, *wrapper[1:3]), item] if wrapper else [item])
    if backend:
        command += ["--backend", backend]
    return Task(f"{name}, {backend}" if backend else name, [*command, *options], seconds, cases=True)


def rehearsed(stage, parts, plan, seconds):
    """The tasks that rehearse a stage: of each item a part, on each backend."""
    return [
        child(stage, item, plan, seconds, "--only", part, backend=backend)
        for item, part in parts.items()
        for backend in plan.backends
    ]


class Tail(threading.Thread):
    """The last bytes of a stream."""

    def __init__(self, stream):
        super().__init__(daemon=True)
        self.stream, self.bytes = stream, b""
        self.start()

    def run(self):
        with contextlib.suppress(ValueError):  # closed under a grandchild that still holds it
            while piece := self.stream.read1(65536):
                self.bytes = (self.bytes + piece)[-PRINTED:]

    def text(self):
        return self.bytes.decode(errors="replace")


_running, _closing = set(), threading.Event()


def kill(process):
    """The process and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def kill_all():
    """Ends all that run, and begins nothing more."""
    _closing.set()
    for process in tuple(_running):
        kill(process)


def stop(process):
    """Asks first, so that it writes what it has; then lets it show where it hangs; then kills it."""
    for number, seconds in ((signal.SIGINT, GRACE), (signal.SIGABRT, 2), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=seconds)


def execute(command, seconds, environment):
    """(exit code or None where its time was up, what it printed last)"""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    _running.add(process)
    tail = Tail(process.stdout)
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        code = None
        stop(process)
    finally:
        kill(process)
        _running.discard(process)
    tail.join(timeout=2)
    return code, tail.text()


def read_records(path):
    """Whole lines; a process that was killed may have left a part of one."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def rows_of(records):
    """(the rows of the cases, the index of the case that was never finished, or None)"""
    rows, open_case = [], None
    for record in records:
        if "begun" in record:
            open_case = record
        else:
            rows.append(record)
            open_case = None
    return rows, open_case


def ended(code):
    """How a process ended, in words."""
    if code is None:
        return "stopped: its time was up"
    if code == 0:
        return "passed"
    return f"crashed ({signal.Signals(-code).name})" if code < 0 else f"failed (exit code {code})"


def run(task, seconds):
    """The outcome of a task: after a case that crashed or hung it goes on with the next one."""
    start, rows, printed, state = time.monotonic(), [], "", "not reached"
    with tempfile.TemporaryDirectory() as folder:
        path, first = Path(folder) / "records", 0
        for attempt in range(RESTARTS + 1):
            left = seconds - (time.monotonic() - start)
            if left < 1 or _closing.is_set():
                state = "stopped: its time was up" if attempt else "not reached"
                break
            command = list(map(str, task.command))
            if task.cases:
                path.unlink(missing_ok=True)
                command += ["--records", str(path), "--start", str(first)]
            code, text = execute(command, left, task.environment)
            printed, state = (printed + text)[-PRINTED:], ended(code)
            found, unfinished = rows_of(read_records(path)) if task.cases else ([], None)
            rows += found
            if unfinished is None:
                break
            how = {None: "its time was up", 1: "hung", LOST: "lost the device"}.get(code, ended(code))
            rows.append({"case": unfinished["begun"], "ok": False, "error": f"{how}: {last_words(text)}"})
            first = unfinished["index"] + 1
    if state in (ended(0), ended(1)) and not all(row["ok"] for row in rows):
        state = "failed"
    return {
        "task": task.name,
        "state": state,
        "seconds": round(time.monotonic() - start, 1),
        "allowed": round(seconds, 1),
        "command": " ".join(map(str, task.command)),
        "rows": rows,
        "printed": printed,
    }


def last_words(text, most=400):
    """The end of what was printed, in one line."""
    return " ".join(text.split())[-most:]
