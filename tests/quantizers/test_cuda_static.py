"""The quantizers' CUDA kernels as compiled for sm_90: no spills, 128-bit accesses, few instructions for each number;
and, in a program for the host, the division that they do without dividing. Needs nvcc, but no GPU.

At full bandwidth an H200 has time for 60 instructions per float32 number that it reads and writes, 30 per 16-bit one;
half more with a second array to read.
"""

import re
import subprocess

import pytest
import sass
from sass import TYPES

IN_FLIGHT = 4  # 128-bit loads of each array at a time

# instructions per number of a full tile: float32, 16 bit
FORWARD = {
    "Lsq<whole>": (14.5, 16),
    "Lsq<half>": (16.5, 18),
    "Lsq<sign>": (14.5, 16),
    "Rescale": (3, 6),
    "Ewgs": (18.5, 20),
    "Pact<false>": (15.5, 17),
    "Dorefa": (32, 33.5),
    "DorefaSign": (7.5, 9),
    "Copy": (1, 3),
}
BACKWARD = {
    "Lsq<whole>": (19, 22),
    "Lsq<half>": (21, 24),
    "Lsq<sign>": (20, 23),
    "Rescale": (8, 12),
    "Ewgs": (26.5, 30),
    "Pact<false>": (7, 10),
    "Pact<true>": (19, 22),
    "Dorefa": (31.5, 34),
}


@pytest.fixture(scope="module")
def kernels():
    return sass.compiled("quantizers.cu")


def find(kernels, kind, op, dtype):
    op, _, flag = op.rstrip(">").partition("<")
    codes = {name: rf"IL\w*4CodeE{i}EE" for i, name in enumerate(("whole", "half", "sign"))}  # of csrc/quantizers.h
    argument = {"": "", "false": "ILb0EE", "true": "ILb1EE", **codes}[flag]
    pattern = rf"{kind}IN.*\d{op}{argument}E{TYPES[dtype][0]}EEv"
    found = [kernel for mangled, kernel in kernels.items() if re.search(pattern, mangled)]
    assert len(found) == 1, pattern
    return found[0]


def test_nothing_spills(kernels):
    assert len(kernels) > 60
    assert [k.name for k in kernels.values() if k.spills or k.stack] == []


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op", FORWARD)
def test_forward(kernels, op, dtype):
    kernel, size = find(kernels, "quantize_kernel", op, dtype), TYPES[dtype][1]
    loop = kernel.main_loop()
    assert kernel.count("LDG", "128", loop) == kernel.count("LDG", path=loop) == IN_FLIGHT
    assert kernel.count("STG", "128", loop) == kernel.count("STG", path=loop) == IN_FLIGHT
    assert kernel.per_weight(size) <= FORWARD[op][size == 2]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op", BACKWARD)
def test_backward(kernels, op, dtype):
    """x and its gradient are read once, and the sums stay in registers."""
    kernel, size = find(kernels, "gradient_kernel", op, dtype), TYPES[dtype][1]
    loop = kernel.main_loop()
    assert kernel.count("LDG", "128", loop) == kernel.count("LDG", path=loop) == 2 * IN_FLIGHT
    assert kernel.count("STG", "128", loop) == kernel.count("STG", path=loop) == IN_FLIGHT
    assert kernel.count("LDS", path=loop) == kernel.count("STS", path=loop) == kernel.count("ATOM", path=loop) == 0
    assert kernel.per_weight(size, 2) <= BACKWARD[op][size == 2]


PROGRAM = r"""
#include <cstdio>
#include <cstring>
#include "quantizers.h"
using namespace r2;

static uint64_t state = 88172645463325252ull;
static uint32_t random_bits() {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return uint32_t(state >> 16);
}
static float number_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static bool differ(float a, float b) { return memcmp(&a, &b, 4) != 0 && !(a != a && b != b); }

int main() {
  long quotients = 0, codes = 0, whole = 0;
  for (int k = 0; k < 4000; ++k) {
    const uint32_t mantissa = k < 64 ? (k % 2 ? 0x7fffff - k / 2 : k / 2) : random_bits() & 0x7fffff;
    const float by = number_of(mantissa | uint32_t(k % 4 ? 127 : 127 - 60 + random_bits() % 120) << 23);
    const FastDivisor fast(by);
    for (int i = 0; i < 2000; ++i) {
      const float v = (int(random_bits() % 2001) - 1000) * 0.5f;
      const float x = number_of((random_bits() & 0x807fffffu) | (random_bits() % 24 + 112) << 23) * by;
      if (fabsf(x / by) <= FastDivisor::kMost) quotients += differ(fast(x), x / by);
      quotients += differ(fast(v * by), v * by / by);
      if (v != 0)
        for (float y : {nextafterf(v * by, INFINITY), nextafterf(v * by, -INFINITY)})
          quotients += differ(fast(y), y / by);
      const float any = number_of(random_bits());
      codes += differ(rint_(clamp_(fast(any), -128.0f, 127.0f)), rint_(clamp_(any / by, -128.0f, 127.0f)));
    }
    for (float x : {0.0f, -0.0f, INFINITY, -INFINITY, float(NAN), 3e38f, -3e38f, 1e-45f, -1e-45f})
      codes += differ(rint_(clamp_(fast(x), -128.0f, 255.0f)), rint_(clamp_(x / by, -128.0f, 255.0f)));
  }
  for (int n = 1; n < 256; ++n)
    for (int c = -255; c < 256; ++c) whole += FastDivisor(float(n)).whole(float(c)) != float(c) / float(n);
  printf("%ld %ld %ld\n", quotients, codes, whole);
}
"""


def test_fast_division_is_division(kernels, tmp_path):
    """Quotients, codes and levels, to the bit."""
    source, program = tmp_path / "division.cu", tmp_path / "division"
    source.write_text(PROGRAM)
    flags = ["-std=c++17", "-O2", "-arch=sm_90", "-Xcompiler", "-ffp-contract=off", f"-I{sass.SOURCES.parent}"]
    subprocess.run([sass.find_nvcc(), *flags, "-o", program, source], check=True, timeout=300)
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout.split() == ["0", "0", "0"]
