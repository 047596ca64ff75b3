"""Options, and the results file, which is written anew after every case.

pytest benchmarks/bench_range_losses.py                         the CPU
pytest benchmarks/bench_range_losses.py --bench-device cuda     a GPU
"""

import contextlib
import importlib.util
import json
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
    group.addoption(
        "--bench-seconds",
        type=float,
        default=540,
        help="time for the whole run; results name the cases not reached (default 540)",
    )
    group.addoption(
        "--bench-case-seconds",
        type=float,
        default=2,
        help="about how long the contenders of one case are timed (default 2)",
    )
    group.addoption(
        "--bench-continue",
        action="store_true",
        help="keep what an earlier run of this day has measured, and measure the rest (DKM, quantizers)",
    )
    group.addoption(
        "--bench-results",
        type=Path,
        default=HERE / "results",
        help="folder for the JSON, the Markdown tables and the figure",
    )


def pytest_configure(config):
    if importlib.util.find_spec("pytest_benchmark") is None:
        config.addinivalue_line("markers", "benchmark: of pytest-benchmark, which is not installed")


class Results:
    """The rows so far, and where they go."""

    def __init__(self, config, module):
        self.report = module
        self.seconds = config.getoption("bench_case_seconds")
        self.deadline = time.monotonic() + config.getoption("bench_seconds")
        self.data = module.header(config.getoption("bench_device"))
        self.stem = config.getoption("bench_results") / module.file_stem(self.data)
        self.last = None
        self.kept = set()
        path = self.stem.with_name(self.stem.name + ".json")
        if config.getoption("bench_continue") and path.exists():
            earlier = json.loads(path.read_text())
            self.kept = {(row["table"], row["case"]) for row in earlier["rows"] if "median_ms" in row}
            self.data["rows"] = [row for row in earlier["rows"] if (row["table"], row["case"]) in self.kept]
            self.data.update({load: max(earlier[load], self.data[load]) for load in ("load at start", "most load")})

    def add(self, rows):
        """Takes the rows of a case, once."""
        if rows is self.last:
            return
        self.last = rows
        self.data["rows"] += [dict(row) for row in rows.values()]
        self.data["most load"] = max(self.data["most load"], self.report.load())
        report.write(self.data, self.stem, self.report)


@pytest.fixture(scope="session")
def results_of(request):
    """The results that a module of reports writes; its clock starts when the first case asks."""
    made = request.config.bench_results_made = []

    def results_of(module):
        made.append(Results(request.config, module))
        return made[-1]

    yield results_of
    for found in made:
        report.write(found.data, found.stem, found.report, figure=True)


def pytest_terminal_summary(terminalreporter, config):
    for results in getattr(config, "bench_results_made", ()):
        terminalreporter.write_line(results.report.targets(results.data, plain=True))
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
