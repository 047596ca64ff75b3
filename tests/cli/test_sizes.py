"""`report --sizes`: the bytes of a checkpoint at fewer bits, and how they are written."""

import json
import math

import pytest
import torch
from cli.commandline import command

from r2kernels.cli import results

pytestmark = pytest.mark.usefixtures("one_thread")


def test_sizes(capsys, tmp_path):
    """1000 weights of -1 and +1 between two others of 40 that take four values, and 25 numbers that are no weights."""
    state = {
        "first": torch.arange(40.0).reshape(4, 10) % 4,
        "middle": (torch.arange(1000.0) % 4 // 3 * 2 - 1).reshape(10, 100),
        "bias": torch.ones(25),
        "last": torch.arange(40.0).reshape(4, 10) % 4,
    }
    torch.save(state, tmp_path / "a.pt")
    code, out, error = command(capsys, "report", tmp_path / "a.pt", "--sizes", "--json")
    assert (code, error) == (0, "")
    data = json.loads(out)
    assert data["dense"] == 4420 and data["ends"] == ["first", "last"]
    assert data["1"]["without_ends"]["packed"] == 320 + 100 + 125 + 8
    assert data["2"]["all"]["packed"] == 100 + 250 + 16 + 2 * (10 + 16)
    assert data["2"]["all"]["huffman"] == 100 + (125 + 4 + 4 + 16) + 2 * (10 + 16)
    entropy = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert data["1"]["without_ends"]["entropy"] == 320 + 100 + 8 + math.ceil(125 * entropy)
    code, out, _ = command(capsys, "report", tmp_path / "a.pt", "--sizes", "--ends", "mid*")
    assert code == 0 and "first and last: middle" in out and "4.420 kB" in out


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.000 kB"),
        (46_726_848, "46.73 MB"),
        (3 * 10**9, "3.000 GB"),
        (5 * 10**15, "5000. TB"),
    ],
)
def test_size_text(size, text):
    assert results.size_text(size) == text
