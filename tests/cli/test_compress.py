"""`compress`, `expand` and `report --sizes` as a user types them, and what they do with memory and with bad input."""

import json
import math
import os
import weakref

import pytest
import torch
from cli.commandline import STATE, WEIGHTS, assert_refused, assert_same, command, draw, on_a_terminal
from safetensors.torch import load_file, save_file

import r2kernels
from r2kernels import cli
from r2kernels.cli import compress, results, sizes
from r2kernels.cli.expand import expand
from r2kernels.files.checkpoint import Checkpoint
from r2kernels.files.clustered import Clustered, Form
from r2kernels.files.loading import Palettized, load_palettized, opened

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tmp_path):
    torch.save({"state_dict": STATE, "epoch": 3}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def by_kmeans(w, bits):
    """Each weight replaced by the nearest centroid."""
    c = r2kernels.kmeans(w, 2**bits)
    return c.to(w.dtype)[r2kernels.assign(w, c).long()].reshape(w.shape)


def expected(bits=2, only=WEIGHTS):
    return {name: by_kmeans(w, bits) if name in only else w for name, w in STATE.items()}


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "PTH"])
def test_compress_and_expand(capsys, tmp_path, model, suffix):
    code, out, error = command(capsys, "compress", model, "-o", tmp_path / "small.safetensors", "--bits", 2)
    assert (code, error) == (0, "")
    assert_same(load_palettized(tmp_path / "small.safetensors"), expected())
    back = tmp_path / f"back.{suffix}"
    code, out, error = command(capsys, "expand", tmp_path / "small.safetensors", "-o", back)
    assert (code, error) == (0, "") and out == f"{back}: 10 tensors, 3.348 kB\n"
    assert_same(load_file(back) if suffix == "safetensors" else torch.load(back), expected())
    assert sorted(os.listdir(tmp_path)) == sorted(["model.pt", "small.safetensors", back.name])


def test_what_is_printed(capsys, tmp_path, model):
    lines = command(capsys, "compress", model, "-o", tmp_path / "a.safetensors", "--bits", 2)[1].splitlines()
    w = STATE["conv.weight"]
    ratio = ((w - by_kmeans(w, 2)).double().norm() / w.double().norm()).item()
    shown = next(line for line in lines if line.startswith("conv.weight")).split()
    assert shown[:6] == ["conv.weight", "8x6x3x3", "float32", "432", f"{ratio:#.4g}", f"{-20 * math.log10(ratio):#.4g}"]
    assert " ".join(shown[6:10]) == "1.728 kB 128 B"  # 108 bytes of codes, filled up to 112, and 4 centroids
    assert lines[-2] == "kept as they are: 1 weight fewer rows than centroids (tiny.weight); 5 other tensors"
    size = (tmp_path / "a.safetensors").stat().st_size
    assert lines[-1] == f"{tmp_path / 'a.safetensors'}: 3.348 kB -> {size / 1000:#.4g} kB, {3348 / size:.2f}x smaller"


def test_json(capsys, tmp_path, model):
    small = tmp_path / "a.safetensors"
    code, out, error = command(
        capsys, "compress", model, "-o", small, "--bits", 6, "--skip", "half.*", "conv", "--lut-dtype", "int8", "--json"
    )
    assert (code, error) == (0, "")
    data = json.loads(out)
    assert data["kept"] == {
        "conv.weight": "skipped",
        "half.weight": "skipped",
        "tiny.weight": "fewer rows than centroids",
    }
    assert [row["name"] for row in data["weights"]] == ["brain.weight", "double.weight"] and data[
        "stored"
    ] == small.stat().st_size
    assert (data["bits"], data["lut_dtype"], data["group_size"], data["entropy"], data["others"]) == (
        6,
        "int8",
        None,
        None,
        5,
    )
    assert data["weights"][0]["dense"] == 240 and data["weights"][0]["stored"] == 64 + 4 + 90 + 2
    code, out, _ = command(capsys, "expand", small, "-o", tmp_path / "b.pt", "--json")
    assert json.loads(out) == {"file": str(small), "out": str(tmp_path / "b.pt"), "tensors": 10, "bytes": 3348}


@pytest.mark.parametrize(
    ("options", "form"),
    [
        (["--cluster-dim", 2], Form(2, 2)),
        (["--cluster-dim", 3, "--layout", "contiguous"], Form(2, 3, "contiguous")),
        (["--group-size", 4, "--per-channel-scale", "--lut-dtype", "int8"], Form(2, 1, "output", 4, True, "int8")),
        (["--lut-dtype", "fp16", "--entropy", "huffman"], Form(2, lut_dtype="fp16")),
        (["--granularity", "4x3", "--lut-dtype", "fp8"], Form(2, lut_dtype="fp8", granularity=(4, 3))),
        (["--granularity", "channel", "--lut-dtype", "bf16"], Form(2, 1, "output", 1, False, "bf16")),
        (["--granularity", "group", "--group-size", 2], Form(2, 1, "output", 2)),
    ],
    ids=str,
)
def test_options(capsys, tmp_path, model, options, form):
    code, _, error = command(capsys, "compress", model, "-o", tmp_path / "a.safetensors", "--bits", 2, *options)
    assert (code, error) == (0, "")
    with Palettized(tmp_path / "a.safetensors") as file:
        assert {f for _, _, f, _ in file._weights.values()} == {form}
        for name in file._weights:
            assert torch.equal(compress.cluster(STATE[name], form).decoded(), file.tensor(name))


def test_shared_weights(capsys, tmp_path):
    """Clustered and stored once; .pt keeps them one tensor."""
    w, b = draw(20, 10), draw(5)
    torch.save({"a": w, "b": w, "c": b, "d": b, "e": w.t(), "f": draw(20, 10)}, tmp_path / "a.pt")
    assert Checkpoint(tmp_path / "a.pt").aliases == {"b": "a", "d": "c"}
    assert command(capsys, "compress", tmp_path / "a.pt", "-o", tmp_path / "a.safetensors", "--bits", 2)[0] == 0
    with Palettized(tmp_path / "a.safetensors") as file:
        assert file.aliases == {"b": "a", "d": "c"} and set(file._weights) == {"a", "e", "f"}
    for name in ("b.pt", "b.safetensors"):
        assert command(capsys, "expand", tmp_path / "a.safetensors", "-o", tmp_path / name)[0] == 0
    found = torch.load(tmp_path / "b.pt")
    assert (
        found["a"].data_ptr() == found["b"].data_ptr()
        and found["c"].data_ptr() == found["d"].data_ptr() != found["a"].data_ptr()
    )
    assert_same(found, load_file(tmp_path / "b.safetensors"))
    torch.nn.Linear(10, 20, bias=False).load_state_dict({"weight": found["a"]})


def test_weights_that_stay(capsys, tmp_path):
    state = {
        "nan": draw(9, 9),
        "inf": draw(9, 9).half(),
        "fine": draw(9, 9),
        "constant": torch.ones(4, 4),
        "zero": torch.zeros(4, 4),
        "few": draw(3, 5),
    }
    state["nan"][3, 3], state["inf"][2, 2] = math.nan, -math.inf
    torch.save(state, tmp_path / "a.pt")
    code, out, error = command(
        capsys, "compress", tmp_path / "a.pt", "-o", tmp_path / "b.safetensors", "--bits", 4, "--json"
    )
    assert (code, error) == (0, "")
    data = json.loads(out)
    assert data["kept"] == {"nan": "not finite", "inf": "not finite", "few": "fewer rows than centroids"}
    assert [(row["name"], row["error"], row["snr"]) for row in data["weights"] if row["name"] != "fine"] == [
        ("constant", 0, None),
        ("zero", 0, None),
    ]
    found = load_palettized(tmp_path / "b.safetensors")
    for name in ("nan", "inf", "constant", "zero", "few"):
        assert (
            torch.equal(found[name].nan_to_num(7), state[name].nan_to_num(7)) and found[name].dtype == state[name].dtype
        )


def test_groups_of_other_sizes(capsys, tmp_path):
    """The last group may have fewer rows than centroids, and no warning; without a row the weight stays."""
    torch.save({"a": draw(9, 20), "b": draw(9, 2), "c": draw(8, 3)}, tmp_path / "a.pt")
    options = "--bits", 1, "--cluster-dim", 3, "--group-size", 4, "--json"
    code, out, error = command(capsys, "compress", tmp_path / "a.pt", "-o", tmp_path / "b.safetensors", *options)
    assert (code, error) == (0, "")
    assert json.loads(out)["kept"] == {"b": "fewer rows than centroids"}
    assert load_palettized(tmp_path / "b.safetensors")["a"].shape == (9, 20)


def test_a_palettized_file_is_a_checkpoint(capsys, tmp_path, model):
    """It can be reported, and clustered to fewer bits."""
    assert command(capsys, "compress", model, "-o", tmp_path / "a.safetensors", "--bits", 4)[0] == 0
    code, out, _ = command(capsys, "report", tmp_path / "a.safetensors", "--json")
    assert code == 0 and {weight["name"] for weight in json.loads(out)["weights"]} == {*WEIGHTS, "tiny.weight"}
    assert (
        command(
            capsys, "compress", tmp_path / "a.safetensors", "-o", tmp_path / "a.safetensors", "--bits", 1, "--force"
        )[0]
        == 0
    )
    again = {name: by_kmeans(w, 1) if name in (*WEIGHTS, "tiny.weight") else w for name, w in expected(4).items()}
    assert_same(load_palettized(tmp_path / "a.safetensors"), again)


def test_plot(capsys, tmp_path, model):
    code, out, _ = command(
        capsys, "compress", model, "-o", tmp_path / "a.safetensors", "--bits", 2, "--plot", tmp_path / "a.png"
    )
    assert code == 0 and out.splitlines()[-1] == f"histograms: {tmp_path / 'a.png'}"
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    result = compress.compress(Checkpoint(model), tmp_path / "b.safetensors", Form(2), plot=True)
    assert [len(axes.patches) for axes in results.result_figure(result, "x").axes] == [2] * 4
    low, high = STATE["conv.weight"].aminmax()
    assert (
        result.rows[0].panel[0] == (low, high) and sum(result.rows[0].panel[1]) == sum(result.rows[0].panel[2]) == 432
    )


def test_bad_input(capsys, tmp_path, model):
    (tmp_path / "broken.safetensors").write_bytes(b"hello world" * 9)
    torch.save({"bias": torch.ones(3)}, tmp_path / "bias.pt")
    torch.save({"w": torch.full((9, 9), math.nan)}, tmp_path / "nan.pt")
    save_file({"w": torch.ones(4, 4)}, tmp_path / "plain.safetensors")
    assert command(capsys, "compress", model, "-o", tmp_path / "good.safetensors", "--bits", 2)[0] == 0
    data = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "changed.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    before, new = sorted(os.listdir(tmp_path)), tmp_path / "new.safetensors"
    for args, message in [
        (["compress", model, "--bits", 2], "required: -o/--out"),
        (["compress", model, "-o", new], "arguments --bits --budget is required"),
        (["compress", model, "-o", new, "--bits", 0], "--bits: must be 1 to 8, got 0"),
        (["compress", model, "-o", new, "--bits", 9], "--bits: must be 1 to 8, got 9"),
        (["compress", model, "-o", new, "--bits", "two"], "--bits: invalid"),
        (["compress", model, "-o", new, "--bits", 2, "--cluster-dim", 0], "--cluster-dim: must be at least 1"),
        (["compress", model, "-o", new, "--bits", 2, "--cluster-dim", 65], "cluster_dim 65; at most 64"),
        (["compress", model, "-o", new, "--bits", 2, "--layout", "input"], "--layout: invalid choice"),
        (
            ["compress", model, "-o", new, "--bits", 2, "--granularity", "8x"],
            "channel, group, row or ROWSxCOLUMNS, got 8x",
        ),
        (["compress", model, "-o", new, "--bits", 2, "--granularity", "0x8"], "ROWSxCOLUMNS, got 0x8"),
        (["compress", model, "-o", new, "--bits", 2, "--granularity", "group"], "needs group_size"),
        (
            ["compress", model, "-o", new, "--bits", 2, "--granularity", "4x4", "--group-size", 2],
            "cannot be given with granularity=(4, 4)",
        ),
        (
            ["compress", model, "-o", new, "--bits", 2, "--skip", "none.*"],
            "--skip none.* matches none of its 10 tensors",
        ),
        (["compress", model, "-o", new, "--bits", 2, "--skip", "*"], "no weight is left to cluster"),
        (
            ["compress", model, "-o", new, "--bits", 8, "--cluster-dim", 64],
            "no weight is left to cluster (conv.weight: fewer rows than centroids; ",
        ),
        (
            ["compress", model, "-o", tmp_path / "new.pt", "--bits", 2],
            "unknown kind of checkpoint '.pt'; allowed are .safetensors",
        ),
        (["compress", model, "-o", tmp_path / "no" / "new.safetensors", "--bits", 2], "there is no directory"),
        (
            ["compress", model, "-o", tmp_path / "good.safetensors", "--bits", 2],
            "exists already; --force overwrites it",
        ),
        (["compress", model, "-o", new, "--bits", 2, "--plot", tmp_path / "a.xyz"], "unknown kind of image"),
        (["compress", tmp_path / "none.pt", "-o", new, "--bits", 2], "No such file"),
        (["compress", tmp_path / "broken.safetensors", "-o", new, "--bits", 2], "corrupt"),
        (["compress", tmp_path / "changed.safetensors", "-o", new, "--bits", 2], "its checksum differs"),
        (
            ["compress", tmp_path / "bias.pt", "-o", new, "--bits", 2],
            "no weight (floating point, two or more dimensions)",
        ),
        (["compress", tmp_path / "nan.pt", "-o", new, "--bits", 2], "all have a NaN or an infinity"),
        (["expand", tmp_path / "good.safetensors"], "required: -o/--out"),
        (
            ["expand", tmp_path / "good.safetensors", "-o", tmp_path / "new.bin"],
            "unknown kind of checkpoint '.bin'; allowed are .safetensors, .pt, .pth",
        ),
        (["expand", tmp_path / "good.safetensors", "-o", model], "exists already"),
        (["expand", tmp_path / "none", "-o", new], "No such file"),
        (["expand", tmp_path, "-o", new], "holds several checkpoints"),
        (["expand", tmp_path / "plain.safetensors", "-o", new], "is not a palettized file"),
        (["expand", tmp_path / "broken.safetensors", "-o", new], "not a safetensors file"),
        (["expand", tmp_path / "changed.safetensors", "-o", new], "is corrupt (its checksum differs)"),
        (["expand", tmp_path / "changed.safetensors", "-o", tmp_path / "new.pt"], "is corrupt (its checksum differs)"),
        (["report", model, "--sizes", "--ends", "x"], "--ends x matches none of its 5 weights"),
        (["report", model, "--sizes", "--plot", tmp_path / "a.png"], "--plot draws no sizes"),
    ]:
        assert_refused(command(capsys, *args), message)
        assert sorted(os.listdir(tmp_path)) == before, args


def test_ctrl_c_leaves_nothing(capsys, tmp_path, model, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(compress, "cluster", interrupted)
    assert command(capsys, "compress", model, "-o", tmp_path / "a.safetensors", "--bits", 2) == (
        130,
        "",
        "r2kernels: interrupted\n",
    )
    assert os.listdir(tmp_path) == ["model.pt"]


class Living:
    """Counts the tensors that something returned and that are still there."""

    def __init__(self, function):
        self.function, self.refs, self.most = function, [], 0

    def __call__(self, *args):
        self.refs = [ref for ref in self.refs if ref() is not None]
        found = self.function(*args)
        self.refs.append(weakref.ref(found))
        self.most = max(self.most, len(self.refs))
        return found


def test_one_tensor_at_a_time(tmp_path, monkeypatch):
    """A checkpoint larger than memory works.

    Of what is read, clustered or decoded no more than two are there at once, the one before and the next.
    """
    save_file(
        {f"layer{i}.weight": draw(20, 20, seed=i) for i in range(12)} | {f"layer{i}.bias": draw(20) for i in range(12)},
        tmp_path / "a.safetensors",
    )
    checkpoint = Checkpoint(tmp_path / "a.safetensors")
    checkpoint._part = read = Living(checkpoint._part)
    decoded = Living(Clustered.decoded)
    monkeypatch.setattr(Clustered, "decoded", lambda self: decoded(self))
    compress.compress(checkpoint, tmp_path / "b.safetensors", Form(2), jobs=1)
    assert read.most <= 2 and decoded.most <= 2
    for name in ("c.safetensors", "c.pt"):
        with Palettized(tmp_path / "b.safetensors") as file:
            expand(file, tmp_path / name)
    assert decoded.most <= 2
    checkpoint._get = read = Living(checkpoint._get)
    sizes.measure(checkpoint)
    assert read.most <= 2


def test_progress(tmp_path, model):
    done = []
    compress.compress(Checkpoint(model), tmp_path / "a.safetensors", Form(2), advance=done.append)
    assert sum(done) == sum(t.nbytes for t in STATE.values())
    for suffix in ("safetensors", "pt"):
        done.clear()
        with Palettized(tmp_path / "a.safetensors") as file:
            expand(file, tmp_path / f"b.{suffix}", advance=done.append)
        assert sum(done) == sum(t.nbytes for t in STATE.values())
    shown = on_a_terminal("compress", model, "-o", tmp_path / "c.safetensors", "--bits", 2, columns=80)
    assert "clustering weights" in shown and "kB" in shown and "smaller" in shown


def test_opened(tmp_path, model):
    assert type(opened(model)) is Checkpoint
    assert "compress" in cli.COMMANDS and "expand" in cli.COMMANDS
