"""The law of imports, and how long files and lines may be."""

import ast
import sys
from pathlib import Path

import pytest
from law import LAW

import r2kernels

PACKAGE = Path(r2kernels.__file__).parent
ROOT = PACKAGE.parent


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
    assert imported(PACKAGE / "files" / "folders.py") == {"files.checkpoint", "files.paths"}
    assert imported(PACKAGE / "backends" / "native" / "kmeans.py") == {"backends.native.extension", "contract"}
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
