"""The README: its examples run as printed, its figures are those of the results, its links lead somewhere."""

import json
import re
from pathlib import Path

import pytest

import r2kernels

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GUIDE = ROOT / "r2kernels" / "nn" / "README.md"
PAGES = (ROOT / "README.md", GUIDE, *sorted((ROOT / "benchmarks").rglob("*.md")))


def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 5
    scope, trained = {}, []
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
        trained += [name for name, p in scope["model"].named_parameters() if p.grad is not None]
        if "palettizer.remove()" in block:
            assert scope["model"][0].weight.unique().numel() == 4
        if "quantizer.remove()" in block:
            assert scope["model"][0].weight.unique().numel() <= 16 * 64  # LSQ's levels, a step for each channel
    W, alpha = scope["W"], scope["alpha"]
    assert abs(r2kernels.soft_min_max(W, alpha) - scope["exact"]) < 1e-6
    assert abs(scope["eager"](W, alpha) - scope["exact"]) < 1e-3
    assert W.grad.shape == W.shape and alpha.grad is not None
    assert len(scope["losses"]) == 2
    assert {*trained} == dict(scope["model"].named_parameters()).keys()
    assert scope["codes"].max() < 16 and scope["layer"].weight.grad is not None


def test_examples_of_the_guide_run():
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 6
    scope = {}
    for block in blocks:
        exec(compile(block, "nn/README.md", "exec"), scope)
    assert not scope["attached"](scope["model"])


def test_every_public_name_is_told():
    told = set(re.findall(r"\w+", README))
    assert not [
        name
        for name in r2kernels.__all__
        if not name.startswith("_") and name not in told | {"WeightStats", "backends"}
    ]


def test_the_tables_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import readme_table

    assert readme_table.filled(README) == README, "run python benchmarks/readme_table.py"


def test_the_picture_is_that_of_its_figures():
    made = json.loads((ROOT / "benchmarks" / "results" / "readme.json").read_text())
    ranges = [f"{case['max'] - case['min']:.2f}" for case in made["cases"].values()]
    caption = README.split("readme.png)")[1].split("## ")[0]
    assert f"range {ranges[0]} without R2, {ranges[1]} with it" in README
    versions = made["machine"]["device"], f"torch {made['versions']['torch']}"
    for told in (*versions, made["date"], f"seed {made['seed']}", f"{made['epochs']} epochs"):
        assert told in " ".join(caption.split())
    picture = (ROOT / "benchmarks" / "results" / "readme.png").read_bytes()
    assert picture[:4] == b"\x89PNG" and len(picture) <= 150_000


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 220
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, section = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if section else []
        assert not section or section in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles], link


def test_files_named_are_there():
    for name in re.findall(r"(?:python|pytest) (benchmarks/[\w./]+)", "\n".join(page.read_text() for page in PAGES)):
        assert (ROOT / name).exists(), name
    makefile = (ROOT / "Makefile").read_text()
    for name in re.findall(r"make ([a-z-]+)[` ]", README):
        assert f"\n{name}:" in makefile, name
