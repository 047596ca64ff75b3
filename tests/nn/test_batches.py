"""What a loader may give, where it is put, and the bar."""

import collections
import io
import sys

import pytest
import torch
from torch import nn

from r2kernels.nn.batches import run

CPU = torch.device("cpu")
X, Y = torch.ones(2, 3), torch.zeros(2, 3)
Pair = collections.namedtuple("Pair", ["u", "v"])


class One(nn.Module):
    def forward(self, x, scale=2):
        self.seen = (x, scale)


class Two(nn.Module):
    def forward(self, u, v, mask=None):
        self.seen = (u, v, mask)


class Words(nn.Module):
    def forward(self, input_ids=None, attention_mask=None):
        self.seen = (input_ids, attention_mask)


class Anything(nn.Module):
    def forward(self, *args, **kwargs):
        self.seen = (*args, kwargs)


@pytest.mark.parametrize(
    ("kind", "batch", "seen"),
    [
        (One, X, (X, 2)),
        (One, (X, Y), (X, 2)),
        (One, [X], (X, 2)),
        (One, ([X, Y], 1), ([X, Y], 2)),
        (Two, (X, Y), (X, Y, None)),
        (Two, (X, Y, 5), (X, Y, None)),
        (Two, {"u": X, "v": Y, "labels": 1}, (X, Y, None)),
        (Two, ({"u": X, "v": Y, "mask": 7}, 1), (X, Y, 7)),
        (Words, (X, Y), (X, None)),
        (Words, {"input_ids": X, "attention_mask": Y, "labels": 1}, (X, Y)),
        (Anything, (X, Y), (X, {})),
        (Anything, {"a": X, "labels": 1}, ({"a": X, "labels": 1},)),
        (One, (Pair(X, Y), 1), (Pair(X, Y), 2)),
    ],
    ids=range(13),
)
def test_what_a_model_is_given(kind, batch, seen):
    model = kind()
    assert run(model, [batch], CPU) == 1
    assert str(model.seen) == str(seen)


def test_forward():
    """Whatever else a batch is, a function runs the model on it; its tensors are moved."""
    model = Two()
    run(model, [{"a": [X, (Y, "text")]}], torch.device("meta"), forward=lambda m, b: m(b["a"][0], *b["a"][1]))
    assert model.seen[0].is_meta and model.seen[1].is_meta and model.seen[2] == "text"


@pytest.mark.parametrize(
    ("model", "batch", "error", "message"),
    [
        (One(), (), ValueError, "loader gave an empty tuple"),
        (One(), "text", TypeError, "loader gave a str; allowed are a tensor, a tuple or list with the inputs first"),
        (Two(), (X,), ValueError, r"loader gave a tuple of 1; forward of Two needs 2 inputs \(u, v\); see forward="),
        (Two(), X, TypeError, "missing 1 required positional argument: 'v'"),
    ],
    ids=range(4),
)
def test_batches_that_do_not_fit(model, batch, error, message):
    with pytest.raises(error, match=message):
        run(model, [batch], CPU)


def test_a_limit_reads_no_further():
    def loader():
        for _ in range(2):
            yield X
        raise AssertionError

    assert run(One(), loader(), CPU, batches=2) == 2 and run(One(), [X], CPU, batches=2) == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("loader", "batches", "shown"),
    [([X] * 3, None, "3/3"), ([X] * 3, 2, "2/2"), (iter([X] * 3), 2, "2/2"), ((X for _ in range(3)), None, "3batch")],
    ids=range(4),
)
def test_a_bar(monkeypatch, loader, batches, shown):
    """Where stderr is a terminal, with a total where it is known."""
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(One(), loader, CPU, batches=batches, title="calibrate")
    assert sys.stderr.getvalue().split("\r")[-1].startswith("calibrate") and shown in sys.stderr.getvalue()


@pytest.mark.parametrize("stderr", [io.StringIO(), None, Terminal()], ids=["a file", "none", "no tqdm"])
def test_no_bar(monkeypatch, stderr):
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert run(One(), [X], CPU) == 1
    assert stderr is None or stderr.getvalue() == ""
