"""How DKM's CUDA kernels find the interval of a weight: the repository's own text, in one thread on the host."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "csrc/cuda/dkm_intervals.cuh"
CXX = shutil.which("g++") or shutil.which("c++")

PROGRAM = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>
using std::max;
using std::min;

#define __device__
#define __forceinline__ inline
struct { unsigned x; } threadIdx = {0}, blockDim = {1};
void __syncthreads() {}
int __syncthreads_or(int any) { return any; }
unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
float __saturatef(float x) { return x > 0 ? std::min(x, 1.0f) : 0; }
void atomicMax(int* to, int x) { *to = std::max(*to, x); }
int ulps;  // that the approximate reciprocal errs by
float reciprocal(float x) {
  const float y = 1 / x;
  return __uint_as_float(__float_as_uint(y) + (std::isfinite(y) ? ulps : 0));
}
double reciprocal(double x) { return 1 / x; }

%s

std::mt19937_64 bits(1);

template <class A>
int wrong_tables(int K, int form) {
  std::normal_distribution<A> normal;
  std::vector<A> c(K);
  for (A& x : c) {
    x = normal(bits);
    if (form == 1) x = x * x * x * x * x;                      // crowded
    if (form == 2) x = A(std::lround(x * 8)) / 8;              // equal ones
    if (form == 3) x = 1 + x * A(sizeof(A) == 4 ? 1e-6 : 1e-12);  // few numbers between
    if (form == 4) x = A(int(bits() >> 54)) - 100;             // evenly spread
  }
  std::sort(c.begin(), c.end());
  c.push_back(A(NAN));
  uint8_t grid[kMostCells];
  int most;
  ulps = int(bits() %% 3) - 1;
  Finder<A> finder;
  finder.fill(c.data(), grid, K, &most);
  const A infinity = INFINITY;
  for (int i = 0; i < K + 64; ++i) {
    const A x = i < K ? c[i] : c[bits() %% K] + normal(bits) * (c[K - 1] - c[0]) / K;
    const A last = i == K ? infinity : i == K + 1 ? -infinity : -x;
    const A w[4] = {x, std::nextafter(x, -infinity), std::nextafter(x, infinity), last};
    int at[4];
    finder.find(c.data(), grid, K, w, at);
    for (int j = 0; j < 4; ++j)
      if (at[j] != int(sizeof(A)) * int(std::upper_bound(c.begin(), c.end() - 1, w[j]) - c.begin())) return 1;
  }
  return 0;
}

int main() {
  for (int K : {1, 2, 3, 16, 100, 255, 256, 257, 340, 511, 512, 513, 768, 1024, 1025, 4096})
    for (int form = 0; form < 5; ++form) {
      int wrong = 0;
      for (int table = 0; table < (K > 1024 ? 10 : 80); ++table)
        wrong += wrong_tables<float>(K, form) + (table < 20 ? wrong_tables<double>(K, form) : 0);
      if (wrong) printf("K = %%d, form %%d: %%d wrong tables\n", K, form, wrong);
    }
}
"""


def finder():
    """`behind`, the number of cells and the struct `Finder`, as they stand in the source."""
    text = SOURCE.read_text()
    behind = re.search(r"^template <class A>\n[^\n]* behind\(.*?^}\n", text, re.M | re.S)[0]
    cells = re.search(r"^constexpr int kFewestCells.*?;\n", text, re.M)[0]
    return behind + cells + re.search(r"^template <class A>\nstruct Finder {.*?^};\n", text, re.M | re.S)[0]


@pytest.mark.skipif(CXX is None, reason="no C++ compiler was found")
def test_every_weight_is_in_its_interval(tmp_path):
    """Random tables; the weights are the centroids, their neighbours, and numbers between and beyond."""
    (tmp_path / "finder.cpp").write_text(PROGRAM % finder())
    subprocess.run(
        [CXX, "-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-o", "finder", "finder.cpp"],
        cwd=tmp_path,
        check=True,
    )
    run = subprocess.run([tmp_path / "finder"], capture_output=True, text=True, check=True)
    assert run.stdout == ""
