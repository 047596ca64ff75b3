"""`python tests/emulate/build.py`: the extension with the CUDA kernels on the host, in build/emulate; objects are kept.

The sources are the repository's own, translated line by line (translate.py) and compiled against shim/."""

import concurrent.futures
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from emulate.translate import translated

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HOME = ROOT / "build" / "emulate"
SOURCES = HOME / "csrc"
CXX = os.environ.get("CXX") or shutil.which("g++")
# nvcc fuses multiply-adds too; the alignment of every access and the indices of arrays are checked
FLAGS = (
    "-std=c++17 -O1 -g0 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math "
    "-fno-strict-aliasing -w"
)
SHIM = f"-I{HERE / 'shim'}"
DEVICE = f"{FLAGS} -march=native -fsanitize=alignment,bounds {SHIM} -include cuda_runtime.h"
INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.M)


def why_not():
    """Why the kernels cannot be built here, or None."""
    if not CXX:
        return "no g++"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11"
    return None


def translate(path, name):
    """A source, into build/emulate; one that is as it was keeps its time."""
    made = f'#line 1 "{name}"\n{translated(path.read_text())}'
    target = HOME / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists() or target.read_text() != made:
        target.write_text(made)
    return target


def closure(path, found=None):
    """The file and all that it includes of ours."""
    found = {} if found is None else found
    if path not in found:
        found[path] = path.read_text()
        for name in INCLUDE.findall(found[path]):
            for folder in (path.parent, HERE / "shim", SOURCES):
                if (folder / name).exists():
                    closure((folder / name).resolve(), found)
                    break
    return found


def compile_one(source, flags):
    """The object of a source, from before where nothing has changed."""
    files = closure(source.resolve())
    shim = "".join(p.read_text() for p in sorted((HERE / "shim").glob("*.h")))
    key = hashlib.sha256("\0".join([CXX, flags, shim, *files.values()]).encode()).hexdigest()[:16]
    target = HOME / "objects" / f"{source.stem}-{key}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*CXX.split(), *flags.split(), "-x", "c++", "-c", str(source), "-o", str(part)], check=True)
        part.rename(target)
    return target


def linked(name, sources):
    """The path of a shared library of these (source, flags) and of what runs kernels."""
    jobs = [*sources, (HERE / "shim/emulation.cpp", f"{FLAGS} {SHIM}")]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: compile_one(*job), jobs))
    key = hashlib.sha256("\0".join(o.name for o in objects).encode()).hexdigest()[:16]
    target = HOME / key / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*CXX.split(), "-shared", *map(str, objects), "-o", str(part)], check=True)
        part.rename(target)
    return target


def extension():
    """The path of the module `_C`."""
    import pybind11

    found = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]
    sources = [
        translate(path, path.relative_to(ROOT))
        for path in found
        if path.parent.name != "cpu" or path.name == "kernels.h"
    ]
    plain = f"{FLAGS} {SHIM} -I{SOURCES}"
    # types of its own: r2kernels._C, in the same process, has those of the same names
    binding = (
        f"{plain} -I{pybind11.get_include()} -I{sysconfig.get_path('include')} -DR2_WITH_CUDA "
        '-DR2_COMPILER="emulated" -DPYBIND11_BUILD_ABI="_emulated"'
    )
    kernels = [(path, DEVICE) for path in sources if path.suffix == ".cu"]
    beside = [*((source, binding) for source in sorted(SOURCES.glob("bindings*.cpp"))), (HERE / "absent.cpp", plain)]
    return linked(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", [*kernels, *beside])


if __name__ == "__main__":
    start = time.perf_counter()
    print(f"{extension()} in {time.perf_counter() - start:.0f} s")
