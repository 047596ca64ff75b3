"""Triton's real JIT under a driver of no GPU (tests/fake): what steps of training compile, and how much they launch."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
# kernels of one forward and backward, dkm with T = 5; a list writes a table of addresses for each
MOST = {"soft_min_max": 3, "list_of_soft_min_max": 5, "lsq": 3, "list_of_lsq": 5, "pact": 3, "dkm": 24}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """name -> what each of its steps compiled and launched, in a process with no kernel compiled yet."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "fake.training"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_recompiling_is_seen(steps):
    assert [len(step["compiled"]) for step in steps["specialized"]].count(0) < len(steps["specialized"]) - 1


@pytest.mark.parametrize("name", MOST)
def test_only_the_first_step_compiles(name, steps):
    """Whatever the values are and however long the activations."""
    first, *others = steps[name]
    assert first["compiled"] and not [step["compiled"] for step in others if step["compiled"]]


@pytest.mark.parametrize("name", MOST)
def test_launches_of_a_step(name, steps):
    counts = {len(step["launched"]) for step in steps[name]}
    assert len(counts) == 1 and max(counts) <= MOST[name], counts
