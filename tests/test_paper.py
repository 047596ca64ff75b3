"""The programme behind `make paper`, shortened: on digits, on folders of pictures, under torchrun."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAPER = Path(__file__).parents[1] / "benchmarks" / "paper"
SHORT = ["--epochs", "1", "--tuning-epochs", "1", "--seeds", "1"]


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(PAPER))
    yield {name: importlib.import_module(name) for name in ("data", "networks", "training", "tables")}
    sys.path.remove(str(PAPER))


def run(*arguments, launcher=()):
    done = subprocess.run(
        [sys.executable, *launcher, str(PAPER), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures of each of two classes to train, four to test."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("pictures")
    g = torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("val", 4)):
        for label, name in enumerate(("dark", "light")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = (torch.rand(40, 48, 3, generator=g) * 100 + 120 * label).byte()
                image.fromarray(pixels.numpy()).save(folder / part / name / f"{i}.{'png' if i % 2 else 'JPEG'}")
    return folder


def test_digits_and_going_on(tmp_path):
    chosen = ["--networks", "MobileNet-V1", "--losses", "no R2", "margin", "clipping at 2.5 std"]
    methods = ["--methods", "LSQ 2 bit", "EWGS 2 bit", "PACT 4 bit", "DKM 2 bit, 1-dim", "PTQ W2A8"]
    code, out, err = run(*SHORT, *chosen, *methods, "--jobs", "2", "--results", tmp_path)
    assert code == 0, err
    for text in (
        "Full precision (table 1)",
        "DKM, scalars (table 3)",
        "Post-training quantization",
        "LSQ 2 bit",
        "clipping at 2.5 std",
        "None helps beyond the spread",
    ):
        assert text in out.replace("\n", " ")
    data = json.loads((tmp_path / "paper.json").read_text())
    assert len(data["jobs"]) == 3
    for job in data["jobs"]:
        assert {*job["found"]} == {"fp32", "range", "range/std", *methods[1:]}
        assert all(0 <= job["found"][name] <= 1 for name in methods[1:]) and job["found"]["range"] > 0
    assert "(52.58)" not in (tmp_path / "paper.md").read_text() and "(38.78)" in (tmp_path / "paper.md").read_text()
    before = (tmp_path / "paper.json").stat().st_mtime_ns
    assert run(*SHORT, *chosen, *methods, "--results", tmp_path)[0] == 0
    assert (tmp_path / "paper.json").stat().st_mtime_ns == before  # all was done


def test_pictures_under_torchrun(folder, tmp_path):
    chosen = ["--networks", "MobileNet-V2", "--losses", "L-infinity", "--methods", "LSQ 4 bit", "DKM 4 bit, 4-dim"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    where = ["--data", folder, "--batch", 8, "--size", 32, "--workers", 0, "--results", tmp_path, "--device", "cpu"]
    code, out, err = run(*where, *SHORT, *chosen, launcher=launcher)
    assert code == 0, err
    assert out.count("Full precision") == 1  # one process speaks
    (job,) = json.loads((tmp_path / f"paper-{folder.name}.json").read_text())["jobs"]
    assert {*job["found"]} == {"fp32", "range", "range/std", "LSQ 4 bit", "DKM 4 bit, 4-dim"}


def test_pictures(folder, modules):
    pictures = modules["data"].pictures(folder, torch.device("cpu"), 8, 24, 0)
    assert pictures.classes == 2 and len(pictures.train) == 3
    torch.manual_seed(0)
    images, labels = next(iter(pictures.train))
    assert images.shape == (8, 3, 24, 24) and labels.dtype == torch.int64
    means = images.mean((1, 2, 3))
    assert means[labels == 0].max() < means[labels == 1].min()
    images, labels = next(iter(pictures.test))
    again, _ = next(iter(pictures.test))
    assert torch.equal(images, again)  # no chance in the test


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/nowhere"], "--data /nowhere: there is no such folder"),
        (["--data", PAPER, "--device", "cpu"], "holds no pictures; expected"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--networks", "AlexNet"], "invalid choice: 'AlexNet'"),
    ],
)
def test_bad_input(arguments, message, tmp_path):
    code, _, err = run(*SHORT, *arguments, "--results", tmp_path)
    assert code == 2 and message in " ".join(err.split()) and "Traceback" not in err
    assert not any(tmp_path.iterdir())


def test_batches_that_do_not_divide(folder, modules):
    with pytest.raises(ValueError, match=r"--batch 100 must be .* at most the 24 pictures"):
        modules["data"].pictures(folder, torch.device("cpu"), 100, 24, 0)


def test_the_published_networks(modules):
    """Their numbers of parameters, as published."""
    sizes = {
        name: sum(p.numel() for p in make(False, 3, 1000).parameters())
        for name, make in modules["networks"].NETWORKS.items()
    }
    assert sizes == {"ResNet-18": 11_689_512, "MobileNet-V1": 4_231_976, "MobileNet-V2": 3_504_872}
    for make in modules["networks"].NETWORKS.values():
        assert make(False, 3, 10).eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
        assert make(True, 1, 10).eval()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_tables(modules):
    """Means, spreads, the paper's figures beside them, and what helps."""
    tables = modules["tables"]
    jobs = [
        {
            "network": "ResNet-18",
            "loss": loss,
            "seed": seed,
            "found": {"fp32": 0.9 + 0.01 * seed, "LSQ 2 bit": value + 0.02 * seed, "range": 1.0, "range/std": 5.0},
        }
        for loss, value in (("no R2", 0.5), ("margin", 0.7))
        for seed in (0, 1)
    ]
    titles = {title: rows for title, _, rows in tables.tables(jobs)}
    spread = 100 * math.sqrt(2 * 0.01**2)
    assert titles["Weights and activations quantized, trained on (table 1): ResNet-18"] == [
        ("no R2", f"51.0 ± {spread:.1f} (58.33)"),
        ("margin", f"71.0 ± {spread:.1f} (62.25)"),
    ]
    gained, not_gained = tables.helps(jobs)
    assert gained == ["LSQ 2 bit, ResNet-18: best is margin, +20.0 points (spread of the difference 2.0)"]
    assert len(not_gained) == 1 and not_gained[0].startswith("fp32, ResNet-18")
