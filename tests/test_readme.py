"""The README's examples run as printed, one after the other."""

import re
from pathlib import Path

import r2kernels

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    scope = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert abs(r2kernels.soft_min_max(scope["W"], scope["alpha"]) - scope["exact"]) < 1e-6
    assert scope["W"].grad.shape == scope["W"].shape
    assert all(p.grad is not None for p in scope["model"].parameters())


def test_every_public_name_is_told():
    told = set(re.findall(r"\w+", README))
    assert not [
        name
        for name in r2kernels.__all__
        if not name.startswith("_") and name not in told | {"WeightStats", "backends"}
    ]
