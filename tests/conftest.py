"""Options and fixtures.

This folder is on the path (pyproject.toml): `cases` and `budget` can be imported, and `dkm.problems` in its folder.

    pytest                              the CPU: the extension with every instruction set, the reference, Triton in its
                                        interpreter
    pytest --device cuda                the same tests on CUDA tensors: Triton, the extension, the reference
    pytest --backend NAME               these backends alone (may be repeated); an error where one is not usable
    pytest --backend emulated           the CUDA kernels on the host, in both orders of blocks and threads

The interpreter must be on before triton is imported, for the whole process: `test_triton_interpreter.py` starts a
pytest with TRITON_INTERPRET=1 and `--backend triton`.
"""

import contextlib
import functools
import importlib
import os
from typing import NamedTuple

import pytest
import ranks
import torch
from emulate import emulated

from r2kernels import backends, use_backend

_SERVES = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=tuple(_SERVES), help="where the tensors of the tests lie")
    parser.addoption(
        "--backend",
        action="append",
        choices=("triton", "cuda", "cpu", "reference", "emulated"),
        help="test these instead of all that are usable",
    )


class Variant(NamedTuple):
    """A backend, and for the extension on the CPU an instruction set."""

    backend: str
    isa: str | None = None

    def __str__(self):
        return self.backend if self.isa is None else f"{self.backend}-{self.isa}"

    @contextlib.contextmanager
    def chosen(self):
        with use_backend(self.backend), _isa(self.isa):
            yield self


@contextlib.contextmanager
def _isa(name):
    if name is None:
        yield
        return
    cpu = importlib.import_module("r2kernels._C").cpu
    before = cpu.isa()
    cpu.set_isa(name)
    try:
        yield
    finally:
        cpu.set_isa(before)


def _of_backend(name):
    if name == "emulated":
        return emulated.ORDERS
    isas = importlib.import_module("r2kernels._C").cpu.isas() if name == "cpu" else [None]
    return [Variant(name, isa) for isa in isas]


def _variants(config):
    """All that are to be tested; found when the first test asks for them."""
    if not hasattr(config, "variants"):
        reasons, asked = {**backends(), "emulated": emulated.why_not()}, config.getoption("--backend")
        for name in asked or ():
            if reasons[name] is not None:
                raise pytest.UsageError(f"--backend {name}: {reasons[name]}")
        names = asked or [name for name in _SERVES[config.getoption("--device")] if reasons[name] is None]
        config.variants = [variant for name in names for variant in _of_backend(name)]
    return config.variants


def _convert_as_a_gpu_does():
    """Triton's interpreter cuts float32 off to bfloat16, where a GPU rounds to nearest, ties to even, as is the
    default; and misreads the subnormal numbers of bfloat16."""
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_fp_trunc
    plain_ext = interpreter.InterpreterBuilder.create_fp_ext

    def create_fp_trunc(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            bits = torch.from_numpy(src.data.copy()).to(torch.bfloat16).view(torch.int16).numpy()
            return interpreter.TensorHandle(bits.view("uint16"), dst_type.scalar)
        return plain(self, src, dst_type)

    def create_fp_ext(self, src, dst_type):
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            bits = torch.from_numpy(src.data.astype("int16")).view(torch.bfloat16)
            return interpreter.TensorHandle(bits.float().numpy(), dst_type.scalar)
        return plain_ext(self, src, dst_type)

    interpreter.InterpreterBuilder.create_fp_trunc = create_fp_trunc
    interpreter.InterpreterBuilder.create_fp_ext = create_fp_ext


def pytest_configure(config):
    config.addinivalue_line("markers", "exhaustive: a table too long for Triton's interpreter")
    if os.environ.get("TRITON_INTERPRET") == "1":
        _convert_as_a_gpu_does()
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device")


def pytest_generate_tests(metafunc):
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", _variants(metafunc.config), ids=str, indirect=True)


def pytest_collection_finish(session):
    """The tests in the interpreter run beside the others from now on."""
    found = [item.module for item in session.items if item.path.name == "test_triton_interpreter.py"]
    if found and found[0].wanted(session.config) and not session.config.getoption("collectonly"):
        session.config.interpreter = found[0].run()


def pytest_unconfigure(config):
    if hasattr(config, "interpreter"):
        config.interpreter.stop()


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture
def variant(request):
    """The test runs once with each backend and instruction set chosen."""
    with request.param.chosen():
        yield request.param


@pytest.fixture(scope="session")
def variants(request):
    """All backends and instruction sets under test, but the reference."""
    found = [v for v in _variants(request.config) if v.backend != "reference"]
    return found or pytest.skip("no backend but the reference is usable here")


@pytest.fixture(scope="session")
def plain():
    return Variant("reference")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """(script, number of ranks) -> what the checks of the script left on every rank (ranks.py), of one launch."""
    return functools.cache(lambda script, world: ranks.run(world, script, tmp_path_factory.mktemp("ranks")))


@pytest.fixture
def one_thread():
    """For many small calls. Results do not depend on it, which test_losses.py checks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def nan_filled():
    """torch.empty gives NaN, so that a number that no kernel wrote is seen."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
