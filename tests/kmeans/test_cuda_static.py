"""The CUDA kernel of k-means over scalars as compiled for sm_90. Needs nvcc, but no GPU."""

import sass


def test_lines():
    """For two dtypes, with weights and without: no spills, and four blocks of 256 threads find registers."""
    kernels = sass.compiled("kmeans.cu")
    assert len(kernels) == 4
    for kernel in kernels.values():
        assert not kernel.spills and kernel.registers <= 64
        assert kernel.shared <= 10 * 1024  # beside 48 bytes for each of 2049 edges
