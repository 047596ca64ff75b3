"""weight_stats on every backend, with the skew that its op has and `WeightStats` not: extremes to the bit, the rest by
the budget of budget.py."""

import budget
import cases
import pytest
import torch
from parametrize import every_dtype

import r2kernels as r2
from r2kernels import ops, reference
from r2kernels.reference.columns import accumulator

NAMES = (*r2.WeightStats._fields[:-1], "skew")

pytestmark = pytest.mark.usefixtures("nan_filled", "one_thread")


@every_dtype
def test_weight_stats(dtype, device, variants):
    names, narrow = (
        [name for name in cases.INPUTS if name not in ("several chunks", "mixed list")],
        dtype == torch.float64,
    )
    own, pools = budget.Pool(), {v: budget.Pool() for v in variants}

    def errors(rows, exact):
        scale = exact.abs()
        scale[:, 2], scale[:, 6] = exact[:, 5], exact[:, 4]
        return dict(zip(NAMES, budget.relative((rows.double() - exact).abs(), scale).unbind(1), strict=True))

    for seed in range(4):
        ws = [w for name in names for w in cases.make(name, dtype, device, seed)]
        exact = reference.weight_stats_fwd([w.double() for w in ws])
        rounded = [w.float() for w in ws] if narrow else ws
        own.add(errors(reference.weight_stats_fwd(rounded), reference.weight_stats_fwd([w.double() for w in rounded])))
        for v in variants:
            with v.chosen():
                stats, alone, table = r2.weight_stats(ws), r2.weight_stats(ws[-1]), ops.call["weight_stats_fwd"](ws)
            assert torch.equal(table[:, :6], torch.stack(stats[:6], 1))
            assert (
                stats.numel == tuple(w.numel() for w in ws) and alone.numel == ws[-1].numel() and alone.std.shape == ()
            )
            assert {row.dtype for row in stats[:6]} == {accumulator(dtype)}
            assert all(
                torch.equal(getattr(stats, name).double(), exact[:, i])
                for name, i in (("min", 0), ("max", 1), ("abs_max", 5))
            ), f"{v}: these are exact"
            pools[v].add(errors(table, exact))
    failures = budget.exceeded(own, pools, accumulator(dtype), narrow)
    assert not failures, "\n" + failures
