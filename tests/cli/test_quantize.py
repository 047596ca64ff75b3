"""`r2kernels quantize` as a user types it, and `expand` of what it wrote."""

import json
import math
import os
import weakref

import pytest
import torch
from cli.commandline import STATE, WEIGHTS, assert_refused, assert_same, command, draw
from safetensors.torch import load_file, save_file

from r2kernels import use_backend
from r2kernels.cli import compress
from r2kernels.files.checkpoint import Checkpoint
from r2kernels.files.loading import Palettized, load_palettized
from r2kernels.files.uniform import Grid
from r2kernels.nn.clipping import nearest, weight_qparams

pytestmark = pytest.mark.usefixtures("one_thread")
QUANTIZED = [*WEIGHTS, "tiny.weight"]


@pytest.fixture
def model(tmp_path):
    torch.save({"state_dict": STATE, "epoch": 3}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def expected(bits, axis=0, method="mse", symmetric=True, only=QUANTIZED):
    state = dict(STATE)
    for name in only:
        state[name] = nearest(
            STATE[name], Grid(bits, axis), *weight_qparams(STATE[name], bits, axis, method, symmetric)
        ).decoded()
    return state


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ([], {}),
        (["--axis", "none"], {"axis": None}),
        (["--method", "minmax", "--axis", 0], {"method": "minmax"}),
        (["--asymmetric"], {"symmetric": False}),
        (
            ["--asymmetric", "--axis", "none", "--method", "minmax"],
            {"symmetric": False, "axis": None, "method": "minmax"},
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_quantize_and_expand(capsys, tmp_path, model, suffix, options, arguments):
    for bits in (1, 4, 8):
        code, _, error = command(
            capsys, "quantize", model, "-o", tmp_path / "small.safetensors", "--bits", bits, "--force", *options
        )
        assert (code, error) == (0, "")
        assert_same(load_palettized(tmp_path / "small.safetensors"), expected(bits, **arguments))
    with use_backend("reference"):
        assert_same(load_palettized(tmp_path / "small.safetensors"), expected(8, **arguments))
    back = tmp_path / f"back.{suffix}"
    code, out, error = command(capsys, "expand", tmp_path / "small.safetensors", "-o", back)
    assert (code, error) == (0, "") and out == f"{back}: 10 tensors, 3.348 kB\n"
    assert_same(load_file(back) if suffix == "safetensors" else torch.load(back), expected(8, **arguments))
    assert sorted(os.listdir(tmp_path)) == sorted(["model.pt", "small.safetensors", back.name])


def test_what_is_printed(capsys, tmp_path, model):
    lines = command(capsys, "quantize", model, "-o", tmp_path / "a.safetensors", "--bits", 4)[1].splitlines()
    w = STATE["conv.weight"]
    ratio = ((w - expected(4)["conv.weight"]).double().norm() / w.double().norm()).item()
    shown = next(line for line in lines if line.startswith("conv.weight")).split()
    assert shown[:6] == ["conv.weight", "8x6x3x3", "float32", "432", f"{ratio:#.4g}", f"{-20 * math.log10(ratio):#.4g}"]
    assert (
        " ".join(shown[6:10]) == "1.728 kB 264 B"
    )  # 216 bytes of codes, and for each of 8 channels a scale and a zero point
    assert lines[-2] == "kept as they are: 5 other tensors"
    size = (tmp_path / "a.safetensors").stat().st_size
    assert lines[-1] == f"{tmp_path / 'a.safetensors'}: 3.348 kB -> {size / 1000:#.4g} kB, {3348 / size:.2f}x smaller"


def test_json(capsys, tmp_path, model):
    small = tmp_path / "a.safetensors"
    code, out, error = command(
        capsys, "quantize", model, "-o", small, "--bits", 6, "--skip", "half.*", "conv", "--asymmetric", "--json"
    )
    assert (code, error) == (0, "")
    data = json.loads(out)
    assert data["kept"] == {"conv.weight": "skipped", "half.weight": "skipped"}
    assert [row["name"] for row in data["weights"]] == ["brain.weight", "double.weight", "tiny.weight"] and data[
        "stored"
    ] == small.stat().st_size
    assert (data["bits"], data["axis"], data["method"], data["symmetric"], data["others"]) == (6, 0, "mse", False, 5)
    assert data["weights"][0]["dense"] == 240 and data["weights"][0]["stored"] == 90 + 10 * 6 + 2


def test_weights_that_stay(capsys, tmp_path):
    state = {
        "nan": draw(9, 9),
        "inf": draw(9, 9).half(),
        "fine": draw(9, 9),
        "constant": torch.ones(4, 4),
        "zero": torch.zeros(4, 4),
    }
    state["nan"][3, 3], state["inf"][2, 2] = math.nan, -math.inf
    torch.save(state, tmp_path / "a.pt")
    for options in ([], ["--asymmetric"], ["--method", "minmax", "--axis", "none"]):
        code, out, error = command(
            capsys,
            "quantize",
            tmp_path / "a.pt",
            "-o",
            tmp_path / "b.safetensors",
            "--bits",
            4,
            "--json",
            "--force",
            *options,
        )
        assert (code, error) == (0, "")
        data = json.loads(out)
        assert data["kept"] == {"nan": "not finite", "inf": "not finite"}
        assert all(row["error"] < 1e-6 for row in data["weights"] if row["name"] != "fine")
        found = load_palettized(tmp_path / "b.safetensors")
        for name in ("nan", "inf", "zero"):
            assert (
                torch.equal(found[name].nan_to_num(7), state[name].nan_to_num(7))
                and found[name].dtype == state[name].dtype
            )
        torch.testing.assert_close(found["constant"], state["constant"])


def test_shared_weights_and_files_again(capsys, tmp_path):
    """Stored once; a quantized file is a checkpoint, and can be reported and clustered."""
    w = draw(20, 10)
    torch.save({"a": w, "b": w, "f": draw(20, 10, seed=1)}, tmp_path / "a.pt")
    assert command(capsys, "quantize", tmp_path / "a.pt", "-o", tmp_path / "a.safetensors", "--bits", 2)[0] == 0
    with Palettized(tmp_path / "a.safetensors") as file:
        assert file.aliases == {"b": "a"} and set(file._weights) == {"a", "f"}
    code, out, _ = command(capsys, "report", tmp_path / "a.safetensors", "--json")
    assert code == 0 and {weight["name"] for weight in json.loads(out)["weights"]} == {"a", "b", "f"}
    assert (
        command(
            capsys, "compress", tmp_path / "a.safetensors", "-o", tmp_path / "a.safetensors", "--bits", 1, "--force"
        )[0]
        == 0
    )
    assert len(load_palettized(tmp_path / "a.safetensors")["a"].unique()) == 2


def test_plot(capsys, tmp_path, model):
    code, out, _ = command(
        capsys, "quantize", model, "-o", tmp_path / "a.safetensors", "--bits", 2, "--plot", tmp_path / "a.png"
    )
    assert code == 0 and out.splitlines()[-1] == f"histograms: {tmp_path / 'a.png'}"
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_input(capsys, tmp_path, model):
    torch.save({"bias": torch.ones(3)}, tmp_path / "bias.pt")
    torch.save({"w": torch.full((9, 9), math.nan)}, tmp_path / "nan.pt")
    save_file({"w": torch.ones(4, 4)}, tmp_path / "plain.safetensors")
    before, new = sorted(os.listdir(tmp_path)), tmp_path / "new.safetensors"
    for args, message in [
        ([model, "--bits", 2], "required: -o/--out"),
        ([model, "-o", new], "required: --bits"),
        ([model, "-o", new, "--bits", 0], "--bits: must be 1 to 8, got 0"),
        ([model, "-o", new, "--bits", 9], "--bits: must be 1 to 8, got 9"),
        ([model, "-o", new, "--bits", 8, "--axis", 1], "--axis: must be 0 or none, got 1"),
        ([model, "-o", new, "--bits", 8, "--method", "entropy"], "--method: invalid choice"),
        ([model, "-o", new, "--bits", 2, "--skip", "none.*"], "--skip none.* matches none of its 10 tensors"),
        ([model, "-o", new, "--bits", 2, "--skip", "*"], "no weight is left to quantize"),
        ([model, "-o", tmp_path / "new.pt", "--bits", 2], "unknown kind of checkpoint '.pt'; allowed are .safetensors"),
        ([model, "-o", tmp_path / "plain.safetensors", "--bits", 2], "exists already; --force overwrites it"),
        ([tmp_path / "none.pt", "-o", new, "--bits", 2], "No such file"),
        ([tmp_path / "bias.pt", "-o", new, "--bits", 2], "no weight (floating point, two or more dimensions)"),
        ([tmp_path / "nan.pt", "-o", new, "--bits", 2], "no weight is left to quantize: all have a NaN or an infinity"),
    ]:
        assert_refused(command(capsys, "quantize", *args), message)
        assert sorted(os.listdir(tmp_path)) == before, args


def test_ctrl_c_leaves_nothing(capsys, tmp_path, model, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(compress, "coded", interrupted)
    assert command(capsys, "quantize", model, "-o", tmp_path / "a.safetensors", "--bits", 2) == (
        130,
        "",
        "r2kernels: interrupted\n",
    )
    assert os.listdir(tmp_path) == ["model.pt"]


def test_one_weight_at_a_time(tmp_path, monkeypatch):
    """A checkpoint may be larger than memory."""
    torch.save({f"w{i}": draw(50, 50, seed=i) for i in range(5)}, tmp_path / "a.pt")
    alive, original, most = [], compress.coded, []

    def watched(w, form, **options):
        made = original(w, form, **options)
        alive.append(weakref.ref(made.codes))
        most.append(sum(ref() is not None for ref in alive))
        return made

    monkeypatch.setattr(compress, "coded", watched)
    compress.quantize(Checkpoint(tmp_path / "a.pt"), tmp_path / "b.safetensors", Grid(4, 0))
    assert len(most) == 5 and max(most) <= 2
