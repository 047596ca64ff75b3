"""Work that was interrupted and gone on with, by any number of threads, into one file or a folder of shards."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from cli.commandline import assert_refused, assert_same, command, draw
from safetensors.torch import load_file, save_file

from r2kernels import load_palettized
from r2kernels.cli import parts
from r2kernels.files.clustered import Form
from r2kernels.files.format import Planned
from r2kernels.files.uniform import Grid

# kills itself, or is interrupted, once so many weights are coded
STOPPING = """
import os, signal, sys
from r2kernels import cli
from r2kernels.cli import parts
from r2kernels.files.clustered import Form
from r2kernels.files.format import Planned
from r2kernels.files.uniform import Grid
number, left = int(sys.argv.pop(1)), 5
original = parts.joined

def joined(*args):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), number)
    return original(*args)

parts.joined = joined
sys.exit(cli.main(sys.argv[1:]))
"""
SMALL = 2**10  # bytes of a part: several for a weight
STATE = {
    **{f"layers.{i}.weight": draw(40, 24, seed=i).bfloat16() for i in range(8)},
    **{f"layers.{i}.bias": draw(40, seed=i) for i in range(8)},
    "strange.weight": torch.full((8, 8), torch.inf),
    "count": torch.tensor(3),
}
WAYS = {
    "channels": ("compress", "--bits", 3, "--group-size", 1, "--lut-dtype", "fp16"),
    "last group smaller": ("compress", "--bits", 2, "--group-size", 3),
    "rows": ("compress", "--bits", 2, "--cluster-dim", 5, "--group-size", 8, "--entropy", "huffman"),
    "scaled": ("compress", "--bits", 2, "--group-size", 4, "--per-channel-scale", "--preserve-zeros"),
    "tiles": ("compress", "--bits", 2, "--granularity", "8x8", "--lut-dtype", "bf16"),
    "uneven tiles": ("compress", "--bits", 2, "--granularity", "16x7", "--lut-dtype", "fp8"),
    "tensor": ("compress", "--bits", 4),
    "quantize": ("quantize", "--bits", 3),
    "quantize tensor": ("quantize", "--bits", 4, "--axis", "none"),
}


@pytest.fixture
def model(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors", {"by": "us"})
    return tmp_path / "model.safetensors"


def files(path):
    """name -> bytes of a file, or of those in a folder."""
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else path.read_bytes()


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bytes_for_any_number_of_threads_and_parts(capsys, tmp_path, model, way, monkeypatch):
    verb, *options = WAYS[way]
    found = []
    for i, (jobs, size) in enumerate([(1, 2**30), (1, SMALL), (3, SMALL)]):
        monkeypatch.setattr(parts, "PART", size)
        out = tmp_path / f"{i}.safetensors"
        code, said, error = command(capsys, verb, model, "-o", out, *options, "--jobs", jobs)
        assert code == 0 and "1 weight not finite (strange.weight)" in said and "warning" not in error
        found.append((out.read_bytes(), said.replace(str(out), "")))
    assert found[0][0] == found[1][0] == found[2][0]
    assert found[1][1] == found[2][1]
    assert load_palettized(tmp_path / "0.safetensors").keys() == STATE.keys()


def test_parts_cover_a_weight(monkeypatch):
    monkeypatch.setattr(parts, "PART", 200)
    for form, step in (
        (Form(2, group_size=3), 3),
        (Form(2), 10),
        (Form(2, group_size=1, axis=1), 10),
        (Form(2, granularity=(4, 7)), 4),
        (Form(2, granularity=(4, 3)), 10),
        (Form(2, group_size=1, lut_dtype="fp8"), 10),
        (Grid(3, 0), 8),
        (Grid(4, 0), 2),
        (Grid(4), 10),
    ):
        found = parts.cut(Planned("w", (10, 7), torch.float32, form))
        assert [part.begin for part in found] == [0, *[part.end for part in found[:-1]]] and found[-1].end == 10
        assert all(part.begin % step == 0 for part in found), form
        assert (len(found) == 1) == (step == 10), form
        assert len(parts.cut(Planned("w", (10, 7), torch.float32, form), whole=True)) == 1


@pytest.mark.parametrize(("number", "folder"), [(signal.SIGKILL, False), (signal.SIGINT, True)])
def test_interrupted_and_gone_on_with(capsys, tmp_path, model, number, folder):
    options = ["compress", model, "--bits", 2, "--group-size", 1, *["--shard-size", "2kB"] * folder]
    names = [tmp_path / "whole", tmp_path / "cut"] if folder else [tmp_path / f"{n}.safetensors" for n in "ab"]
    whole, out = names
    assert command(capsys, *options, "-o", whole)[0] == 0
    args = [sys.executable, "-c", STOPPING, int(number), *options, "-o", out]
    stopped = subprocess.run([str(arg) for arg in args], capture_output=True, timeout=120)
    assert stopped.returncode == (-number if number == signal.SIGKILL else 130), stopped.stderr
    partial = tmp_path / f"{out.name}.partial"
    assert partial.is_dir() and not out.exists()
    assert (number == signal.SIGKILL) == (b"--resume goes on with it" not in stopped.stderr)
    kept = files(partial)
    assert_refused(command(capsys, *options, "-o", out), "holds the work of an interrupted run; --resume goes on")
    differ = [arg if arg != 2 else 3 for arg in options]
    assert_refused(command(capsys, *differ, "-o", out, "--resume"), "was begun with another form")
    changed = os.stat(model).st_mtime_ns
    os.utime(model, ns=(1, 1))
    assert_refused(command(capsys, *options, "-o", out, "--resume"), "was begun with another checkpoint")
    os.utime(model, ns=(changed, changed))
    assert files(partial) == kept
    assert command(capsys, *options, "-o", out, "--resume")[0] == 0
    assert files(out) == files(whole) and not partial.exists()


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("way", ["rows", "channels", "quantize"])
def test_the_same_bytes_after_going_on(capsys, tmp_path, model, way, folder, monkeypatch):
    """Interrupted again and again, each time one weight further."""
    verb, *options = WAYS[way]
    line = [verb, model, *options, *["--shard-size", "1500B"] * folder]
    whole, out = (
        (tmp_path / "whole", tmp_path / "cut") if folder else (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    )
    code, said, _ = command(capsys, *line, "-o", whole)
    assert code == 0
    original, left = parts.joined, 0

    def joined(*args):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(parts, "joined", joined)
    for _ in range(20):
        left = 2
        code, again, error = command(capsys, *line, "-o", out, "--resume")
        if code == 0:
            break
        assert (code, out.exists()) == (130, False) and "interrupted" in error
    assert code == 0 and left < 2
    assert files(out) == files(whole)
    assert again.replace(out.name, whole.name) == said
    assert not (tmp_path / f"{out.name}.partial").exists()


def test_a_journal_or_file_that_was_changed(capsys, tmp_path, model, monkeypatch):
    line = ["compress", model, "--bits", 2, "-o", tmp_path / "a.safetensors"]
    partial, left, original = tmp_path / "a.safetensors.partial", 3, parts.joined

    def joined(*args):
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(parts, "joined", joined)
    assert command(capsys, *line)[0] == 130
    journal, data = partial / "journal.jsonl", partial / "data"
    lines, bytes_before = journal.read_bytes(), bytearray(data.read_bytes())
    data.write_bytes(bytes_before[:-1] + bytes([bytes_before[-1] ^ 1]))
    assert_refused(command(capsys, *line, "--resume"), "is not in the file as it was written")
    data.write_bytes(bytes_before)
    journal.write_bytes(b"{" + lines)
    assert_refused(command(capsys, *line, "--resume"), "its journal is corrupt")
    journal.write_bytes(lines + b'{"name": "lay')  # cut off: that weight is coded again
    assert command(capsys, *line, "--resume")[0] == 0
    assert command(capsys, *line[:-1], tmp_path / "b.safetensors")[0] == 0
    assert files(tmp_path / "a.safetensors") == files(tmp_path / "b.safetensors")


def test_force_begins_anew(capsys, tmp_path, model, monkeypatch):
    line = ["compress", model, "--bits", 2, "-o", tmp_path / "a.safetensors"]
    (tmp_path / "a.safetensors.partial").mkdir()
    (tmp_path / "a.safetensors.partial" / "journal.jsonl").write_text("{}\n")
    assert command(capsys, *line)[0] == 2
    assert command(capsys, *line, "--force")[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "model.safetensors"]


def test_a_folder_of_palettized_shards(capsys, tmp_path, model):
    """They are read as one file is, and become shards of dense tensors again."""
    line = ["compress", model, "--bits", 3, "--group-size", 2]
    assert command(capsys, *line, "-o", tmp_path / "a.safetensors")[0] == 0
    code, said, _ = command(capsys, *line, "-o", f"{tmp_path}/shards/", "--shard-size", "2kB")
    assert code == 0 and f"{tmp_path}/shards: " in said
    names = sorted(os.listdir(tmp_path / "shards"))
    assert len(names) > 3 and names[0].startswith("model-00001-of-") and names[-1] == "model.safetensors.index.json"
    alone = load_palettized(tmp_path / "a.safetensors")
    assert_same(load_palettized(tmp_path / "shards"), alone)
    assert_same(load_palettized(tmp_path / "shards" / names[-1]), alone)
    assert command(capsys, "expand", tmp_path / "shards", "-o", tmp_path / "back.safetensors")[0] == 0
    assert_same(load_file(tmp_path / "back.safetensors"), alone)
    assert command(capsys, "expand", tmp_path / "shards", "-o", f"{tmp_path}/dense/")[0] == 0
    assert_same(load_file(tmp_path / "dense" / "model.safetensors"), alone)
    reports = [command(capsys, "report", path) for path in (tmp_path / "shards", tmp_path / "a.safetensors")]
    assert reports[0] == reports[1] and reports[0][0] == 0
    again = command(capsys, *line, "-o", f"{tmp_path}/shards/")
    assert_refused(again, "exists already; shards are written to a new folder")
