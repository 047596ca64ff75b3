"""Several regularizers from one read of the weights."""

import torch

from .. import ops
from ..backends import chosen
from ..lists import carve_gradients
from ..reference import checks, parameters


class _Terms(torch.autograd.Function):
    """`parameters` are the (L, 1) tensors of all terms, one term's after the other's."""

    @staticmethod
    def forward(ctx, *inputs):
        call, count, *tensors = inputs
        parameters, ws = tensors[:count], tensors[count:]
        losses, saved = ops.run("terms_fwd", ws, call[0], parameters, *call[1:])
        ctx.save_for_backward(*tensors, *saved)
        ctx.call, ctx.count, ctx.terms = call, count, len(saved)
        ctx.backend = None if torch.compiler.is_compiling() else chosen()
        return tuple(losses)

    @staticmethod
    def backward(ctx, *grads):
        tensors = ctx.saved_tensors  # read once, as activation checkpointing asks
        tensors, saved = tensors[: -ctx.terms], tensors[-ctx.terms :]
        parameters, ws = tensors[: ctx.count], tensors[ctx.count :]
        names, *rest = ctx.call
        buffers, of_parameters = ops.run_backward(
            ctx.backend, "terms_bwd", list(grads), ws, names, parameters, *rest, saved
        )
        learned = iter(of_parameters)
        gradients = []
        for name in names:
            gradients += [
                next(learned) if place == 0 and name in _LEARNED else None
                for place in range(checks.tensors_of_term(name))
            ]
        gradients += carve_gradients(buffers, ws)
        return None, None, *[g if need else None for g, need in zip(gradients, ctx.needs_input_grad[2:], strict=True)]


_LEARNED = ("margin", "soft_min_max", "msqe")  # in their first parameter


def _parameters(name, options, ws, single):
    """The (L, 1) tensors that the op of a term takes; connected to what the user gave under autograd."""

    def of(key, **rules):
        return parameters.parameter(f"terms[{name!r}][{key!r}]", options[key], len(ws), single, 1, ws[0], **rules)

    if name == "margin":
        return [of("M"), parameters.margin_k(options.get("k", 1), ws, single, 1)]
    if name == "soft_min_max":
        return [of("alpha")]
    if name == "kure":
        options = {"target": 1.8, **options}
        return [of("target", differentiable=False)]
    if name in ("bin_reg", "msqe"):
        checks.bit_width(options["bits"], f"terms[{name!r}]['bits']")
        return [parameters.step(f"terms[{name!r}]['step']", options["step"], ws, single, name == "msqe")]
    return [parameters.rank(options["fraction"], ws, single)] if name == "partial_l2" else []


def weight_terms(W, terms) -> dict:
    """name -> loss of each term, as the function of that name gives it, all from one forward and one backward pass over the weights.

    terms: a dict of name -> keyword arguments, of l_inf, margin, soft_min_max, kure, bin_reg, msqe and partial_l2; for example
    {"soft_min_max": {"alpha": 0.1}, "kure": {}, "msqe": {"step": step, "bits": 4}}. cluster_dim is 1. The gradients of all terms are summed before they are
    rounded to the dtype of W. (partial_l2 looks for its threshold in passes of its own.)
    """
    ws, single = checks.weights(W)
    terms = checks.terms(terms)
    parameters = [_parameters(name, options, ws, single) for name, options in terms.items()]
    bits = [options.get("bits", 0) for options in terms.values()]
    flags = [name == "soft_min_max" and given[0].requires_grad for name, given in zip(terms, parameters, strict=True)]
    flat = [p for given in parameters for p in given]
    losses = _Terms.apply((list(terms), bits, flags), len(flat), *flat, *ws)
    return {name: loss[0] if single else loss for name, loss in zip(terms, losses, strict=True)}
