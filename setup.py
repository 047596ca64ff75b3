"""One extension, one ninja build: C++ for the CPU, and CUDA where nvcc is found. Without a C++ compiler nothing is
built and the package runs on eager PyTorch.

R2KERNELS_CUDA = auto (default), 0, 1 (fail without nvcc); R2KERNELS_CUDA_ARCH = all-major (default), or numbers such as
"90", "80;90" or "90a".
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = {"portable": ""} | (
    {
        "avx2": "-mavx2 -mfma -mf16c",
        # -Wno-maybe-uninitialized: GCC 12 warns of its own header
        "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512 "
        "-Wno-maybe-uninitialized",
    }
    if X86
    else {}
)
# Fused multiply-adds are part of the formulas' accuracy; no other liberty is taken with floating point.
CXXFLAGS = (
    "-std=c++17 -O3 -g0 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp "
    "-Wall -Wextra"
)


def find_nvcc():
    """The nvcc to use, or None; raises where one was asked for and none is there."""
    choice = os.environ.get("R2KERNELS_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"R2KERNELS_CUDA={choice!r} is not one of auto, 0, 1")
    if choice == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [Path(home) / "bin/nvcc" for home in homes if home] + [
        Path(path).resolve() for path in [shutil.which("nvcc")] if path
    ]
    for nvcc in found:
        if nvcc.exists() and cudart(nvcc):
            return nvcc
    if choice == "1":
        raise SystemExit(
            "R2KERNELS_CUDA=1, but no nvcc with a static cudart was found in CUDA_HOME, CUDA_PATH, "
            "/usr/local/cuda or PATH"
        )
    return None


def cudart(nvcc):
    """The folder of the static CUDA runtime that belongs to this nvcc, or None."""
    root = nvcc.resolve().parent.parent
    folders = [root / f"targets/{platform.machine()}-linux/lib", root / "lib64", root / "lib"]
    return next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)


def architecture_flags():
    """What nvcc is told to compile for."""
    choice = os.environ.get("R2KERNELS_CUDA_ARCH", "all-major")
    if choice == "all-major":
        return "-arch=all-major"
    numbers = choice.replace(",", ";").split(";")
    if not all(re.fullmatch(r"[1-9]\d+[af]?", number) for number in numbers):
        raise SystemExit(f"R2KERNELS_CUDA_ARCH={choice!r} is neither all-major nor numbers such as 90, 80;90 or 90a")
    flags = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    # PTX for GPUs to come; of a number with a suffix it would serve no other
    plain = sorted((n for n in numbers if n.isdigit()), key=int)
    flags += [f"-gencode=arch=compute_{n},code=compute_{n}" for n in plain[-1:]]
    return " ".join([*flags, rf"-DR2_ARCHITECTURES=\"{'/'.join(numbers)}\""])


def escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    def build_extension(self, ext):
        cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if not cxx or not shutil.which(cxx.split()[0]):
            print(
                "r2kernels: no C++ compiler found; the package will run on eager PyTorch and Triton alone",
                file=sys.stderr,
            )
            return
        folder, target = Path(self.build_temp).resolve() / "r2kernels", Path(self.get_ext_fullpath(ext.name)).resolve()
        for path in (folder, target.parent):
            path.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.plan(cxx, find_nvcc(), folder, target))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.check_call([self.ninja(), "-C", str(folder), *jobs])

    @staticmethod
    def ninja():
        try:
            import ninja

            return str(Path(ninja.BIN_DIR) / "ninja")
        except ImportError:
            return shutil.which("ninja") or "ninja"

    @staticmethod
    def plan(cxx, nvcc, folder, target):
        import pybind11

        # -isystem would leave our own headers out of the dependency files, so only foreign ones get it
        include = " ".join(
            f"-isystem {escape(path)}" for path in (pybind11.get_include(), sysconfig.get_path("include"))
        )
        version = subprocess.run(
            [*cxx.split(), "-dumpfullversion", "-dumpversion"], capture_output=True, text=True
        ).stdout.strip()
        defines = f'-DR2_COMPILER=\\"{version}\\"' + (" -DR2_WITH_CUDA" if nvcc else "")
        lines = [
            "ninja_required_version = 1.5",
            f"cxx = {cxx}",
            f"cxxflags = {CXXFLAGS} {os.environ.get('CXXFLAGS', '')}",
            "rule cxx",
            "  command = $cxx -MMD -MF $out.d $cxxflags $extra -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cxx -shared -fopenmp -Wl,--exclude-libs,ALL -Wl,--as-needed $in -o $out $libs",
        ]
        objects, libraries = [], ""

        def compile_one(rule, source, name, extra):
            objects.append(escape(folder / f"{name}.o"))
            lines.extend([f"build {objects[-1]}: {rule} {escape(source)}", f"  extra = {extra}"])

        if nvcc:
            libraries = f"-L{escape(cudart(nvcc))} -lcudart_static -lrt -lpthread -ldl"
            lines += [
                f"nvcc = {escape(nvcc)}",
                "rule nvcc",
                "  command = $nvcc -MD -MF $out.d $extra -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
            extra = (
                f"-std=c++17 -O3 {architecture_flags()} -cudart static -Xfatbin=-compress-all "
                "-Xcompiler -fPIC,-fvisibility=hidden,-Wall"
            )
            for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
                compile_one("nvcc", source, f"cuda_{source.stem}", extra)
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            for isa, flags in INSTRUCTION_SETS.items():
                compile_one("cxx", source, f"cpu_{source.stem}_{isa}", f"{flags} -DR2_ISA={isa}")
        for source in sorted((ROOT / "csrc").glob("bindings*.cpp")):
            compile_one("cxx", source, source.stem, f"{include} {defines}")
        lines += [
            f"build {escape(target)}: link {' '.join(objects)}",
            f"  libs = {libraries}",
            f"default {escape(target)}",
            "",
        ]
        return "\n".join(lines)


sources = [
    str(path.relative_to(ROOT))
    for pattern in ("*.cpp", "cpu/*.cpp", "cuda/*.cu")
    for path in sorted((ROOT / "csrc").glob(pattern))
]
setup(ext_modules=[Extension("r2kernels._C", sources)], cmdclass={"build_ext": NinjaBuild})
