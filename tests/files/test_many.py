"""Many tensors, and many names of one."""

import sys

import pytest
import torch

from r2kernels.files.checkpoint import Checkpoint
from r2kernels.files.clustered import Clustered, Form
from r2kernels.files.loading import load_palettized
from r2kernels.files.saving import save_clustered

pytestmark = pytest.mark.usefixtures("one_thread")


def clustered(*shape):
    return Clustered.of(torch.ones(shape), torch.linspace(-1, 1, 4).reshape(1, 4, 1), Form(2))


def test_many_names_of_a_weight(tmp_path):
    """One tensor; more than a dense file could hold are not saved, for `load_palettized` would refuse them."""
    w, made = torch.ones(100, 1700), clustered(100, 1700)
    save_clustered({"0": made}, {str(i): w for i in range(64)}, tmp_path / "f")
    found = load_palettized(tmp_path / "f")
    assert len(found) == 64 and all(tensor is found["0"] for tensor in found.values())
    with pytest.raises(ValueError, match=r"^its tensors would take 136,000,000 bytes .* but share 680,000; allowed"):
        save_clustered({"0": made}, {str(i): w for i in range(200)}, tmp_path / "f")
    assert len(load_palettized(tmp_path / "f")) == 64


def test_the_work_for_each_tensor_is_the_same(tmp_path):
    """However many there are: the calls of twice as many are not more than twice as many."""
    made, path, calls = clustered(4, 4), tmp_path / "f", []

    def work(count):
        state = {f"{i}.weight": torch.full((4, 4), float(i)) for i in range(count)}
        save_clustered({name: made for name in list(state)[::2]}, state | {"again": state["1.weight"]}, path)
        load_palettized(path)
        torch.save(state, path.with_suffix(".pt"))
        for _ in Checkpoint(path.with_suffix(".pt")).read():
            pass

    for count in (10, 200, 400):
        calls.append(0)
        before = sys.getprofile()
        sys.setprofile(lambda frame, event, arg: calls.append(calls.pop() + 1))
        work(count)
        sys.setprofile(before)
    assert calls[2] - calls[0] < 2.2 * (calls[1] - calls[0])
