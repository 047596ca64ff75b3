"""The standard deviation of a sample, the unit of `alpha_unit="std"`, on every backend."""

import math

import pytest
import torch
from parametrize import every_dtype
from torch.testing import assert_close

import r2kernels as r2
from r2kernels import ops, reference
from r2kernels.functional.regularizers import sampled_std
from r2kernels.reference.sample import NUMBERS, RUN, sample

LARGE = (2 * NUMBERS - 1, 2 * NUMBERS, 100_003)


def normal(*shape, dtype=torch.float64, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def test_which_numbers_are_in_it():
    assert torch.equal(sample(torch.arange(2.0 * NUMBERS - 1)), torch.arange(2.0 * NUMBERS - 1))
    for numel in (2 * NUMBERS, 1_000_000, 11_678_912):
        runs = sample(torch.arange(numel)).reshape(-1, RUN)
        start, part = runs[:, 0], numel // NUMBERS * RUN
        assert len(runs) == NUMBERS // RUN and torch.equal(runs, start[:, None] + torch.arange(RUN))
        assert torch.equal(start // part, torch.arange(len(runs))), "one from each part"
        assert runs.max() < numel
    w = normal(300, 256)
    for view in (w, w.t(), w.t().reshape(16, 16, 300).permute(2, 0, 1)):
        assert torch.equal(sample(view), sample(w)), "in the order of memory"
    assert torch.equal(sample(w[:, ::2]), sample(w[:, ::2].contiguous()))


@pytest.mark.parametrize("columns", [64, 256, 4096])
def test_matrices_of_unlike_columns(columns):
    """A sample at equal distances would read a few columns alone."""
    w = normal(2**20 // columns, columns) * torch.linspace(0.1, 4, columns, dtype=torch.float64)
    (found,) = reference.sampled_std_fwd([w])
    assert abs(found / w.std() - 1) < 0.04


@pytest.mark.usefixtures("nan_filled", "one_thread")
@every_dtype
def test_every_backend(dtype, device, variants):
    ws = [normal(n, dtype=dtype, device=device, seed=n) * 0.05 + 0.1 for n in (1, 2, 7, 16, 4097, *LARGE)]
    ws += [normal(300, 256, dtype=dtype, device=device).t(), normal(400, 300, dtype=dtype, device=device)[:, ::2]]
    ws += [torch.full((50_000,), 0.3, dtype=dtype, device=device), torch.zeros(0, 3, dtype=dtype, device=device)]
    exact = [x.std() if len((x := sample(w.double())).unique()) > 1 else x.new_zeros(()) for w in ws]
    for variant in variants:
        with variant.chosen():
            found = sampled_std(ws)
        wide = torch.promote_types(dtype, torch.float32)
        assert found.dtype == wide and not found.requires_grad
        rtol = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(wide).eps
        assert_close(found, torch.stack(exact).to(wide), rtol=rtol, atol=0, msg=lambda m, v=variant: f"{v}: {m}")


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales(scale, device, variants):
    ws = [normal(n, device=device, seed=n) for n in (100, 40_000)]
    for variant in variants:
        with variant.chosen():
            found = sampled_std([(w * scale).float() for w in ws])
        assert_close(found.double() / scale, torch.stack([sample(w).std() for w in ws]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_what_is_no_number(special, device, variants):
    """Where the sample has it, the deviation is NaN."""
    ws = [normal(n, device=device) for n in (1, 100, 40_000)]
    for w in ws:
        w[0] = special
    for variant in variants:
        with variant.chosen():
            assert sampled_std(ws).isnan().all()


def test_opcheck(device):
    torch.library.opcheck(ops.op["sampled_std_fwd"], ([normal(3, 5, device=device), normal(40_000, device=device)],))


def test_regularizer_measures_in_it(device):
    """alpha_unit="std" is alpha in units of it, in both ways of differentiating."""
    net = torch.nn.Sequential(torch.nn.Linear(300, 256), torch.nn.Linear(256, 3)).to(device)
    ws = [net[0].weight, net[1].weight]
    reg = r2.RangeRegularizer(net, weight=0.5, alpha=4.0, alpha_unit="std")
    low, high = reference.soft_extrema(ws, reg.alpha / torch.stack([sample(w.detach()).std() for w in ws]))
    expected = 0.5 * (high - low + (-reg.alpha).exp()).sum()
    inputs = [*ws, reg.alpha]
    of_hand = torch.autograd.grad(expected, inputs)
    assert_close(reg(), expected)
    assert_close(torch.autograd.grad(reg(), inputs), of_hand)
    assert_close(reg.accumulate_grad_(), expected.detach())
    assert_close([p.grad for p in inputs], list(of_hand))
