"""Trainers in two processes."""

from pathlib import Path

import pytest
import ranks

SCRIPT = Path(__file__).with_name("trainer_ranks.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks.run(2, SCRIPT, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ranks.names(SCRIPT))
def test_on_both_ranks(found, name):
    ranks.passed(found, name)
