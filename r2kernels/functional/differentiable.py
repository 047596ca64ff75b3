"""How far the functions can be differentiated: once, and not by the transforms of torch.func."""

import functools

import torch

from ..reference import checks
from ..sharding import shards


def weights(function, W, cluster_dim=1, layout="output", name="W", empty=True):
    """`checks.weights` for the public `function`; RuntimeError in a transform, whose tensors have no memory."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{function} cannot run inside of vmap, grad, jvp or another transform of torch.func; instead of vmap pass "
            f"a list of tensors, instead of grad call backward(), or take r2kernels.reference.{function}"
        )
    sharded = functools.partial(shards.check, d=cluster_dim, layout=layout)
    return checks.weights(W, cluster_dim, layout, name, empty, sharded)


class _LastGradients(torch.autograd.Function):
    """Inputs: function, how many gradients; these; what they were computed from. Gives the gradients."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.function, count, *tensors = inputs
        return tuple([g.view_as(g) for g in tensors[:count]])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.function} has no second derivative, which a gradient through it (create_graph=True) was asked for"
        )


def _is_batched(grad):
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)


def once(backward):
    """The backward of a Function, given what the forward has saved; `ctx.function` says whose it is.

    With create_graph its gradients are part of the graph, up to where a second derivative would go through them.
    """

    @functools.wraps(backward)
    def of_graph(ctx, *grads):
        saved = ctx.saved_tensors  # read once, as activation checkpointing asks
        if torch.compiler.is_compiling():
            return backward(ctx, saved, *grads)
        if torch._C._are_functorch_transforms_active() or any(map(_is_batched, grads)):
            raise RuntimeError(
                f"{ctx.function} takes one gradient at a time; is_grads_batched=True, vectorize=True or vmap gave many"
            )
        if not torch.is_grad_enabled():
            return backward(ctx, saved, *grads)
        with torch.no_grad():
            gradients = backward(ctx, saved, *grads)
        made = [i for i, g in enumerate(gradients) if g is not None]
        sources = [t for t in (*grads, *saved) if t is not None and t.requires_grad]
        last = _LastGradients.apply(ctx.function, len(made), *[gradients[i] for i in made], *sources)
        found = dict(zip(made, last, strict=True))
        return tuple([found.get(i) for i in range(len(gradients))])

    return of_graph
