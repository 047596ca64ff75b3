"""`make gpu-check` rehearsed on the CPU: every stage in small, and children that crash, hang, print without end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
STAGES = ("smoke", "tests", "graphs", "kernels", "bench")

CASES = """
import os, sys, time
from gpu.child import Case

def fail():
    raise ValueError("wrong numbers")

def flood():
    for _ in range(200):
        print("x" * 65536)
    print("the last line")

def endless():
    subprocess = __import__("subprocess")
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    time.sleep(600)

KINDS = {"good": lambda: {"number": 1}, "bad": fail, "abort": os.abort, "flood": flood, "hang": endless}

def cases(item, device, backend):
    for name in item.split("-"):
        yield Case(name, KINDS[name], 1 if name == "hang" else 60)
"""


@pytest.fixture(scope="module")
def modules():
    before = sys.path[:]
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu_check
    from gpu import machine, processes

    sys.path[:] = before
    return types.SimpleNamespace(check=gpu_check, machine=machine, processes=processes)


@pytest.fixture
def task(modules, tmp_path):
    """Makes a task whose cases are those named."""
    (tmp_path / "failing.py").write_text(CASES)
    path = modules.processes.ENVIRONMENT["PYTHONPATH"] + f":{tmp_path}"

    def task(item, seconds=30):
        command = [sys.executable, "-m", "gpu.child", "failing", item, "--device", "cpu"]
        return modules.processes.Task(item, command, seconds, cases=True, environment={"PYTHONPATH": path})

    return task


def by_case(outcome):
    return {row["case"]: row for row in outcome["rows"]}


def test_a_crash_stops_nothing_that_follows(modules, task):
    outcome = modules.processes.run(task("good-abort-bad-abort-good"), 30)
    assert [row["ok"] for row in outcome["rows"]] == [True, False, False, False, True]
    assert outcome["state"] == "failed"
    assert by_case(outcome)["good"]["number"] == 1 and by_case(outcome)["bad"]["error"] == "ValueError: wrong numbers"
    assert "crashed (SIGABRT)" in by_case(outcome)["abort"]["error"]
    assert "os.abort" in outcome["printed"] or "Fatal Python error: Aborted" in outcome["printed"]


def test_a_hang_ends_with_its_case(modules, task):
    start = time.monotonic()
    outcome = modules.processes.run(task("hang-good"), 30)
    assert time.monotonic() - start < 15
    assert by_case(outcome)["hang"]["error"].startswith("hung") and by_case(outcome)["good"]["ok"]
    assert "in endless" in outcome["printed"]


def test_what_is_not_a_case_ends_with_its_time(modules):
    ignores = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('here', flush=True); time.sleep(600)"
    )
    before, modules.processes.GRACE = modules.processes.GRACE, 1
    start = time.monotonic()
    outcome = modules.processes.run(modules.processes.Task("deaf", [sys.executable, "-c", ignores], 60), 2)
    modules.processes.GRACE = before
    assert outcome["state"] == "stopped: its time was up" and time.monotonic() - start < 12
    assert outcome["printed"].startswith("here") and "Fatal Python error: Aborted" in outcome["printed"]


def test_what_prints_megabytes_is_cut(modules, task):
    outcome = modules.processes.run(task("flood-good"), 30)
    assert outcome["state"] == "passed" and len(outcome["printed"]) <= modules.processes.PRINTED
    assert "the last line" in outcome["printed"]


def test_a_failed_build_is_told(modules, tmp_path, monkeypatch):
    """With its last lines, and the part for the CPU is built all the same."""
    code = "import os, sys; print('ninja: build stopped'); sys.exit(os.environ['R2KERNELS_CUDA'] == '1')"
    built = []

    def build(cuda, nvcc=None):
        built.append(cuda)
        return real(cuda, nvcc)._replace(command=[sys.executable, "-c", code])

    real = modules.machine.build
    monkeypatch.setattr(modules.machine, "build", build)
    monkeypatch.setattr(modules.machine, "ROOT", tmp_path)
    done, plan = [], modules.check.Plan("cuda", tmp_path)
    steps = modules.machine.batches(plan, done)
    for tasks in steps:
        if tasks[0].cases:
            break
        done += [modules.processes.run(task, 30) for task in tasks]
    assert built == [True, False] and [one["state"] for one in done] == ["failed (exit code 1)", "passed"]
    assert "ninja: build stopped" in "".join(sys.modules["gpu.book"].failures(done[0]))


def test_a_stage_of_failures_is_written_as_it_goes(modules, task, tmp_path, monkeypatch):
    files = []
    folder = tmp_path / "results"
    folder.mkdir()

    def batches(plan, done):
        yield [task("good-bad"), task("abort")]
        files.append(json.loads((folder / "smoke.json").read_text())["tasks"])
        yield [task("good")]

    stage = types.SimpleNamespace(batches=batches, WORKERS=2, table=lambda tasks: f"{len(tasks)} tasks")
    monkeypatch.setitem(sys.modules, "gpu.smoke", stage)
    plan, said = modules.check.Plan("cpu", tmp_path / "extra"), []
    outcomes = modules.check.run_stage("smoke", plan, {}, folder, time.monotonic() + 100, (), said.append)
    assert {one["task"]: one["state"] for one in outcomes} == {
        "good-bad": "failed",
        "abort": "failed",
        "good": "passed",
    }
    assert len(files[0]) == 2
    text = (folder / "gpu-check.txt").read_text()
    assert "bad: ValueError: wrong numbers" in text and "crashed (SIGABRT)" in text and "3 tasks" in text
    assert "bad: ValueError" in "".join(said)
    with tarfile.open(folder / "gpu-check.tar.gz") as tar:
        assert "printed/smoke/abort.txt" in tar.getnames()
    late = modules.check.run_stage("smoke", plan, {}, folder, time.monotonic() + 1, (), said.append)
    assert {one["state"] for one in late} == {"not reached"}


def test_the_script_ends_its_children(tmp_path):
    command = [sys.executable, str(SCRIPT), "smoke", "--device", "cpu", "--results", str(tmp_path)]

    def running():
        shown = subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True, check=True).stdout
        return [line for line in shown.splitlines() if f"--records {tmp_path}" in line]

    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # where a child is told to write
    script = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    while "at most" not in script.stdout.readline():
        assert script.poll() is None
    while not running():
        assert script.poll() is None, script.stdout.read()
        time.sleep(0.1)
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=20) == 143
    script.stdout.close()
    assert not running()


def test_without_torch_nothing_runs(modules, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(modules.machine, "is_there", lambda package: package != "torch")
    monkeypatch.setattr(modules.check.signal, "signal", lambda *_: None)
    assert modules.check.main(["all", "--device", "cpu", "--results", str(tmp_path)]) == 1
    assert "torch is not installed; left out: everything" in capsys.readouterr().out


class Cuda(str):
    """A device that calls itself cuda, and whose tensors lie on the CPU."""

    def __eq__(self, other):
        return other == "cuda"

    __hash__ = str.__hash__


@pytest.fixture
def stood_in(modules, monkeypatch):
    """What only a GPU runs, over stand-ins of torch.cuda: a graph whose replay computes nothing, events a millisecond
    apart, a first stream that stays busy."""

    class Stand:
        L2_cache_size = 100_000

        def __init__(self, *_, **__):
            pass

        def nothing(self, *_):
            pass

        wait_stream = synchronize = record = replay = nothing

        def query(self):
            return False

        def elapsed_time(self, _):
            return 1.0

    quiet = dict(synchronize=lambda: None, _sleep=lambda _: None, mem_get_info=lambda: (2**20, 2**40))
    contexts = dict.fromkeys(("stream", "graph"), lambda _: contextlib.nullcontext())
    made = dict.fromkeys(("Stream", "current_stream", "CUDAGraph", "Event", "get_device_properties"), Stand)
    marks = types.SimpleNamespace(start=lambda: None, stop=lambda: None)
    for name, stand in {**quiet, **contexts, **made, "profiler": marks}.items():
        monkeypatch.setattr(torch.cuda, name, stand)
    return Cuda("cpu")


def test_graphs_are_captured_and_compared(stood_in):
    from gpu import graphs, large

    with pytest.raises(AssertionError, match=r"replay 1 differs from the call in \[0, 1, 2, 3, 4\]"):
        graphs.captured_op("soft_min_max", "list", "float32", stood_in)
    with pytest.raises(AssertionError, match="step 1 differs"):
        graphs.captured_training("no module", stood_in)
    assert graphs.two_streams("lsq", stood_in) == {"overlapped": 6}
    with pytest.raises(MemoryError, match="1,048,576 bytes are free"):
        large.tensor(stood_in)


def test_kernels_are_timed_by_events_where_the_profiler_sees_none(stood_in, monkeypatch):
    from gpu import device_time, kernels

    monkeypatch.setattr(device_time, "by_profiler", lambda calls: {})
    monkeypatch.setattr(kernels, "NUMBERS", {"11.7M": 20_011})
    kernels.weight_sets.cache_clear()
    rows = {case.name: case.run() for case in kernels.cases("dkm4-bfloat16", stood_in, "cpu")}
    first = rows["dkm, K = 4, T = 1 forward, 11.7M"]
    assert first["method"] == "events" and first["sets"] == 7 and first["us"] == pytest.approx(1000 / 7)
    assert first["share"] == pytest.approx(3 / 2)  # read twice and written once, in the time of a copy
    assert kernels.of_a_list("l_inf", stood_in, "cpu")["replay us"] == 50
    counted = {case.name: case for case in kernels.cases("counters-range-float32", stood_in, "cpu")}
    assert counted["kure backward, 11.7M"].run() == {"item": "range-float32", "backend": "cpu"}
    kernels.weight_sets.cache_clear()


def test_a_tool_runs_a_child(modules, tmp_path):
    """As compute-sanitizer does, whose reports fail the task though its cases passed."""
    tool = tmp_path / "sanitizer"
    tool.write_text('#!/bin/sh\nwhile [ "$1" != "--" ]; do shift; done; shift; "$@" || exit 1; echo HAZARD; exit 9\n')
    tool.chmod(0o755)
    plan = modules.check.Plan("cpu", tmp_path)
    task = modules.processes.child(
        "smoke", "touch-quantizers-float32", plan, 60, backend="reference", wrapper=(str(tool), "--")
    )
    outcome = modules.processes.run(task, 60)
    assert outcome["state"] == "failed (exit code 9)" and len(outcome["rows"]) == 8
    assert all(row["ok"] for row in outcome["rows"]) and outcome["printed"].endswith("HAZARD\n")
    assert "HAZARD" in sys.modules["gpu.book"].failures(outcome)[-1]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """Of every stage."""
    folder = tmp_path_factory.mktemp("gpu-check")
    command = [sys.executable, str(SCRIPT), "all", "--device", "cpu", "--results", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    return done, folder


def test_every_stage_passes(rehearsal):
    done, folder = rehearsal
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    written = {path.name for path in folder.iterdir()}
    assert written == {"gpu-check.txt", "gpu-check.tar.gz", *(f"{stage}.json" for stage in STAGES)}


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_writes(stage, rehearsal):
    data = json.loads((rehearsal[1] / f"{stage}.json").read_text())
    assert data["stage"] == stage and data["machine"]["device"] and data["date"]
    assert {"torch", "r2kernels"} <= set(data["versions"]) and data["tools"].keys() == {
        "nvcc",
        "compute-sanitizer",
        "ncu",
    }
    assert data["tasks"] and all(task["state"] == "passed" for task in data["tasks"])
    text = (rehearsal[1] / "gpu-check.txt").read_text()
    assert data["text"] in text


def test_only_files_that_take_a_device_run_on_one(modules):
    from gpu import tests

    of_backends, others = ({str(path.relative_to(ROOT / "tests")) for path in some} for some in tests.files())
    assert {"range_losses/test_backends.py", "dkm/test_backends.py", "test_ops.py"} <= of_backends
    assert "test_devices.py" in others and not {"test_gpu_check.py", "test_law.py"} & (of_backends | others)


def test_the_slowest_kernels_are_counted(modules):
    """Of the backends that are each op's default, before the others are timed."""
    from gpu import kernels

    plan, done = modules.check.Plan("cuda", ROOT, ("triton", "cuda"), {"ncu": "/bin/ncu"}), []
    rows = [
        {"ok": True, "case": f"case {i}", "item": "range-float32", "backend": "triton", "share": i} for i in range(5)
    ]
    names = []
    for (task,) in kernels.batches(plan, done):
        names.append(task.name)
        done += [{"rows": rows}] if not done else []
        if "ncu" in task.name:
            assert task.command[:2] == ["/bin/ncu", "--profile-from-start"]
            assert task.command[task.command.index("--only") + 1] in ("case 0", "case 1", "case 2")
    counted = [i for i, name in enumerate(names) if "ncu" in name]
    assert len(counted) == 3 and names.index("dkm16-float32, cuda") < counted[0] < names.index("dkm16-float32, triton")
    assert names.index("range-float32, triton") < counted[0] < names.index("range-float32, cuda")


def test_what_is_measured(rehearsal):
    tasks = json.loads((rehearsal[1] / "kernels.json").read_text())["tasks"]
    timed = [row for task in tasks for row in task["rows"] if "share" in row]
    assert {row["case"] for row in timed} >= {
        "lsq forward, 11.7M",
        "lsq backward, 256M",
        "dkm, K = 4, T = 5 backward, 256M",
    }
    for row in timed:
        assert row["us"] > 0 and 0 < row["share"] < 10 and row["method"] == "clock" and len(row["rounds"]) == 3
    bench = json.loads((rehearsal[1] / "bench.json").read_text())
    assert "| call | r2kernels |" in bench["text"]
    with tarfile.open(rehearsal[1] / "gpu-check.tar.gz") as tar:
        assert len([name for name in tar.getnames() if name.startswith("bench/") and name.endswith(".json")]) == 3
