"""The law of imports, and how long files and lines may be."""

import ast
import sys
from pathlib import Path

import pytest

import r2kernels

PACKAGE = Path(r2kernels.__file__).parent
ROOT = PACKAGE.parent

# what a call may be given
SPECIFIED = {"reference.checks", "reference.columns", "reference.parameters", "reference.zeros"}
# module -> the modules of the package that it may import; `x.*` are those of a folder. All else is forbidden.
LAW = {
    "": {"backends", "files.*", "functional", "functional.*", "integrations", "nn", "nn.*", "reference", "version"},
    "__main__": {"cli"},
    "version": set(),
    # the specification: torch and itself
    "reference": {"reference.*"},
    "reference.columns": set(),
    "reference.precision": set(),
    "reference.zeros": {"reference.columns"},
    "reference.lasting": set(),
    "reference.checks": {"reference.columns"},
    "reference.sample": {"reference.columns"},
    "reference.parameters": {"reference.checks", "reference.columns", "reference.lasting"},
    "reference.range_losses": SPECIFIED,
    "reference.regularizers": SPECIFIED | {"reference.quantizers", "reference.range_losses"},
    "reference.quantizers": SPECIFIED,
    "reference.dkm": SPECIFIED | {"reference.precision"},
    "reference.kmeans": SPECIFIED,
    # the contract, and how a list becomes one launch
    "contract": SPECIFIED | {"reference.quantizers"},
    "lists": {"contract", "reference.lasting"},
    # backends know neither each other nor the reference
    "backends": set(),
    "backends.launchers": {"contract", "lists"},
    "backends.native": {"backends.launchers", "backends.native.*", "contract", "lists"},
    "backends.native.*": {"backends.launchers", "backends.native.*", "contract", "lists"},
    "backends.triton": {"backends.triton.*"},
    "backends.triton.launch": {"backends.triton.chunks", "contract", "lists"},
    **{
        f"backends.triton.{family}": {"backends.launchers", "backends.triton.*", "contract", "lists"}
        for family in ("range_losses", "regularizers", "quantizers", "dkm")
    },
    "backends.triton.*": {"backends.triton.*"},  # kernels: Triton alone
    "algorithms": set(),
    "algorithms.fixed_point": set(),
    "algorithms.iterations": {"algorithms.fixed_point"},
    "algorithms.kmeans": set(),
    "algorithms.rank": set(),
    "empty": set(),
    "ops": {
        "algorithms.fixed_point",
        "algorithms.iterations",
        "backends",
        "contract",
        "empty",
        "lists",
        "reference",
        "sharding",
    },
    # the ops on DTensors: kernels are given, merges are made of the reference's formulas
    "sharding": {"sharding.*"},
    "sharding.*": {"lists", "reference.*", "sharding.shards"},
    "sharding.losses": {"algorithms.rank", "reference.*", "sharding.shards"},
    "sharding.sample": {"reference.lasting", "reference.sample", "sharding.losses", "sharding.shards"},
    # what a user calls
    "functional": {"functional.*"},
    "functional.differentiable": {"reference.checks", "sharding.shards"},
    "functional.loss": {"contract", "functional.differentiable", "ops", "reference.checks", "reference.parameters"},
    "functional.range_losses": {"functional.differentiable", "functional.loss", "ops", "reference.parameters"},
    "functional.regularizers": {
        "contract",
        "functional.differentiable",
        "functional.loss",
        "lists",
        "ops",
        "reference.checks",
        "reference.parameters",
        "reference.regularizers",
    },
    "functional.quantizers": {"functional.differentiable", "lists", "ops", "reference.checks", "reference.parameters"},
    "functional.dkm": SPECIFIED | {"functional.differentiable", "ops", "sharding.dkm", "sharding.shards"},
    "functional.kmeans": SPECIFIED
    | {"algorithms.kmeans", "backends", "backends.native", "functional.differentiable", "ops"}
    | {"sharding", "sharding.whole"},
    # files
    "files": set(),
    "files.packing": {"backends", "backends.native"},
    "files.scalars": {"files.packing", "reference.columns"},
    "files.huffman": {"files.packing"},
    "files.tables": set(),
    "files.tiles": {"files.packing"},
    "files.clustered": {"files.packing", "files.scalars", "files.tables", "files.tiles"}
    | {"functional.dkm", "reference.checks", "reference.columns"},
    "files.uniform": {"files.clustered", "files.packing", "reference.columns"},
    "files.integers": {"files.clustered", "files.uniform", "reference.columns"},
    "files.paths": set(),
    "files.partial": {"files.checkpoint", "files.paths"},
    "files.checkpoint": {"files.paths", "reference.checks"},
    "files.folders": {"files.checkpoint", "files.paths"},
    "files.container": {"files.checkpoint", "files.paths"},
    "files.format": {
        "files.checkpoint",
        "files.clustered",
        "files.container",
        "files.huffman",
        "files.integers",
        "files.uniform",
    },
    "files.saving": {
        "files.checkpoint",
        "files.clustered",
        "files.container",
        "files.format",
        "files.huffman",
        "files.paths",
    },
    "files.loading": {
        "files.checkpoint",
        "files.container",
        "files.folders",
        "files.format",
        "files.huffman",
        "reference.checks",
    },
    "files.coreml": {"files.clustered"},
    "files.onnx": {"files.clustered", "files.integers", "files.uniform"},
    # modules
    "nn": {"nn.*"},
    "nn.sharded": set(),
    "nn.places": {"nn.sharded", "sharding.shards"},
    "nn.select": {"nn.places", "nn.sharded"},
    "nn.layers": {"nn.places", "nn.select", "nn.sharded", "reference.checks", "sharding.shards"},
    "nn.ranks": {"lists"},
    "nn.tracing": set(),
    "nn.attach": {"nn.sharded", "nn.tracing", "reference.checks", "sharding.shards"},
    "nn.synchronised": {"nn.attach", "nn.ranks", "nn.sharded", "reference.checks"},
    "nn.export": {"files.onnx", "nn.attach", "nn.inputs", "nn.quantizer", "nn.tracing"},
    "nn.hessian": {"nn.attach"},
    "nn.inputs": {"nn.select"},
    "nn.coefficient": {"reference.checks"},
    "nn.groups": {"functional.quantizers", "reference.columns", "reference.parameters"},
    "nn.clipping": {"files.uniform", "nn.groups", "reference.columns", "reference.parameters", "reference.quantizers"},
    "nn.scales": {
        "files.uniform",
        "functional.quantizers",
        "nn.clipping",
        "reference.columns",
        "reference.parameters",
        "reference.quantizers",
        "sharding.shards",
    },
    "nn.regularizer": {
        "functional",
        "functional.differentiable",
        "functional.loss",
        "functional.regularizers",
        "lists",
        "nn.select",
        "nn.sharded",
        "reference.checks",
        "reference.parameters",
        "sharding.shards",
    },
    "nn.input_scales": {
        "files.integers",
        "functional.quantizers",
        "nn.scales",
        "reference.parameters",
        "sharding.shards",
    },
    "nn.starting": {
        "nn.attach",
        "nn.inputs",
        "nn.ranks",
        "nn.scales",
        "nn.synchronised",
        "nn.tracing",
        "sharding.shards",
    },
    "nn.clustering": SPECIFIED
    | {
        "files.clustered",
        "files.tables",
        "files.tiles",
        "functional.kmeans",
        "nn.layers",
        "nn.sharded",
        "sharding.shards",
    },
    "nn.palettizer": SPECIFIED
    | {
        "files.clustered",
        "files.integers",
        "files.tables",
        "functional.dkm",
        "lists",
        "nn.attach",
        "nn.clustering",
        "nn.importance",
        "ops",
        "reference.dkm",
        "sharding.shards",
    },
    "nn.importance": {"sharding.shards"},
    "nn.sensitivity": {
        "nn.batches",
        "nn.inputs",
        "nn.layers",
        "nn.ranks",
        "nn.select",
        "nn.starting",
        "reference.checks",
    },
    "nn.allocation": {"nn.clustering", "nn.importance", "nn.layers", "nn.sensitivity", "reference.checks"},
    "nn.copies": {"nn.attach", "reference.checks"},
    "nn.quantizer": {
        "nn.select",
        "files.integers",
        "nn.tracing",
        "nn.attach",
        "nn.hessian",
        "nn.inputs",
        "nn.options",
        "nn.ranks",
        "nn.restoring",
        "nn.sharded",
        "nn.starting",
        "reference.checks",
        "sharding.shards",
    },
    "nn.options": {"nn.input_scales", "nn.layers", "nn.scales", "reference.checks"},
    "nn.restoring": {
        "files.uniform",
        "nn.input_scales",
        "nn.inputs",
        "nn.layers",
        "nn.options",
        "nn.scales",
        "nn.select",
    },
    "nn.batches": {"nn.attach", "reference.checks"},
    "nn.batchnorm": {"nn.batches", "nn.ranks"},
    "nn.calibrate": {
        "nn.batches",
        "nn.clipping",
        "nn.importance",
        "nn.input_scales",
        "nn.inputs",
        "nn.layers",
        "nn.options",
        "nn.quantizer",
        "nn.ranks",
        "nn.scales",
        "reference.checks",
        "reference.columns",
        "sharding.shards",
    },
    # other people's trainers
    "integrations": {"integrations.*"},
    "integrations.modules": {"functional", "nn", "nn.attach"},
    "integrations.hugging_face": {"integrations.modules"},
    "integrations.accelerate": {"integrations.modules"},
    "integrations.lightning": {"integrations.modules", "nn"},
    # the command line
    "cli": {"cli.arguments", "cli.commands", "cli.outputs", "files.checkpoint"},
    "cli.arguments": {"", "reference.checks"},
    "cli.console": set(),
    "cli.outputs": {"files.paths"},
    "cli.commands": {"", "backends", "cli.*", "files.clustered", "files.tiles", "files.loading", "files.uniform"},
    "cli.report": {"cli.console", "files.checkpoint", "functional.regularizers", "reference.columns"},
    "cli.allocation": {"cli.shards", "files.*", "nn.allocation", "nn.clustering", "nn.importance"},
    "cli.compress": {"cli.*", "files.*", "nn.clipping", "nn.clustering"},
    "cli.parts": {"cli.report", "files.clustered", "files.uniform"},
    "cli.results": {"cli.console", "cli.report", "files.checkpoint"},
    "cli.expand": {"files.*"},
    "cli.shards": {"cli.expand", "cli.outputs", "files.*"},
    "cli.sizes": {"cli.*", "files.checkpoint", "files.clustered", "files.saving"},
    "cli.demo": {"", "backends"},
    "cli.demo_results": {"cli.console", "cli.demo", "cli.report"},
}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """The package's modules that a file imports, anywhere in it; '' is the package itself."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    modules = {module_name(p) for p in PACKAGE.rglob("*.py")}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if package else []
            base = [*base, *([node.module] if node.module else [])]
            names = [".".join([*base, alias.name]) for alias in node.names]
            found |= {name if name in modules else ".".join(base) for name in names}
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "r2kernels":
            base = node.module.split(".")[1:]
            found |= {
                name if (name := ".".join([*base, alias.name])) in modules else ".".join(base) for alias in node.names
            }
        elif isinstance(node, ast.Import):
            found |= {
                ".".join(alias.name.split(".")[1:]) for alias in node.names if alias.name.split(".")[0] == "r2kernels"
            }
    return found


def allowed_by(name):
    return LAW.get(name, LAW.get(name.rpartition(".")[0] + ".*"))


def packages(path):
    """The top names of what a file imports from outside the package and the standard library."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found - {"r2kernels"} - sys.stdlib_module_names


SOURCES = sorted(PACKAGE.rglob("*.py"))
CODE = [
    path
    for folder in ("r2kernels", "csrc", "tests", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".h", ".cuh", ".cpp", ".cu")
]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_law_of_imports(path):
    name, found = module_name(path), imported(path)
    law = allowed_by(name)
    assert law is not None, f"{name} has no entry in LAW"
    broken = {m for m in found if m not in law and m.rpartition(".")[0] + ".*" not in law}
    assert not broken, f"{name} imports {sorted(broken)}"


def test_every_entry_of_the_law_is_of_a_module():
    modules = {module_name(path) for path in SOURCES}
    folders = {name.rpartition(".")[0] + ".*" for name in modules}
    assert {*LAW} <= modules | folders


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_packages(path):
    """The reference is torch and itself; kernels, which are compiled where there is no torch, are Triton alone."""
    folder, name = path.parent.name, path.stem
    if folder == "reference":
        assert packages(path) <= {"torch"}
    elif folder == "triton" and name not in ("__init__", "launch", "range_losses", "regularizers", "quantizers", "dkm"):
        assert packages(path) <= {"triton"}


def test_the_law_sees_imports():
    """The walk itself: these are known."""
    assert imported(PACKAGE / "functional" / "loss.py") == {
        "contract",
        "functional.differentiable",
        "ops",
        "reference.checks",
        "reference.parameters",
    }
    assert imported(PACKAGE / "backends" / "native" / "kmeans.py") == {"backends.native.extension"}
    assert "functional" in imported(PACKAGE / "__init__.py")
    assert packages(PACKAGE / "algorithms" / "kmeans.py") == {"numpy", "torch"}


def test_no_two_classes_share_a_name():
    names = [
        node.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert sorted(names) == sorted({*names})


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_long_files_and_no_long_lines(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 400
    assert max(map(len, lines), default=0) <= 120
