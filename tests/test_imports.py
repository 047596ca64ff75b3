"""What importing does, in processes of their own; and the law of imports."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import r2kernels

PACKAGE = Path(r2kernels.__file__).parent
ROOT = PACKAGE.parent

# `blocked` names and packages are not found afterwards
BLOCK = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: (
        None if {name, name.split(".")[0]} & blocked else find(name, path, target)
    )
)
"""


def run(code, *, blocked=(), **environment):
    """stdout of a fresh interpreter; its warnings are printed there too."""
    program = (
        f"blocked = {set(blocked)!r}\n"
        + BLOCK
        + "import warnings; warnings.simplefilter('always')\n"
        + textwrap.dedent(code)
    )
    inherited = {k: v for k, v in os.environ.items() if k not in ("R2KERNELS_BACKEND", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**inherited, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_import_is_light():
    """Neither Triton nor what draws pictures and tables, nor the extension, is loaded before it is used."""
    found = run("""
        import r2kernels
        ours = ("r2kernels._C", "r2kernels.backends.native")
        torchs = ("torch._dynamo", "torch._inductor")
        for name in ("triton", "matplotlib", "rich", "safetensors", "sklearn", *ours, *torchs):
            print(name, name in sys.modules)
    """)
    assert "True" not in found and found.count("False") == 9


@pytest.mark.parametrize("blocked", [("triton",), ("rich", "matplotlib", "safetensors", "sklearn")], ids=str)
def test_optional_packages_are_optional(blocked):
    found = run(
        """
        import torch, r2kernels
        w = torch.randn(5, 5, requires_grad=True)
        r2kernels.soft_min_max([w, w], 0.5).sum().backward()
        r2kernels.RangeRegularizer(torch.nn.Linear(3, 3)).accumulate_grad_()
        print(w.grad.shape, r2kernels.backends()["triton"])
    """,
        blocked=blocked,
    )
    assert "[5, 5]" in found and ("triton" not in blocked or "triton is not installed" in found)


def test_without_the_extension_everything_works_and_one_warning_says_so():
    found = run(
        """
        import torch, r2kernels
        for _ in range(3):
            w = torch.randn(5, 5, requires_grad=True)
            r2kernels.soft_min_max([w, w], 0.5).sum().backward()
            r2kernels.weight_stats(w)
        print("reason:", r2kernels.backends()["cpu"])
    """,
        blocked=("r2kernels._C",),
    )
    assert found.count("RuntimeWarning: r2kernels: backend 'cpu' is not usable") == 1
    assert "reason: the extension was not built" in found


def test_without_the_extension_an_explicit_choice_raises():
    for code, environment in (
        ("with r2kernels.use_backend('cpu'):\n    call()", {}),
        ("call()", {"R2KERNELS_BACKEND": "cpu"}),
    ):
        found = run(
            "import torch, r2kernels\n"
            + textwrap.dedent("""
            def call():
                try:
                    r2kernels.l_inf(torch.ones(3))
                except RuntimeError as error:
                    print(error)
        """)
            + code,
            blocked=("r2kernels._C",),
            **environment,
        )
        assert "backend 'cpu' was chosen explicitly but cannot be used: the extension was not built" in found


def test_a_broken_extension_is_named():
    """One that is there and cannot be loaded: the loader's own words are the reason."""
    found = run("""
        class Broken:
            def find_spec(self, name, path=None, target=None):
                if name == "r2kernels._C":
                    raise ImportError("libgomp.so.1: cannot open shared object file")
        sys.meta_path.insert(0, Broken())
        import torch, r2kernels
        r2kernels.l_inf(torch.ones(3))
    """)
    assert "backend 'cpu' is not usable (libgomp.so.1: cannot open shared object file)" in found


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_environment_variable(backend):
    if r2kernels.backends()[backend] is not None:
        pytest.skip(r2kernels.backends()[backend])
    found = run(
        """
        import torch, r2kernels
        r2kernels.l_inf(torch.ones(3))
        print("r2kernels._C" in sys.modules)
    """,
        R2KERNELS_BACKEND=backend,
    )
    assert str(backend == "cpu") in found


@pytest.mark.parametrize(
    "order",
    [
        "import torch, r2kernels",
        "import r2kernels, torch",
        "from r2kernels.backends import native; import torch, r2kernels",
    ],
)
def test_the_extension_and_torch_share_one_openmp(order):
    """torch is imported first, whatever the order of the user's imports, so that its libgomp serves both."""
    if r2kernels.backends()["cpu"] is not None or not sys.platform.startswith("linux"):
        pytest.skip(r2kernels.backends()["cpu"] or "reads /proc")
    found = run(
        order
        + """
w = torch.randn(300, 300, requires_grad=True)
r2kernels.l_inf(w).backward()
print(len({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}), "copies")
"""
    )
    assert "1 copies" in found


@pytest.mark.parametrize("grad", [True, False])
def test_first_call_of_a_process_inside_compile(grad):
    """Nothing that happens once, at the first call, breaks the graph."""
    found = run(f"""
        import torch, r2kernels
        def total(ws):
            return r2kernels.soft_min_max(ws, 0.5).sum() + r2kernels.margin(ws, 0.1, k=3).sum()
        step = torch.compile(total, fullgraph=True, backend="aot_eager")
        ws = [torch.linspace(-1, 1, 7, requires_grad={grad}), torch.linspace(0, 1, 5, requires_grad={grad})]
        loss = step(ws)
        if {grad}:
            loss.backward()
        print(torch.equal(loss, total(ws)))
    """)
    assert "True" in found


# what a call may be given
SPECIFIED = {"reference.checks", "reference.columns", "reference.parameters", "reference.zeros"}
# module -> the modules of the package that it may import; `x.*` are those of a folder. All else is forbidden.
LAW = {
    "": {"backends", "files.*", "functional", "functional.*", "nn", "nn.*", "reference", "version"},
    "__main__": {"cli"},
    "version": set(),
    # the specification: torch and itself
    "reference": {"reference.*"},
    "reference.columns": set(),
    "reference.zeros": {"reference.columns"},
    "reference.checks": {"reference.columns"},
    "reference.parameters": {"reference.checks", "reference.columns"},
    "reference.range_losses": SPECIFIED,
    "reference.regularizers": SPECIFIED | {"reference.quantizers", "reference.range_losses"},
    "reference.quantizers": SPECIFIED,
    "reference.dkm": SPECIFIED,
    "reference.kmeans": SPECIFIED,
    # the contract, and how a list becomes one launch
    "contract": SPECIFIED,
    "lists": {"contract"},
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
    "ops": {"algorithms.fixed_point", "algorithms.iterations", "backends", "contract", "lists", "reference"},
    # what a user calls
    "functional": {"functional.*"},
    "functional.loss": {"contract", "lists", "ops", "reference.checks", "reference.parameters"},
    "functional.range_losses": {"functional.loss", "ops", "reference.checks", "reference.parameters"},
    "functional.regularizers": {
        "contract",
        "functional.loss",
        "lists",
        "ops",
        "reference.checks",
        "reference.parameters",
        "reference.regularizers",
    },
    "functional.quantizers": {"lists", "ops", "reference.checks", "reference.parameters"},
    "functional.dkm": SPECIFIED | {"lists", "ops"},
    "functional.kmeans": SPECIFIED | {"algorithms.kmeans", "backends", "backends.native", "ops"},
    # files
    "files": set(),
    "files.packing": {"backends", "backends.native"},
    "files.huffman": {"files.packing"},
    "files.clustered": {"files.packing", "functional.dkm", "reference.checks", "reference.columns"},
    "files.uniform": {"files.clustered", "files.packing", "reference.columns"},
    "files.integers": {"files.uniform", "reference.columns"},
    "files.checkpoint": {"reference.checks"},
    "files.container": {"files.checkpoint"},
    "files.format": {"files.clustered", "files.container", "files.huffman", "files.integers", "files.uniform"},
    "files.saving": {"files.checkpoint", "files.clustered", "files.container", "files.format", "files.huffman"},
    "files.loading": {"files.checkpoint", "files.container", "files.format", "files.huffman", "reference.checks"},
    "files.coreml": {"files.clustered"},
    "files.onnx": {"files.clustered", "files.integers", "files.uniform"},
    # modules
    "nn": {"nn.*"},
    "nn.places": set(),
    "nn.select": {"nn.places"},
    "nn.layers": {"nn.places", "nn.select"},
    "nn.ranks": set(),
    "nn.tracing": set(),
    "nn.attach": {"nn.tracing"},
    "nn.export": {"files.onnx", "nn.attach", "nn.inputs", "nn.quantizer", "nn.tracing"},
    "nn.hessian": {"nn.attach"},
    "nn.inputs": {"nn.select"},
    "nn.coefficient": {"reference.checks"},
    "nn.groups": {"functional.quantizers", "reference.columns", "reference.parameters"},
    "nn.clipping": {"files.uniform", "nn.groups", "reference.columns", "reference.parameters", "reference.quantizers"},
    "nn.scales": {"files.uniform", "functional.quantizers", "nn.clipping", "reference.columns", "reference.parameters"},
    "nn.regularizer": {
        "functional",
        "functional.loss",
        "lists",
        "nn.select",
        "reference.checks",
        "reference.parameters",
    },
    "nn.input_scales": {"files.integers", "functional.quantizers", "nn.scales", "reference.parameters"},
    "nn.starting": {"nn.attach", "nn.inputs", "nn.ranks", "nn.scales", "nn.tracing"},
    "nn.clustering": SPECIFIED | {"files.clustered", "functional.dkm", "functional.kmeans"},
    "nn.palettizer": SPECIFIED
    | {"files.clustered", "files.integers", "functional.dkm", "nn.attach", "nn.clustering", "nn.layers"},
    "nn.copies": {"nn.attach", "reference.checks"},
    "nn.quantizer": {
        "files.integers",
        "nn.attach",
        "nn.hessian",
        "nn.inputs",
        "nn.options",
        "nn.ranks",
        "nn.restoring",
        "nn.starting",
        "nn.tracing",
        "reference.checks",
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
        "nn.input_scales",
        "nn.inputs",
        "nn.layers",
        "nn.options",
        "nn.quantizer",
        "nn.ranks",
        "nn.scales",
        "reference.checks",
        "reference.columns",
    },
    # the command line
    "cli": {"cli.arguments", "cli.commands", "cli.outputs", "files.checkpoint"},
    "cli.arguments": {"", "reference.checks"},
    "cli.console": set(),
    "cli.outputs": set(),
    "cli.commands": {"", "backends", "cli.*", "files.clustered", "files.loading", "files.uniform"},
    "cli.report": {"cli.console", "files.checkpoint", "functional.regularizers", "reference.columns"},
    "cli.compress": {"cli.console", "cli.report", "files.*", "nn.clipping", "nn.clustering"},
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
        "lists",
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
