"""The reference of every loss of the table: derivatives, and that the ops compute what the public function means."""

import budget
import cases
import pytest
import torch
from parametrize import every_loss
from torch.testing import assert_close

import r2kernels
from r2kernels import reference


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("op", [op for op in cases.LOSSES if "k" not in op.options], ids=lambda op: op.label)
def test_gradcheck(op, d):
    ws = [normal(7).requires_grad_(), normal(2, 3, 2, seed=1).requires_grad_()]
    options = {**op.arguments(1.0), **({"cluster_dim": d} if op.columns else {})}
    value = options.pop(op.parameter, None)
    inputs = ws if value is None else [*ws, torch.tensor([value, value / 2], dtype=torch.float64, requires_grad=True)]

    def loss(*inputs):
        learned = {op.parameter: inputs[2]} if op.parameter else {}
        return getattr(reference, op.function)(inputs[:2], **options, **learned)

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("geometry", [(1, "output"), (2, "output"), (3, "contiguous")], ids=str)
@every_loss
def test_forward_and_backward_are_those_of_autograd(op, geometry):
    """`<op>_fwd` and `<op>_bwd` against autograd through the public function."""
    if geometry[0] > 1 and not op.columns:
        geometry = (1, "output")
    for name in ("below a vector", "outliers", "ties", "far from zero", "transposed", "every second", "mixed list"):
        one = budget.draw(op, name, torch.float64, geometry=geometry)
        with r2kernels.use_backend("reference"):
            result = budget.evaluate(one)
        expected = budget.evaluate(one, layer=reference)
        assert_close(result.loss, expected.loss)
        for a, b, w in zip(result.weights, expected.weights, one.weights, strict=True):
            if op.function == "kure" and w.numel() == 1:
                assert a.item() == 0  # autograd gives NaN: the std of one number
            else:
                assert_close(a, b)
        if op.parameter:
            assert_close(result.parameter, expected.parameter)
