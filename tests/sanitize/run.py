"""`make sanitize`: the extension for the CPU with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the
package of its own; every op and the tests of files run on it. Ends at the first report.

LeakSanitizer is off: Python keeps what it has until it ends. ThreadSanitizer is not run: it does not see the barriers
of GCC's libgomp, and reports every parallel loop."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "build" / "sanitize"
LIBRARY = HOME / "lib"
SANITIZERS = "-fsanitize=address,undefined"
CXX = os.environ.get("CXX", "g++")
# reads behind the end of its input
CANARY = """
import torch
from r2kernels.backends import native
native.load("cpu")
packed, codes = torch.zeros(2**12, dtype=torch.uint8), torch.empty(2**16, dtype=torch.uint8)
native.on_codes("unpack", packed, (2**16, 2**16, 8), codes)
"""
NEEDS_COREMLTOOLS = ("test_coreml.py", "test_coremltools.py")
FILES = sorted(str(p) for p in (ROOT / "tests/files").glob("test_*.py") if p.name not in NEEDS_COREMLTOOLS)
FILES += [str(ROOT / "tests/kmeans" / name) for name in ("test_lists.py", "test_rows.py")]


def library(name):
    """Where the compiler has it."""
    return subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()


def build():
    flags = f"-O1 -g1 -fno-omit-frame-pointer {SANITIZERS} -fno-sanitize-recover=all"
    environment = {"CXX": f"{CXX} {SANITIZERS}", "CXXFLAGS": flags, "R2KERNELS_CUDA": "0"}
    folders = ["--build-base", HOME, "--build-temp", HOME / "objects", "--build-lib", LIBRARY]
    command = [sys.executable, "setup.py", "-q", "build", *folders]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, check=True)


def python(*arguments, **options):
    environment = {
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",  # the latter before its exceptions are met
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": f"{LIBRARY}:{ROOT / 'tests'}",
    }
    return subprocess.run([sys.executable, *arguments], cwd=LIBRARY, env={**os.environ, **environment}, **options)


def canary():
    done = python("-c", CANARY, capture_output=True, text=True)
    if "AddressSanitizer: heap-buffer-overflow" not in done.stderr:
        sys.exit(f"the sanitizers see nothing: {done.stderr[-2000:]}")


def ops():
    python(ROOT / "tests/sanitize/ops.py", check=True)


def files():
    python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *FILES, check=True)


PARTS = {
    build: f"the extension with {SANITIZERS}",
    canary: "a read that is wrong is reported",
    ops: "every op, dtype and instruction set, with its gradient, against the reference",
    files: f"{len(FILES)} files of tests of files and k-means",
}


def main():
    for part, title in PARTS.items():
        start = time.perf_counter()
        try:
            part()
        except subprocess.CalledProcessError as error:
            sys.exit(f"make sanitize: {part.__name__} failed ({error.returncode}): {title}")
        print(f"{part.__name__}: {title}: {time.perf_counter() - start:.0f} s", flush=True)
    print("ThreadSanitizer: not run, for it does not see the barriers of GCC's libgomp and reports every parallel loop")


if __name__ == "__main__":
    main()
