"""What importing does, in processes of their own."""

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
    """Neither Triton nor what draws pictures and tables, a trainer or the extension is loaded before it is used."""
    found = run("""
        import r2kernels
        ours = ("r2kernels._C", "r2kernels.backends.native")
        torchs = ("torch._dynamo", "torch._inductor")
        trainers = ("transformers", "accelerate", "lightning", "pytorch_lightning")
        for name in ("triton", "matplotlib", "rich", "safetensors", "sklearn", *ours, *torchs, *trainers):
            print(name, name in sys.modules)
    """)
    assert "True" not in found and found.count("False") == 13


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
