"""The functions on DTensors in 2 and in 4 ranks: what they give, what is told, the edges."""

from pathlib import Path

import pytest
import ranks

SCRIPTS = [Path(__file__).with_name(name) for name in ("functions.py", "messages.py", "edges.py")]
CHECKS = [(script, name) for script in SCRIPTS for name in ranks.names(script)]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("script", "name"), CHECKS, ids=lambda value: getattr(value, "stem", value))
def test_on_all_ranks(script, name, world, launched):
    ranks.passed(launched(script, world), name)
