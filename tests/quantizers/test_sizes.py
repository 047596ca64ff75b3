"""Sizes that a `Quantizer` learns, used as |p| + FLOOR, and the scale that is one of them."""

import pytest
import torch
from quantizers.calls import call, numbers
from torch.testing import assert_close

from r2kernels import contract, ops, reference
from r2kernels.functional import quantizers

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
SHAPES, SIGNS = ((7,), (31, 66), (4097,), (3, 5)), (1, -1, 0, 1)


def signed(one):
    """The call with sizes below, above and at 0, and with those as they are used."""
    xs = one.xs
    signs = torch.tensor(SIGNS, device=xs[0].device)
    if one.op == "ewgs":
        lower, upper, delta = one.parameters
        span = (upper - lower) * signs
        given = [lower, lower + span, delta]
        return given, [lower, lower + ((given[1] - lower).abs() + contract.FLOOR), delta]
    given = [one.parameters[0] * signs]
    return given, [given[0].abs() + contract.FLOOR]


def results(one, parameters, sized):
    arguments = [*one._replace(parameters=parameters).arguments, sized]
    ys = ops.call[one.op + "_fwd"](one.xs, *arguments)
    gradients, *of_parameters = ops.call[one.op + "_bwd"](one.gs, one.xs, *arguments)
    return ys, gradients, of_parameters


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["lsq", "ewgs", "pact"])
def test_sizes_are_used_above_a_floor(variant, op, dtype, device):
    """The bits of the op with |p| + FLOOR for p, and the gradient through that."""
    xs = [numbers(shape, dtype, device, i) for i, shape in enumerate(SHAPES)]
    one = call(op, xs, 3, True)
    given, used = signed(one)
    ys, gradients, of_parameters = results(one, given, True)
    exact_ys, exact, of_used = results(one, used, False)
    for a, b in zip([*ys, *gradients], [*exact_ys, *exact], strict=True):
        assert_close(a, b, rtol=0, atol=0, equal_nan=True)  # NaN where the span vanishes beside the bounds
    signs = torch.tensor(SIGNS, device=device)
    if op == "ewgs":
        of_upper = of_used[1] * signs
        expected = [of_used[0] + (of_used[1] - of_upper), of_upper]
    else:
        expected = [of_used[0] * signs]
    for a, b in zip(of_parameters, expected, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.nan_to_num().abs().max()), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rescaled(variant, dtype, device):
    xs = [numbers(shape, dtype, device, i).requires_grad_() for i, shape in enumerate(SHAPES)]
    scale = torch.tensor([0.7, -1.3, 0.0, 2.0], dtype=torch.promote_types(dtype, torch.float32), device=device)
    scale.requires_grad_()
    gs = [numbers(x.shape, dtype, device, 9 + i) for i, x in enumerate(xs)]
    ys = quantizers.rescaled(xs, scale)
    size = scale.detach().abs() + contract.FLOOR
    *dxs, dscale = torch.autograd.grad(ys, [*xs, scale], gs)
    for x, y, g, dx, s in zip(xs, ys, gs, dxs, size, strict=True):
        assert torch.equal(y, (x * s).detach()) and torch.equal(dx, g * s)
    sums = torch.stack([(g.double() * x.double()).sum() for g, x in zip(gs, xs, strict=True)])
    assert_close(dscale.double(), (sums * torch.tensor(SIGNS, device=device)).detach(), rtol=1e-5, atol=1e-4)


def test_gradients_are_those_of_the_scale():
    """The reference against autograd of the formula."""
    xs = [numbers(shape, torch.float64, "cpu").requires_grad_() for shape in ((5,), (2, 3))]
    scale = torch.tensor([0.7, -1.3], dtype=torch.float64, requires_grad=True)
    ys, gs = [x * (s.abs() + contract.FLOOR) for x, s in zip(xs, scale, strict=True)], [torch.ones_like(x) for x in xs]
    expected = torch.autograd.grad(ys, [*xs, scale], gs)
    with torch.no_grad():
        gradients, of_scale = reference.rescale_bwd(gs, xs, scale, True)
    for a, b in zip([*gradients, of_scale], expected, strict=True):
        assert_close(a, b)
