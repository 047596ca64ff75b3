"""What is the range losses' own: rows of several columns, alpha of any size and without a gradient, more than 2^31
numbers."""

import os

import budget
import cases
import pytest
import torch
from parametrize import first, first_dtypes, first_ops

import r2kernels as r2

pytestmark = pytest.mark.usefixtures("nan_filled", "one_thread")

ONE_EACH = [op for op in cases.ONE_EACH if op.columns]
GEOMETRIES = [(d, layout) for d in (2, 3, 4) for layout in ("output", "contiguous")]
QUICK = [name for name in cases.INPUTS if name not in ("several chunks", "outliers", "mixed list")]
STRIDED = ["below a vector", "channels last", "transposed", "every second", "expanded", "unaligned"]


@first_dtypes(torch.float32)
@pytest.mark.parametrize("label", ["soft_min_max", "soft_min_max-negative", "soft_extrema"])
def test_alpha_without_gradient(label, dtype, device, variants):
    """Nothing is computed for it then: another kernel."""
    draws = budget.draws(cases.BY_LABEL[label], QUICK, dtype, device)
    budget.hold([one._replace(learned=False) for one in draws], variants)


@first("geometry", [(2, "contiguous"), (3, "output")], GEOMETRIES)
@first_dtypes(torch.float32)
@first_ops("soft_extrema", among=ONE_EACH)
def test_columns(op, dtype, geometry, device, variants):
    budget.hold(budget.draws(op, STRIDED, dtype, device, geometry=geometry), variants)


@pytest.mark.exhaustive
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("op", ONE_EACH, ids=lambda op: op.label)
def test_columns_of_a_list(op, geometry, device, variants):
    budget.hold(budget.draws(op, ["mixed list", "several chunks"], torch.float32, device, geometry=geometry), variants)


@pytest.mark.exhaustive
@pytest.mark.parametrize("value", [-1e-3, 1e-30, 1e-6, 1e6, 1e30])
def test_extreme_alpha(value, device, variants):
    for function in ("soft_min_max", "soft_extrema"):
        op = cases.Op("extreme", function, "range_losses", (cases.Parameter("alpha", value, "1"),), columns=True)
        budget.hold(budget.draws(op, ["a chunk and one", "outliers", "ties"], torch.float32, device), variants)


def test_k_of_no_use_gives_nan(device, variant):
    w = torch.randn(100, device=device)
    losses = r2.margin([w] * 4, 0.1, k=torch.tensor([0.0, -1.0, float("nan"), 2.0], device=device))
    assert torch.isnan(losses).tolist() == [True, True, True, False]


def _available_memory(device):
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.exhaustive
def test_more_than_two_to_the_31(device, variants):
    """Offsets are 64 bits wide: the extremes lie past 2^31."""
    if _available_memory(device) < 12e9:
        pytest.skip(f"needs 12 GB of memory, {_available_memory(device) / 1e9:.1f} are available")
    torch.use_deterministic_algorithms(False)  # 4 GB are not to be filled
    torch.set_num_threads(os.cpu_count())
    w = torch.zeros(2**31 + 7, dtype=torch.bfloat16, device=device)
    w[-6:] = torch.tensor([3, -3, 2, 0, 1, 3.0])
    w.requires_grad_()
    with variants[-1].chosen():
        for loss, value, expected in (
            (r2.l_inf, 3, [1 / 3, -1 / 3, 0, 0, 0, 1 / 3]),
            (lambda w: r2.margin(w, 1.0, k=2), 4.5, [0.5, -0.5, 0.5, 0, 0, 0.5]),
        ):
            out = loss(w)
            assert out.item() == value
            (g,) = torch.autograd.grad(out, w)
            assert g[-6:].tolist() == torch.tensor(expected).bfloat16().tolist()
            assert g.count_nonzero() == 3 + (value == 4.5)
            del g
