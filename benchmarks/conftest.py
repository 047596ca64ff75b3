"""Options, and the results file, which is written anew after every case.

    pytest benchmarks/bench_range.py                         the CPU
    pytest benchmarks/bench_range.py --bench-device cuda     a GPU
"""
import contextlib
import importlib.util
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

import report  # noqa: E402


def pytest_addoption(parser):
    group = parser.getgroup("r2kernels")
    group.addoption("--bench-device", default="cpu", choices=("cpu", "cuda"))
    group.addoption("--bench-seconds", type=float, default=540, help="time for the whole run; results name the cases not reached (default 540)")
    group.addoption("--bench-case-seconds", type=float, default=2, help="about how long the contenders of one case are timed (default 2)")
    group.addoption("--bench-results", type=Path, default=HERE / "results", help="folder for the JSON, the Markdown tables and the figure")


def pytest_configure(config):
    if importlib.util.find_spec("pytest_benchmark") is None:
        config.addinivalue_line("markers", "benchmark: of pytest-benchmark, which is not installed")


class Results:
    """The rows so far, and where they go."""

    def __init__(self, config):
        self.seconds = config.getoption("bench_case_seconds")
        self.deadline = time.monotonic() + config.getoption("bench_seconds")
        self.data = report.header(config.getoption("bench_device"))
        self.stem = config.getoption("bench_results") / report.file_stem(self.data)
        self.last = None

    def add(self, rows):
        """Takes the rows of a case, once."""
        if rows is self.last:
            return
        self.last = rows
        self.data["rows"] += [dict(row) for row in rows.values()]
        self.data["most load"] = max(self.data["most load"], report.load())
        report.write(self.data, self.stem)


@pytest.fixture(scope="session")
def results(request):
    found = request.config.bench_results_object = Results(request.config)
    yield found
    report.write(found.data, found.stem, figure=True)


def pytest_terminal_summary(terminalreporter, config):
    results = getattr(config, "bench_results_object", None)
    if results is not None:
        terminalreporter.write_line(report.targets(results.data, plain=True))
        terminalreporter.write_line(f"results: {results.stem}.json, .md and .png")


if importlib.util.find_spec("pytest_benchmark") is None:
    @pytest.fixture
    def benchmark():
        """Stands in for pytest-benchmark: the rows are reported without it."""
        class Stub:
            group, extra_info = None, {}

            def pedantic(self, target, rounds):
                with contextlib.suppress(StopIteration):
                    target()
        return Stub()
