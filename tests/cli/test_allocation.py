"""`compress --budget` and `--importance` as a user types them."""

import json

import pytest
import torch
from cli.commandline import assert_refused, command, draw
from safetensors.torch import save_file

from r2kernels.files.loading import Palettized, load_palettized
from r2kernels.nn.clustering import clustered_weight

OTHER = {"b.weight": torch.ones(64, 16)}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tmp_path):
    save_file(
        {"a.weight": draw(32, 64), "b.weight": draw(64, 16, seed=1), "b.bias": draw(64)}, tmp_path / "m.safetensors"
    )
    return tmp_path / "m.safetensors"


@pytest.fixture
def importance(tmp_path):
    save_file({"a.weight": draw(32, 64, seed=2) ** 8, "other": draw(3)}, tmp_path / "h.safetensors")
    return tmp_path / "h.safetensors"


def test_importance_weights_the_centroids(capsys, tmp_path, model, importance):
    out = tmp_path / "small.safetensors"
    code, _, error = command(capsys, "compress", model, "-o", out, "--bits", 2, "--importance", importance)
    assert code == 0 and error.count("\n") == 1
    assert "h.safetensors: without importances, and not weighted: b.weight" in error
    found = load_palettized(out)
    with Palettized(out) as file:
        for name, h in (("a.weight", draw(32, 64, seed=2) ** 8), ("b.weight", None)):
            w = {"a.weight": draw(32, 64), "b.weight": draw(64, 16, seed=1)}[name]
            _, wanted = clustered_weight(w, file.clustered(name).form, weight=h)
            assert torch.equal(found[name], wanted.decoded())


@pytest.mark.parametrize("budget", [1.5, 2.5, 4.2])
def test_a_budget_is_met(capsys, tmp_path, model, budget):
    out = tmp_path / "small.safetensors"
    code, text, _ = command(capsys, "compress", model, "-o", out, "--budget", budget, "--json")
    found = json.loads(text)
    stored = sum(row["stored"] for row in found["weights"])
    assert code == 0 and 0.9 * budget < 8 * stored / (32 * 64 + 64 * 16) <= budget
    assert found["budget"] == budget and {row["bits"] for row in found["weights"]} <= {1, 2, 3, 4, 6, 8}


def test_more_important_weights_have_more_bits(capsys, tmp_path, model):
    sizes = []
    for scale in (1e-3, 1e3):
        save_file({"a.weight": torch.full((32, 64), scale), "b.weight": torch.ones(64, 16)}, tmp_path / "h.safetensors")
        options = ("--budget", 2.6, "--importance", tmp_path / "h.safetensors", "--json", "--force")
        _, text, _ = command(capsys, "compress", model, "-o", tmp_path / "small.safetensors", *options)
        sizes.append({row["name"]: row["stored"] for row in json.loads(text)["weights"]})
    assert sizes[0]["a.weight"] < sizes[1]["a.weight"] and sizes[0]["b.weight"] > sizes[1]["b.weight"]


@pytest.mark.parametrize(
    ("message", "tensors"),
    [
        ("a.weight has shape (64, 32), not (32, 64)", {"a.weight": torch.ones(64, 32)}),
        ("has importances of none of the weights, such as a.weight", {"c.weight": torch.ones(2, 2)}),
        ("weight of a.weight must be finite numbers >= 0", {"a.weight": torch.full((32, 64), torch.nan), **OTHER}),
        ("weight of a.weight must be a floating-point tensor", {"a.weight": torch.ones(32, 64).int(), **OTHER}),
    ],
)
def test_importances_that_cannot_be(capsys, tmp_path, model, message, tensors):
    save_file(tensors, tmp_path / "h.safetensors")
    options = ("--bits", 2, "--importance", tmp_path / "h.safetensors")
    assert_refused(command(capsys, "compress", model, "-o", tmp_path / "out.safetensors", *options), message)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("--budget must be at least 1", ("--budget", 0.3)),
        ("--budget chooses how weights are clustered; --group-size says it too", ("--budget", 3, "--group-size", 4)),
        ("not allowed with argument", ("--budget", 3, "--bits", 2)),
        ("one of the arguments --bits --budget is required", ()),
        ("h.safetensors", ("--bits", 2, "--importance", "h.safetensors")),
    ],
)
def test_bad_options(capsys, tmp_path, model, message, options):
    assert_refused(command(capsys, "compress", model, "-o", tmp_path / "out.safetensors", *options), message)
