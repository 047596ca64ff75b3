"""The Triton kernels on the CPU: the tests of the backends once more, with Triton's interpreter.

The interpreter is on or off for a whole process, from before triton is imported. So this is a pytest of its own; it
starts as soon as the tests are collected (conftest.py) and runs beside the others on a second core. `-m "not
exhaustive"`: it takes 10 ms for what a GPU does in 10 us.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = ("test_losses.py", "test_properties.py", "range_losses/test_backends.py", "regularizers/test_weight_stats.py")
TRITON = importlib.util.find_spec("triton") is not None


class Run:
    """The process, and what it has printed."""

    def __init__(self):
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [
            sys.executable,
            "-m",
            "pytest",
            *[str(HERE / name) for name in FILES],
            "--backend",
            "triton",
            "-m",
            "not exhaustive",
        ]
        command += ["-q", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore"]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, env=environment, cwd=HERE.parent, stdout=self.output, stderr=subprocess.STDOUT
        )

    def wait(self):
        code = self.process.wait()
        self.output.seek(0)
        return code, self.output.read()

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.output.close()


def wanted(config):
    """Not where the run is of other backends or another device."""
    return TRITON and config.getoption("--device") == "cpu" and not config.getoption("--backend")


def test_in_the_interpreter(request):
    if not TRITON:
        pytest.skip("triton is not installed on this platform")
    if not wanted(request.config):
        pytest.skip("this run is of other backends")
    code, output = request.config.interpreter.wait()
    summary = output.strip().splitlines()[-1]
    print(summary)
    assert code == 0, output[-20000:]
    assert " passed" in summary, output
