"""What commands leave behind: a file as a whole or not at all, with the mode and in the place that it had."""

import contextlib
import io
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading

import pytest
import torch
from cli.commandline import STATE, assert_refused, command
from matplotlib.figure import Figure
from safetensors.torch import save_file

from r2kernels.cli import demo, demo_results, report
from r2kernels.files import paths

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def small(capsys, tmp_path, model):
    assert command(capsys, "compress", model, "-o", tmp_path / "small.safetensors", "--bits", 2)[0] == 0
    return tmp_path / "small.safetensors"


@pytest.fixture
def quick(monkeypatch):
    """A demo without a training, and figures without much in them."""
    monkeypatch.setattr(demo, "run", lambda **options: None)
    monkeypatch.setattr(demo_results, "tables", lambda result: [])
    monkeypatch.setattr(demo_results, "as_json", lambda result: {"all": "results"})
    monkeypatch.setattr(demo_results, "histograms", lambda result: Figure((1, 1)))
    monkeypatch.setattr(report, "layer_figure", lambda rows, title: Figure((1, 1)))


# name of what is written -> the command that writes it
WRITERS = {
    "a.safetensors": lambda model, small, out: ("compress", model, "-o", out, "--bits", 2),
    "b.safetensors": lambda model, small, out: ("quantize", model, "-o", out, "--bits", 2),
    "c.safetensors": lambda model, small, out: ("expand", small, "-o", out),
    "d.pt": lambda model, small, out: ("expand", small, "-o", out),
    "e.png": lambda model, small, out: ("report", model, "--plot", out),
    "f.png": lambda model, small, out: ("demo", "--out", out),
}


@pytest.fixture(params=WRITERS)
def writer(request, tmp_path, model, small, quick):
    """(path of what is written, arguments that write it)"""
    return tmp_path / request.param, WRITERS[request.param](model, small, tmp_path / request.param)


def listing(folder):
    return sorted(os.listdir(folder))


@contextlib.contextmanager
def room(size):
    """No file can grow beyond so many bytes, as where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk(capsys, tmp_path, writer, force):
    """Nothing new is there, and what is old stays, wherever in the file the disk is full."""
    out, args = writer
    assert command(capsys, *args)[0] == 0
    size = out.stat().st_size
    out.unlink()
    if force:
        out.write_text("mine")
    before = listing(tmp_path)
    for part in (0, size // 3, 3 * size // 4, size - 1):
        with room(part):
            code, _, error = command(capsys, *args, *["--force"] * force)
        assert (code, error) == (2, f"r2kernels: {out}: File too large\n")
        assert listing(tmp_path) == before and (not force or out.read_text() == "mine")


def test_results_on_a_full_disk(capsys, tmp_path, quick):
    """What was made before they could not be written is there."""
    assert command(capsys, "demo", "--out", tmp_path / "a.png")[0] == 0
    before, results = (tmp_path / "a.png").read_bytes(), tmp_path / "a.json"
    results.write_text("mine")
    args = "demo", "--out", tmp_path / "a.png", "--json", results, "--force"
    with pytest.MonkeyPatch.context() as patch, room(len(before)):
        patch.setattr(demo_results, "as_json", lambda result: {"many": [0] * len(before)})
        code, _, error = command(capsys, *args)
    assert (code, error) == (2, f"r2kernels: {results}: File too large\n")
    assert (tmp_path / "a.png").read_bytes() == before and results.read_text() == "mine"
    assert command(capsys, *args)[0] == 0 and json.loads(results.read_text()) == {"all": "results"}
    assert_refused(command(capsys, "demo", "--out", "b.png", "--json", "b.png"), "--out and --json are the same file")


def test_long_names(capsys, tmp_path, writer):
    """Of 255 bytes, which is as long as a name may be, and longer."""
    out, args = writer
    for length in (255, 256, 262, 5000):
        longer = out.with_name("x" * (length - len(out.suffix)) + out.suffix)
        outcome = command(capsys, *[longer if arg == out else arg for arg in args])
        if length == 255:
            assert outcome[0] == 0 and longer.stat().st_size > 0
            longer.unlink()
        else:
            assert_refused(outcome, f"{out.suffix}: File name too long")
    assert listing(tmp_path) == ["model.safetensors", "small.safetensors"]


@pytest.mark.parametrize("name", ["in.safetensors", "in.pt", "in"])
@pytest.mark.parametrize("verb", ["report", "compress", "quantize", "expand"])
def test_inputs_that_are_no_regular_files(capsys, tmp_path, name, verb):
    """Refused without being opened: to open a FIFO would be to wait."""
    options = {"report": [], "expand": ["-o", tmp_path / "out.pt"]}.get(
        verb, ["--bits", 2, "-o", tmp_path / "out.safetensors"]
    )
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "socket"))
        for made in (tmp_path / "fifo", tmp_path / "socket", "/dev/zero"):
            (tmp_path / name).symlink_to(made)
            known = name != "in" or verb == "expand"
            message = f"{tmp_path / name}: is not a regular file" if known else "unknown kind of checkpoint ''"
            assert_refused(command(capsys, verb, tmp_path / name, *options), message)
            (tmp_path / name).unlink()
    assert listing(tmp_path) == ["fifo", "socket"]


@pytest.mark.parametrize("verb", ["report", "compress", "quantize"])
def test_sizes_that_are_only_claimed(capsys, tmp_path, verb):
    torch.save({"w": torch.zeros(1).expand(200_000, 200_000), "v": torch.ones(3, 3)}, tmp_path / "a.pt")
    options = [] if verb == "report" else ["--bits", 2, "-o", tmp_path / "out.safetensors"]
    message = (
        "its tensors would take 160,000,000,036 bytes (the largest, w, 160,000,000,000) but share 40; allowed are "
    )
    assert_refused(command(capsys, verb, tmp_path / "a.pt", *options), f"{message}64 times as many, or 67,108,864\n")
    assert listing(tmp_path) == ["a.pt"]


def test_outputs_that_are_no_regular_files(capsys, tmp_path, writer):
    out, args = writer
    os.mkfifo(out)
    assert_refused(command(capsys, *args, "--force"), f"{out}: is not a regular file")
    out.unlink()
    out.symlink_to(os.devnull)
    assert_refused(command(capsys, *args, "--force"), f"{out}: is not a regular file")
    assert os.path.samestat(os.stat(out), os.stat(os.devnull))
    out.unlink()
    out.symlink_to(out.name)
    assert_refused(command(capsys, *args, "--force"), f"{out}: Too many levels of symbolic links")
    out.unlink()
    out.mkdir()
    assert_refused(command(capsys, *args, "--force"), f"{out}: is a directory")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@contextlib.contextmanager
def umask(bits):
    before = os.umask(bits)
    try:
        yield
    finally:
        os.umask(before)


def test_modes(capsys, tmp_path, writer):
    """What is overwritten keeps its mode; what is new has that of the umask."""
    out, args = writer
    for bits in (0o022, 0o077):
        with umask(bits):
            assert command(capsys, *args)[0] == 0
        assert mode(out) == 0o666 & ~bits
        for old in (0o600, 0o664, 0o444):
            out.write_bytes(b"")
            out.chmod(old)
            with umask(bits):
                assert command(capsys, *args, "--force")[0] == 0
            assert mode(out) == old and out.stat().st_size > 0
            out.chmod(0o600)
        out.unlink()


def test_symlinks(capsys, tmp_path, writer):
    """What one leads to is written, whether it is there or not, and the link stays."""
    out, args = writer
    (tmp_path / "far").mkdir()
    target = tmp_path / "far" / out.name
    out.symlink_to(target)
    assert command(capsys, *args)[0] == 0  # where there is nothing yet, nothing is overwritten
    whole = target.read_bytes()
    target.write_text("mine")
    assert_refused(command(capsys, *args), f"{out}: exists already; --force overwrites it")
    assert target.read_text() == "mine"
    target.chmod(0o600)
    assert command(capsys, *args, "--force")[0] == 0
    assert len(target.read_bytes()) == len(whole) and mode(target) == 0o600
    assert os.readlink(out) == str(target) and listing(tmp_path / "far") == [out.name]
    out.unlink()
    out.symlink_to(tmp_path / "none" / out.name)
    assert_refused(command(capsys, *args), f"{out}: there is no directory {tmp_path / 'none'}")


MEANWHILE = "exists already, written meanwhile by another process; --force overwrites it"


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_that_appears_meanwhile_is_kept(capsys, tmp_path, writer, monkeypatch, hard_links):
    """Also on a file system without hard links."""
    out, args = writer
    late = tempfile.mkstemp(dir=tmp_path)[1]
    original = paths._put

    def put(temporary, path):
        os.replace(late, path)
        original(temporary, path)

    def none(*args):
        raise PermissionError(1, "Operation not permitted")

    if not hard_links:
        monkeypatch.setattr(os, "link", none)
    assert command(capsys, *args)[0] == 0
    out.unlink()
    before = listing(tmp_path)
    monkeypatch.setattr(paths, "_put", put)
    code, _, error = command(capsys, *args)
    assert (code, error) == (2, f"r2kernels: {out}: {MEANWHILE}\n")
    assert out.read_bytes() == b"" and len(listing(tmp_path)) == len(before)


def test_of_writers_at_the_same_time_one_wins(tmp_path):
    """Without `overwrite` one, whole; with it the last, whole."""
    gate, outcomes = threading.Barrier(8), []

    def write(i, overwrite):
        try:
            with paths.replacing(tmp_path / "f", overwrite) as file:
                file.write(bytes([i]) * 1000)
                gate.wait(60)
            outcomes.append("wrote")
        except FileExistsError:
            outcomes.append("lost")

    for overwrite in (False, True):
        outcomes.clear()
        threads = [threading.Thread(target=write, args=(i, overwrite)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(outcomes) == ["lost"] * 7 * (not overwrite) + ["wrote"] * (8 if overwrite else 1)
        content = (tmp_path / "f").read_bytes()
        assert len(content) == 1000 and len({*content}) == 1 and listing(tmp_path) == ["f"]


# in a process of its own: a command that stops in the middle of its output until a signal comes
STOPPING = """
import sys, time
from r2kernels import cli
from r2kernels.files import container

def add(*args):
    args[0].file.write(b"some")
    print("writing", flush=True)
    time.sleep(60)

container.Writer.add = add
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "said"), [(signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")])
def test_signals_leave_nothing(tmp_path, model, number, said):
    out = tmp_path / "a.safetensors"
    args = [sys.executable, "-c", STOPPING, "compress", model, "-o", out, "--bits", "2", "--force"]
    out.write_text("mine")
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout.readline() == b"writing\n" and len(listing(tmp_path)) == 3
        running.send_signal(number)
        assert running.stderr.read() == f"r2kernels: {said}\n".encode()
        assert running.wait(60) == 128 + number
    assert listing(tmp_path) == ["a.safetensors", "model.safetensors"]
    assert out.read_text() == "mine"


def test_ctrl_c_within_torch_save(capsys, tmp_path, small, monkeypatch):
    """torch closes its archive, which fails too."""

    class Interrupted(io.BufferedRandom):
        def write(self, data):
            raise KeyboardInterrupt

    def interrupted(name, mode, **options):
        if mode == "rb":
            return open(name, mode)
        return Interrupted(open(name, mode, **options).detach())

    before = listing(tmp_path)
    monkeypatch.setattr(paths, "open", interrupted, raising=False)
    assert command(capsys, "expand", small, "-o", tmp_path / "a.pt") == (130, "", "r2kernels: interrupted\n")
    assert listing(tmp_path) == before


def test_the_handler_of_signals_stays(capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert command(capsys, "info")[0] == 0
    assert signal.getsignal(signal.SIGTERM) is before
    found = []
    thread = threading.Thread(target=lambda: found.append(command(capsys, "info")[0]))
    thread.start()
    thread.join(60)
    assert found == [0]
