"""Commands as a user types them, in this process or in one of its own, and a checkpoint to give them."""

import os
import pty
import subprocess
import sys

import torch

from r2kernels import cli


def command(capsys, *args):
    """(exit code, stdout, stderr)."""
    try:
        code = cli.main([str(arg) for arg in args])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def assert_refused(outcome, message):
    code, out, error = outcome
    assert code == 2
    assert out == ""
    assert message in error
    assert error.startswith("r2kernels")
    assert error.count("\n") == 1


def line(*args):
    return [sys.executable, "-m", "r2kernels", *map(str, args)]


def process(*args, **environment):
    return subprocess.run(line(*args), capture_output=True, timeout=120, env={**os.environ, **environment})


def on_a_terminal(*args, columns):
    """What the command shows on a terminal that many columns wide."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    with subprocess.Popen(line(*args), stdout=follower, stderr=follower, env=environment) as running:
        os.close(follower)
        shown = b""
        while True:
            try:
                piece = os.read(leader, 65536)
            except OSError:  # Linux's end of a terminal
                break
            if not piece:
                break
            shown += piece
        assert running.wait(120) == 0
    os.close(leader)
    return shown.decode()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


STATE = {
    "conv.weight": draw(8, 6, 3, 3),
    "conv.bias": draw(8),
    "norm.running_mean": draw(8),
    "norm.num_batches_tracked": torch.tensor(3),
    "half.weight": draw(10, 12, seed=1).half(),
    "brain.weight": draw(10, 12, seed=2).bfloat16(),
    "double.weight": draw(10, 12, seed=3).double(),
    "tiny.weight": draw(1, 3),
    "ids": torch.arange(12).reshape(3, 4),
    "empty": torch.empty(0, 4),
}


WEIGHTS = ["conv.weight", "half.weight", "brain.weight", "double.weight"]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
