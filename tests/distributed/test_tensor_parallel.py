"""What stands before weights that stay DTensors, and a RangeRegularizer under `fully_shard`: as in one process."""

from pathlib import Path

import pytest
import ranks

SCRIPT = Path(__file__).parent / "tensor_parallel.py"


@pytest.fixture(scope="module", params=(2, 4))
def found(request, tmp_path_factory):
    return ranks.run(request.param, SCRIPT, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ranks.names(SCRIPT))
def test_on_all_ranks(found, name):
    ranks.passed(found, name)
