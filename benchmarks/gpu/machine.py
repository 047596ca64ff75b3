"""What the check finds on the machine: packages, tools, and whether the extension can be built."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from .child import Case
from .processes import ROOT, Task, child

NEEDED = {"torch": "everything"}
WANTED = {
    "triton": "the Triton backend",
    "pytest": "the tests and the benchmarks",
    "pytest_timeout": "a time limit for each test (that of each file remains)",
    "pytest_benchmark": "pytest-benchmark's own report (the tables are written without it)",
    "hypothesis": "the property tests",
    "setuptools": "the build of the extension",
    "pybind11": "the build of the extension",
    "ninja": "nothing, where a ninja is on PATH",
    "matplotlib": "the figures",
    "coremltools": "its times (eager PyTorch computes its formula)",
    "sklearn": "its k-means",
}
TOOLS = {
    "nvcc": "CUDA C++ is not built",
    "compute-sanitizer": "memcheck, racecheck and synccheck are left out",
    "ncu": "the counters of the slowest kernels are left out",
}


def is_there(package):
    with contextlib.suppress(ImportError, ValueError):
        return importlib.util.find_spec(package) is not None
    return False


def absent():
    return {package: use for package, use in {**NEEDED, **WANTED}.items() if not is_there(package)}


def tool(name):
    """Its path, or None: on PATH, in CUDA's folders, in NVIDIA's wheels."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [shutil.which(name), *(Path(place) / "bin" / name for place in places if place)]
    found += [*Path("/usr/local").glob(f"cuda*/bin/{name}"), *Path("/opt/nvidia").glob(f"**/{name}")]
    found += (Path(sysconfig.get_paths()["purelib"]) / "nvidia").glob(f"**/{name}")
    return next((str(path) for path in found if path and os.access(path, os.X_OK) and Path(path).is_file()), None)


def architecture():
    """The number that nvcc is told, of the card that is there, or of an H100."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "-i", "0"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
        if shown.replace(".", "").isdigit():
            return shown.replace(".", "")
    return "90"


def build(cuda, nvcc=None):
    """The extension, in place; with `cuda` it is an error where CUDA C++ cannot be built."""
    environment = {"R2KERNELS_CUDA": "1" if cuda else "0", "R2KERNELS_CUDA_ARCH": architecture()}
    if nvcc and "CUDA_HOME" not in os.environ:  # setup.py does not look into NVIDIA's wheels
        environment["CUDA_HOME"] = str(Path(nvcc).resolve().parents[1])
    name = f"build for sm_{environment['R2KERNELS_CUDA_ARCH']}" if cuda else "build for the CPU alone"
    return Task(name, [sys.executable, "setup.py", "build_ext", "--inplace"], 300, environment=environment)


def batches(plan, done):
    """The build, and what then is there. Without CUDA C++ the rest still needs the part for the CPU."""
    if plan.device == "cuda":
        yield [build(cuda=True, nvcc=plan.tools.get("nvcc"))]
        if done[-1]["state"] != "passed" and not list((ROOT / "r2kernels").glob("_C*.so")):
            yield [build(cuda=False)]
    yield [child("machine", "versions", plan, 120)]


def cases(item, device, backend):
    """One, whose row is the header of all results."""

    def versions():
        import report

        header = report.header(device)
        if device == "cuda":
            import torch

            properties = torch.cuda.get_device_properties(0)
            header["machine"].update(
                capability=f"{properties.major}.{properties.minor}",
                multiprocessors=properties.multi_processor_count,
                memory=properties.total_memory,
            )
        return {"header": {k: v for k, v in header.items() if k != "rows"}}

    yield Case("versions", versions, 100)
