"""The per-layer table and the histograms, and that a large file is never held in memory."""

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from r2kernels.cli import report
from r2kernels.files.checkpoint import Checkpoint, CheckpointError


def checkpoint(tmp_path, state):
    save_file(state, tmp_path / "a.safetensors")
    return Checkpoint(tmp_path / "a.safetensors")


def layer(name="w", ratio=8.0, counts=(1.0, 5.0, 2.0)):
    return report.LayerStats(
        name, (3, 3), "float32", 9, -1.0, 1.0, 2.0, 2 / ratio, ratio, 3.0, list(counts) if counts else None
    )


def test_a_table_by_hand(tmp_path):
    w = torch.tensor([[-1.0, 1.0], [3.0, 5.0]])
    (row,) = report.layers(checkpoint(tmp_path, {"w": w, "bias": torch.ones(4)}), histograms=True)
    assert row[:7] == ("w", (2, 2), "float32", 4, -1.0, 5.0, 6.0)
    assert row.std == pytest.approx(math.sqrt(20 / 3))
    assert row.range_per_std == pytest.approx(6 / math.sqrt(20 / 3))
    assert row.kurtosis == pytest.approx((81 + 1 + 1 + 81) / 4 / (20 / 3) ** 2)
    assert sum(row.histogram) == 4
    assert row.histogram[0] == row.histogram[-1] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_and_a_mix_of_them(tmp_path, dtype):
    w = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    a, b, c = report.layers(checkpoint(tmp_path, {"a": w, "b": w.to(dtype), "c": w.clone()}), histograms=True)
    assert a[1:] == c[1:]
    assert b.range == (w.to(dtype).double().max() - w.to(dtype).double().min()).item()
    assert b.std == pytest.approx(w.to(dtype).double().std().item(), rel=1e-5)
    assert sum(b.histogram) == 1200


def test_batches_are_bounded_and_keep_the_order(tmp_path):
    state = {f"w{i}": torch.full((i, 10), float(i)) for i in range(1, 6)}
    sizes, done = [], []
    original = report.weight_stats

    def seen(tensors):
        sizes.append(sum(t.numel() for t in tensors))
        return original(tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "weight_stats", seen)
        rows = list(report.layers(checkpoint(tmp_path, state), batch_elements=40, advance=done.append))
    assert [row.min for row in rows] == [1, 2, 3, 4, 5]
    assert sizes == done == [30, 30, 40, 50]


def anonymous_memory():
    """Bytes of memory that the process holds and that are not pages of a mapped file."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_is_never_loaded_whole(tmp_path, monkeypatch, suffix):
    state = {f"w{i}": torch.randn(512, 2048) for i in range(48)}  # 192 MiB
    path = tmp_path / f"a{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    del state
    used = []
    monkeypatch.setattr(
        report,
        "weight_stats",
        lambda tensors, original=report.weight_stats: (original(tensors), used.append(anonymous_memory()))[0],
    )
    before = anonymous_memory()
    rows = list(report.layers(Checkpoint(path), histograms=True, batch_elements=2**20))
    assert len(rows) == len(used) == 48
    assert max(used) - before < path.stat().st_size / 3


def test_means_and_json(tmp_path):
    read = checkpoint(
        tmp_path, {"a": torch.tensor([[0.0, 1.0]]), "b": torch.tensor([[0.0, 3.0]]), "bias": torch.ones(1)}
    )
    data = report.as_json(read, list(report.layers(read)))
    assert data["mean"]["range"] == 2
    assert data["left_out"] == 1
    assert data["weights"][1] == {
        "name": "b",
        "shape": [1, 2],
        "dtype": "float32",
        "numel": 2,
        "min": 0,
        "max": 3,
        "range": 3,
        "std": pytest.approx(3 / math.sqrt(2)),
        "range_per_std": pytest.approx(math.sqrt(2)),
        "kurtosis": pytest.approx(0.25),
    }


def test_nan_and_constant_weights(tmp_path):
    read = checkpoint(
        tmp_path, {"a": torch.tensor([[0.0, math.nan]]), "b": torch.ones(2, 2), "c": torch.tensor([[1.0, math.inf]])}
    )
    rows = list(report.layers(read, histograms=True))
    assert [row.histogram for row in rows] == [None, None, None]
    assert (rows[1].range, rows[1].std, rows[1].range_per_std) == (0, 0, 0)
    data = report.as_json(read, rows)
    assert data["weights"][0]["range"] is None
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    with pytest.raises(CheckpointError, match="every weight is constant or not finite"):
        report.layer_figure(rows, "a")


def test_the_most_extreme_layers_are_drawn_in_their_order():
    rows = [layer(f"w{i}", ratio) for i, ratio in enumerate([5.0, 9.0, 1.0, 7.0, 8.0])]
    assert [row.name for row in report.extremes(rows, most=3)] == ["w1", "w3", "w4"]


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def test_the_title_says_what_is_drawn():
    few = report.layer_figure([layer("a"), layer("b")], "m.pt")
    assert few.get_suptitle() == "m.pt"
    assert titles(few) == ["a\nrange/std 8.0", "b\nrange/std 8.0"]
    many = report.layer_figure([layer(str(i)) for i in range(40)] + [layer("flat", counts=None)], "m.pt")
    assert (
        many.get_suptitle()
        == "m.pt\n12 of 41 weights: those with the largest range/std\n1 weight constant or not finite, left out"
    )
    assert len(many.axes) == 12


def test_a_panel_shows_the_counts():
    drawn = report.layer_figure([layer(counts=(1.0, 5.0, 2.0))], "m.pt")
    values, edges, _ = drawn.axes[0].patches[0].get_data()
    assert list(values) == [1, 5, 2]
    assert list(edges) == pytest.approx([-1, -1 / 3, 1 / 3, 1])


def test_names_with_dollars_and_markup_are_drawn_as_they_are(tmp_path):
    name = "a$\\frac{$[red]" + "x" * 60
    figure = report.layer_figure([layer(name)], "m$.pt")
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert titles(figure) == ["..." + "x" * 33 + "\nrange/std 8.0"]


def test_plotting_leaves_pyplot_alone():
    code = """
import io, sys
from r2kernels.cli import report
report.figure("t", [("p", (0, 1), [1, 2])]).savefig(io.BytesIO())
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_histogram_of_a_large_tensor_is_summed_over_its_parts(monkeypatch):
    w = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    low, high = w.min().item(), w.max().item()
    whole = report.histogram(w, low, high)
    monkeypatch.setattr(report, "HISTOGRAM_ELEMENTS", 7)
    assert report.histogram(w, low, high) == whole
    assert list(itertools.accumulate(whole))[-1] == 2000
