"""Which GPUs a build can run on, by the architectures that it was compiled for (csrc/cuda/device.cu). Needs nvcc, but
no GPU."""

import subprocess

import pytest
import sass

PROGRAM = """
#include <cstdio>
#include "cuda/device.cu"

int main() {
  for (int device : {75, 80, 86, 90, 100, 103, 120}) printf("%d ", r2::cuda::can_run(device));
  printf("%s", r2::cuda::architectures().c_str());
}
"""


@pytest.mark.parametrize(
    "given, found",
    [
        ("90a", "0 0 0 1 0 0 0 9.0a"),
        ("80/100f/120", "0 1 1 0 1 1 1 8.0, 10.0f, 12.0"),
        (None, "0 0 0 1 1 1 1 9.0"),  # nvcc's own list
    ],
)
def test_who_can_run(given, found, tmp_path):
    nvcc = sass.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc was found")
    source, program = tmp_path / "program.cu", tmp_path / "program"
    source.write_text(PROGRAM)
    define = [] if given is None else [f'-DR2_ARCHITECTURES="{given}"']
    subprocess.run(
        [nvcc, "-std=c++17", "-arch=sm_90", "-I", sass.SOURCES.parent, *define, "-o", program, source], check=True
    )
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout == found
