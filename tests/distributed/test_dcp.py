"""Checkpoints of torch.distributed.checkpoint: bitwise resumed by as many ranks, and read by others."""

from pathlib import Path

import pytest
import ranks

SCRIPT = Path(__file__).parent / "dcp.py"
# (ranks, those whose checkpoints they read), one after the other
LAUNCHES = ((2, ()), (4, (2,)), (2, (4,)), (1, (2, 4)))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    saved = tmp_path_factory.mktemp("saved")
    return [ranks.run(world, SCRIPT, tmp_path_factory.mktemp("ranks"), saved, *read) for world, read in LAUNCHES]


@pytest.mark.parametrize("launch", range(len(LAUNCHES)))
@pytest.mark.parametrize("name", ranks.names(SCRIPT))
def test_on_all_ranks(found, launch, name):
    ranks.passed(found[launch], name)
