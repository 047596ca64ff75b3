"""Trainers in two processes."""

from pathlib import Path

import pytest
import ranks

SCRIPT = Path(__file__).with_name("trainer_ranks.py")


@pytest.mark.parametrize("name", ranks.names(SCRIPT))
def test_on_both_ranks(name, launched):
    ranks.passed(launched(SCRIPT, 2), name)
