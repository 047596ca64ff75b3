"""What DKM's CUDA kernels over scalars are given of shared memory, counted by the code that launches them, and what
they declare themselves, as compiled. Needs nvcc, but no GPU."""

import re
import subprocess

import pytest
import sass

LIMITS = {"sm_80": 163, "sm_86": 99, "sm_90": 227}  # KB that a block may have, declared or given
MOST = 4096  # clusters

PROGRAM = """
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include "dkm_shared.cuh"
using namespace r2::cuda;

size_t limit;
int most;

template <class A>
void put(const char* kind, const char* op, size_t bytes) {
  printf("%s %s,%d,%d,%zu\\n", kind, op, int(sizeof(A)), most, bytes);
}
template <class A, class Op, class MergeOp>
void put_sum(const char* op, const char* merge, bool outside = false) {
  const SumPlan<Op, MergeOp, A> plan(most, limit, outside);
  put<A>("tables", op, plan.tables), put<A>("sums", op, plan.sums), put<A>("merge", merge, plan.merge);
}
template <class A>
void put_all() {
  put_sum<A, JacobianSums, JacobianMerge>("JacobianSums", "JacobianMerge", outside_bytes(most) > 0);
  if (!fits<A>(most, limit)) return;
  put_sum<A, UpdateSums, UpdateMerge>("UpdateSums", "UpdateMerge");
  put_sum<A, UpstreamSums, UpstreamMerge>("UpstreamSums", "UpstreamMerge");
  put_sum<A, RecurSums<false>, RecurMerge<false>>("RecurSums<false>", "RecurMerge<false>");
  put_sum<A, RecurSums<true>, RecurMerge<true>>("RecurSums<true>", "RecurMerge<true>");
  put<A>("tables", "OutputMap", tables_bytes<OutputMap, A>(most));
  put<A>("output", "", Tables<OutputMap, A>::bytes(most));
  put<A>("tables", "GradientMap", tables_bytes<GradientMap, A>(most));
  for (int steps = 1; steps <= 10; ++steps)
    put<A>("gradient", "", Tables<GradientMap, A>::bytes(most) * (together<A>(most, steps, limit) ? steps : 1));
}
int main(int, char** arguments) {
  limit = atoi(arguments[1]) * 1024 - kReserved;
  for (most = 1; most <= atoi(arguments[2]); ++most) put_all<float>(), put_all<double>();
}
"""


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """The program, compiled for the host."""
    folder = tmp_path_factory.mktemp("sizes")
    if (nvcc := sass.find_nvcc()) is None:
        pytest.skip("no nvcc was found")
    (folder / "sizes.cu").write_text(PROGRAM)
    subprocess.run(
        [nvcc, "-std=c++17", "-arch=sm_90", "-I", sass.SOURCES, "-o", folder / "sizes", folder / "sizes.cu"],
        check=True,
        timeout=300,
    )
    return folder / "sizes"


def declared():
    """(kind and op, bytes of the accumulator) -> bytes of shared memory that the kernel declares"""
    kernels, found = sass.compiled("dkm_scalar.cu"), {}
    names = subprocess.run(["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True).stdout
    for kernel, name in zip(kernels.values(), names.splitlines(), strict=True):
        kind, arguments = re.search(r"dkm_(\w+)_kernel<(.*)>\(r2::List", name).groups()
        arguments = arguments.replace("r2::cuda::", "").split(", ")
        op = next((name for name in arguments if re.search("Sums|Merge|Map", name)), "")
        key = f"{kind} {op}", 8 if arguments[-1] == "double" else 4
        found[key] = max(found.get(key, 0), kernel.shared)
    return found


@pytest.mark.parametrize("card", LIMITS)
def test_every_launch_fits(sizes, card):
    """For every number of clusters that the kernels serve."""
    own, limit = declared(), LIMITS[card] * 1024
    output = subprocess.run([sizes, str(LIMITS[card]), str(MOST)], check=True, capture_output=True, text=True).stdout
    served, over = dict.fromkeys(own, 0), []
    for line in output.splitlines():
        kernel, size, most, given = line.split(",")
        served[kernel, int(size)] = int(most)
        if own[kernel, int(size)] + int(given) > limit:
            over.append(line)
    assert not over, over[:10]
    assert min(served.values()) >= 512, served
