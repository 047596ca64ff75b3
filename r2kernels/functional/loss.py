"""The autograd Function of the losses: one op over a list of weights."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..contract import BY_NAME
from ..reference import checks, parameters
from .differentiable import once


class Call(NamedTuple):
    """How an op is called and what becomes of its results."""

    single: bool
    forward: tuple = ()  # what the forward takes behind the parameters
    backward: tuple = ()  # what the backward takes behind what was saved
    d: int = 1
    layout: str = "output"
    planes: bool = False  # the loss is (2, L, d): two numbers for each column

    def shaped(self, loss):
        """Two planes as the user gets them: without the list of a single tensor, and without a lone column."""
        if self.d == 1:
            loss = loss.squeeze(-1)
        return loss.squeeze(1) if self.single else loss


class Loss(torch.autograd.Function):
    """Inputs: op, call, how many fixed parameters follow; the learned parameter as the user gave it, or None; the fixed
    ones as (L, d) tensors; the weights. A learned parameter is the op's first."""

    @staticmethod
    def forward(ctx, *inputs):
        # not spelled out: without gradients, torch.compile drops ctx where it counts as many inputs as names here
        op, call, fixed, learned, *tensors = inputs
        given, weights = tensors[:fixed], tensors[fixed:]
        if learned is not None:
            given = [parameters.parameter("parameter", learned, len(weights), call.single, call.d, weights[0]), *given]
        loss, saved = op.fwd(weights, *given, *call.forward)
        ctx.save_for_backward(saved, learned, *given, *weights)
        ctx.of_forward = op, call, len(given), ops.backend_of_forward()
        ctx.function = op.row.name
        return call.shaped(loss) if call.planes else loss.squeeze(0) if call.single else loss

    @staticmethod
    @once
    def backward(ctx, tensors, grad):
        op, call, count, backend = ctx.of_forward
        saved, learned, *tensors = tensors
        given, weights = tensors[:count], tensors[count:]
        grad = grad.resolve_neg().reshape((2, len(weights), -1) if call.planes else -1)
        needed = ctx.needs_input_grad[-len(weights) :]
        which = {} if all(needed) else {"needed": needed}
        result = ops.backward(backend, op.bwd, grad, weights, *given, saved, *call.backward, **which)
        gradients, g_learned = result if op.row.learned else (result, None)
        g_learned = parameters.parameter_gradient(g_learned, learned, call.single) if ctx.needs_input_grad[3] else None
        if which:
            gradients = [g if need else None for g, need in zip(gradients, needed, strict=True)]
        fixed = count - (learned is not None)
        return None, None, None, g_learned, *[None] * fixed, *gradients


def learnable(name, value, ws, single, d=1):
    """(value, ()) of a tensor, whose gradient is wanted, else (None, (the number as a fixed parameter,))."""
    if isinstance(value, Tensor):
        checks.check_parameter(name, value, len(ws), single, d, ws[0])
        return value, ()
    return None, (parameters.parameter(name, value, len(ws), single, d, ws[0]),)


def add_gradients_(op, weights, gradients, grad, given, *, alpha_grad=False, geometry=(1, "output")):
    """The forward and backward of a loss without a graph: adds to `gradients`, which lie in memory as the weights do,
    and returns (loss, gradient of the first parameter or None).

    `op` is its name, `given` its (L, d) parameters, `grad` the gradient of the loss: (L,), or (2, L, d) for
    soft_extrema.
    """
    row = BY_NAME[op]
    geometry = geometry if row.columns else ()
    loss, saved = ops.call[op + "_fwd"](weights, *given, *((alpha_grad,) if row.soft else ()), *geometry)
    result = ops.call[op + "_bwd"](grad, weights, *given, saved, *geometry, out=gradients)
    return loss, result[1] if row.learned else None
