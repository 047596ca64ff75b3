"""Checks that run in several ranks of torch.distributed, on gloo.

A script of such checks holds functions `check_*(mesh)` and ends in `ranks.main(globals())`; a test runs it once for a
number of ranks and asserts what each check left:

    @pytest.mark.parametrize("world", (2, 4))
    @pytest.mark.parametrize("name", ranks.names(SCRIPT))
    def test_on_all_ranks(name, world, launched):
        ranks.passed(launched(SCRIPT, world), name)
"""

import datetime
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import torch
from torch import distributed

SECONDS = 120  # that a rank waits for another before the check fails


def names(script):
    return re.findall(r"^def (check_\w+)", Path(script).read_text(), re.MULTILINE)


def run(world, script, folder, *args):
    """For each rank a dict: name of the check -> None, or the traceback of what went wrong."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(folder), *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        cwd=Path(__file__).parent.parent,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


def passed(found, name):
    for rank, checks in enumerate(found):
        assert checks[name] is None, f"rank {rank}:\n{checks[name]}"


def main(checks):
    """Runs every check with a mesh of all ranks, and saves what they left."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=SECONDS))
    rank = distributed.get_rank()
    mesh = distributed.init_device_mesh("cpu", (distributed.get_world_size(),))
    found = {}
    for name, check in list(checks.items()):
        if name.startswith("check_"):
            torch.manual_seed(0)
            try:
                check(mesh)
                found[name] = None
            except BaseException:  # as pytest.fail raises
                found[name] = traceback.format_exc()
    torch.save(found, Path(sys.argv[1]) / f"{rank}.pt")
    leave()


def leave():
    """Ends the process of a rank once all ranks are done."""
    distributed.barrier()
    os._exit(0)  # destroy_process_group sometimes aborts
