"""The commands as a user types them: what they print, and one line with exit code 2 where they cannot."""

import builtins
import json
import subprocess
import sys

import pytest
import torch
from cli.commandline import assert_refused, command, line, on_a_terminal, process
from rich.progress import Progress
from safetensors.torch import save_file

import r2kernels
from r2kernels.cli import console, report


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(
        {"conv.weight": torch.arange(12.0).reshape(3, 4), "fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}, path
    )
    return path


def test_info(capsys):
    code, out, _ = command(capsys, "info")
    assert code == 0
    reasons = r2kernels.backends()
    for name, reason in reasons.items():
        shown = [line for line in out.splitlines() if line.startswith(name + " ")][-1]
        assert shown.split(None, 1)[1].strip() == (reason or "usable")
    assert r2kernels.__version__ in out
    assert torch.__version__ in out


def test_info_json(capsys):
    code, out, _ = command(capsys, "info", "--json")
    assert code == 0
    data = json.loads(out)
    assert data["backends"] == r2kernels.backends()
    assert data["versions"]["r2kernels"] == r2kernels.__version__
    assert len(data["gpus"]) == torch.cuda.device_count()


def test_report(capsys, model):
    code, out, error = command(capsys, "report", model)
    assert (code, error) == (0, "")
    assert "conv.weight   3x4     float32      12   0.000   11.00   11.00   3.606       3.051" in out
    assert (
        out.splitlines()[-1]
        == "2 weights, 16 elements; 1 tensor left out (not floating point, fewer than two dimensions, or empty)"
    )


def test_report_json(capsys, model):
    code, out, error = command(capsys, "report", model, "--json")
    assert (code, error) == (0, "")
    data = json.loads(out)
    assert [weight["name"] for weight in data["weights"]] == ["conv.weight", "fc.weight"]
    assert data["weights"][0]["range"] == 11
    assert data["checkpoint"] == str(model)


def test_report_json_of_nan_is_valid(capsys, tmp_path):
    torch.save({"w": torch.full((2, 2), torch.nan)}, tmp_path / "a.pt")
    code, out, _ = command(capsys, "report", tmp_path / "a.pt", "--json")
    assert code == 0
    assert json.loads(out, parse_constant=pytest.fail)["weights"][0]["max"] is None


def test_plot_is_never_overwritten_unasked(capsys, tmp_path, model):
    plot = tmp_path / "a.png"
    assert command(capsys, "report", model, "--plot", plot)[0] == 0
    assert plot.read_bytes()[:4] == b"\x89PNG"
    plot.write_text("mine")
    assert_refused(command(capsys, "report", model, "--plot", plot), "a.png: exists already; --force overwrites it")
    assert plot.read_text() == "mine"
    assert command(capsys, "report", model, "--plot", plot, "--force")[0] == 0
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_bad_input(capsys, tmp_path, model):
    (tmp_path / "broken.pt").write_bytes(b"hello world")
    torch.save({"bias": torch.ones(3)}, tmp_path / "bias.pt")
    empty = tmp_path / "empty"
    empty.mkdir()
    for args, message in [
        (["report", tmp_path / "none.pt"], "none.pt: No such file or directory"),
        (["report", tmp_path / "broken.pt"], "broken.pt: is truncated, corrupt or not written by torch.save"),
        (["report", tmp_path / "broken.pt", "--json"], "broken.pt: is truncated"),
        (["report", tmp_path / "bias.pt"], "no weight (floating point, two or more dimensions) among its 1 tensors"),
        (["report", empty], "is a directory without a checkpoint"),
        (["report", model, "--plot", tmp_path / "a.xyz"], "unknown kind of image '.xyz'; allowed are "),
        (["report", model, "--plot", tmp_path / "none" / "a.png"], "there is no directory"),
        (["report"], "required: CHECKPOINT"),
        (["report", model, "--bits"], "unrecognized arguments: --bits"),
        ([], "required: COMMAND"),
        (["polish"], "invalid choice: 'polish'"),
        (["demo", "--epochs", "0"], "--epochs: must be at least 1, got 0"),
        (["demo", "--seeds", "two"], "--seeds: invalid"),
        (["demo", "--out", tmp_path / "bias.pt"], "unknown kind of image '.pt'"),
        (["demo", "--json", tmp_path / "bias.pt"], "bias.pt: exists already; --force overwrites it"),
        (["demo", "--json", tmp_path], "is a directory"),
    ]:
        assert_refused(command(capsys, *args), message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bias.pt", "broken.pt", "empty", "model.safetensors"]


@pytest.mark.parametrize(
    ("package", "args"), [("rich", []), ("matplotlib", ["--plot", "a.png"]), ("safetensors", ["--json"])]
)
def test_a_missing_package_is_named(capsys, monkeypatch, model, package, args):
    original = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert_refused(
        command(capsys, "report", model, *args),
        f"needs {package}, which is not installed: pip install 'r2kernels[cli]'",
    )


@pytest.mark.parametrize("name", ["bogus", "cuda"])
def test_a_backend_that_cannot_be_used(tmp_path, model, name):
    done = process("report", model, R2KERNELS_BACKEND=name)
    assert_refused((done.returncode, done.stdout.decode(), done.stderr.decode()), name)


def test_ctrl_c(capsys, monkeypatch, model):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "layers", interrupted)
    assert command(capsys, "report", model) == (130, "", "r2kernels: interrupted\n")


def test_a_closed_pipe_is_quiet(tmp_path):
    torch.save({f"layer{i}.weight": torch.ones(2, 2) for i in range(3000)}, tmp_path / "a.pt")
    for options in ([], ["--json"]):
        with subprocess.Popen(
            line("report", tmp_path / "a.pt", *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as running:
            running.stdout.readline()
            running.stdout.close()
            assert running.stderr.read() == b""
            assert running.wait(120) == 1


def test_a_terminal_without_unicode(tmp_path):
    torch.save({"größe.weight": torch.ones(2, 2)}, tmp_path / "a.pt")
    done = process("report", tmp_path / "a.pt", PYTHONIOENCODING="ascii", COLUMNS="20")
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"gr\xf6\xdfe.weight" in done.stdout


def test_a_table_is_not_cut_where_it_goes_to_a_file(tmp_path):
    name = "layers." + "x" * 300 + ".weight"
    torch.save({name: torch.ones(2, 2)}, tmp_path / "a.pt")
    done = process("report", tmp_path / "a.pt")
    assert f"{name}   2x2     float32" in done.stdout.decode()


def test_a_narrow_terminal_keeps_the_numbers_and_shows_progress(model):
    shown = on_a_terminal("report", model, columns=30)
    progress, _, table = shown.rpartition("\x1b[?25h")
    assert "reading weights" in progress
    assert "3.606" in table
    assert "3.051" in table
    assert "…" not in table


def test_no_progress_with_json(model):
    assert "reading weights" not in on_a_terminal("report", model, "--json", columns=80)


def test_progress_adds_up(monkeypatch):
    seen = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(Progress, "advance", lambda self, task, done: seen.append((self.tasks[task].total, done)))
    with console.progress("work", 10) as advance:
        advance(4)
        advance(6)
    assert seen == [(10, 4), (10, 6)]


def test_version(capsys):
    assert command(capsys, "--version") == (0, f"r2kernels {r2kernels.__version__}\n", "")
