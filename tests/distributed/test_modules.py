"""What is attached to a model that several ranks train: under DDP, `fully_shard` and tensor parallelism, as one process
with the whole batch."""

from pathlib import Path

import pytest
import ranks

SCRIPTS = [Path(__file__).with_name(name) for name in ("ddp.py", "fsdp.py", "tensor_parallel.py")]
CHECKS = [(script, name) for script in SCRIPTS for name in ranks.names(script)]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("script", "name"), CHECKS, ids=lambda value: getattr(value, "stem", value))
def test_on_all_ranks(script, name, world, launched):
    ranks.passed(launched(script, world), name)
