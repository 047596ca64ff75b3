"""The Triton kernels on the CPU: the tests of the backends once more, with Triton's interpreter.

The interpreter is on or off for a whole process, from before triton is imported. So this is a pytest of its own; it
starts as soon as the tests are collected (conftest.py) and runs beside the others on a second core. `-m "not
exhaustive"`: it takes 10 ms for what a GPU does in 10 us.
"""

import importlib.util

import pytest
from processes import Interpreted

FILES = (
    "test_losses.py",
    "test_properties.py",
    "range_losses/test_backends.py",
    "range_losses/test_scale.py",
    "regularizers/test_weight_stats.py",
    "regularizers/test_digits.py",
    "regularizers/test_sampled_std.py",
    "regularizers/test_scale.py",
)
TRITON = importlib.util.find_spec("triton") is not None


def run():
    return Interpreted(*FILES, options=["--backend", "triton", "-m", "not exhaustive"])


def wanted(config):
    """Not where the run is of other backends or another device."""
    return TRITON and config.getoption("--device") == "cpu" and not config.getoption("--backend")


def test_in_the_interpreter(request):
    if not TRITON:
        pytest.skip("triton is not installed on this platform")
    if not wanted(request.config):
        pytest.skip("this run is of other backends")
    request.config.interpreter.check()
