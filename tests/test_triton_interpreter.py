"""The Triton kernels on the CPU, in Triton's interpreter: the tests of the backends once more, in a process where it is on before triton is imported."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed on this platform")
@pytest.mark.parametrize("part", ["test_backends.py", "test_properties.py"])
def test_in_the_interpreter(part, request):
    if request.config.getoption("--device") != "cpu" or request.config.getoption("--backend"):
        pytest.skip("this run is of other backends")
    command = [sys.executable, "-m", "pytest", str(HERE / part), "--backend", "triton", "-m", "not exhaustive", "-q", "-p", "no:cacheprovider", "--tb=short"]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=HERE.parent, capture_output=True, text=True)
    summary = run.stdout.strip().splitlines()[-1:]
    print(*summary)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in summary[0], run.stdout
