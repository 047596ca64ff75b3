"""How much each weight of a model matters: what `kmeans`, `Palettizer` and `allocate` take as `weight`."""

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..reference.checks import is_dtensor
from . import batches as loaders
from .inputs import InputHook
from .layers import output_axis
from .ranks import is_distributed, reduce
from .select import is_conv1d, is_weight, matrices, none_left, selected
from .starting import unchanged

KINDS = ("fisher", "inputs")
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@torch.no_grad()
def sensitivity(
    model, loader, *, kind="fisher", loss=None, batches=None, forward=None, include=None, exclude=None
) -> dict[str, Tensor]:
    """Name -> how much the error of each number of a weight matters, float32, >= 0, shaped like the weight.

        importance = sensitivity(model, loader)
        palettizer = Palettizer(model, bits=3, weight=importance)

    With importances h the error sum_i h_i (w_i - w_hat_i)^2 stands for what the model loses, in place of the plain
    squared error.

    kind: "fisher": the mean over the batches of squared gradients g_i^2, the diagonal of the empirical Fisher matrix
        (SqueezeLLM: Kim et al. 2023), for which the loss rises by about 1/2 sum_i F_i (w_i - w_hat_i)^2. With `loss` a
        function of (model, batch) it is that of the loss; a batch should then be one sample, since gradients are
        squared after they are summed. Without, that of sum(r * outputs) for random signs r, the same in every run:
        E_r g_i^2 is the sum over all outputs of their squared derivatives, the diagonal of the Gauss-Newton matrix of
        a squared error of the outputs (Hutchinson 1990). This needs no labels, and batches may be of any size.
        "inputs": E[x_j^2] of the inputs x_j that each number is multiplied by (channels of a convolution), from
        forwards alone: the expected squared error of a linear layer's outputs, were its inputs uncorrelated.
    loader, batches, forward: as in `calibrate`. What `forward` returns are the outputs: a tensor, or a tuple or mapping
        of which the floating-point tensors count.
    include, exclude: as in `select_weights`; embeddings and recurrent weights are there without.

    Each row of an embedding has one use more than the loader gave it, as in Laplace's rule, and all together what they
    had: "inputs" is (uses + 1) / (all uses + rows), and "fisher" adds to every row the mean of those that were used. A
    weight that modules share is there once. What modules compute from other parameters (weight_norm) has no entry, nor
    with "inputs" a weight that is not that of a linear, conv or embedding module which is called.

    The model runs in eval(), and is afterwards as it was: modes, buffers, gradients, random numbers. Squared gradients
    are summed in place when each gradient appears, and no gradient is kept. Under torch.distributed all ranks must call
    this with their own batches of the same plain module; they take the mean over all. TypeError or ValueError names the
    argument, or the weight whose importance is not finite.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if loss is not None and (kind != "fisher" or not callable(loss)):
        raise TypeError(f'loss must be a function of (model, batch), for kind="fisher" alone, got {loss!r}')
    loaders.check_loader(loader, batches, forward)
    candidates = list(matrices(model))
    kept, _ = selected(candidates, include, exclude, lambda *place: is_weight(*place, True, recurrent=True))
    if not kept:
        raise ValueError(none_left(model, exclude))
    for found in kept:
        if is_dtensor(found.tensor) or isinstance(model, nn.parallel.DistributedDataParallel):
            raise TypeError(f"sensitivity takes plain modules; {found.name} is sharded or its gradients are averaged")
    measured = _fisher if kind == "fisher" else _inputs
    with unchanged(model, nn.Module()), loaders.evaluating(model):
        sums, count = measured(model, loader, candidates, kept, loss, batches, forward)
    count = torch.tensor(float(count), device=kept[0].tensor.device)
    if is_distributed():
        for t in [count, *sums.values()]:
            reduce([t], "sum")
    if not count:
        raise ValueError("loader is empty; sensitivity needs at least one batch")
    found = {}
    for place in kept:
        if place.name in sums and (kind == "fisher" or sums[place.name][0]):
            found[place.name] = _shaped(place, sums[place.name], count, kind)
            if not found[place.name].isfinite().all():
                raise ValueError(f"the sensitivity of {place.name} has a NaN or an infinity")
    return found


def _shaped(place, total, count, kind):
    """The importances of a weight from sums over batches (of "inputs": over all that the module was given)."""
    is_table, w = isinstance(place.module, _EMBEDDINGS), place.tensor
    if kind == "fisher":
        mean = total / count
        if is_table:
            total, used = mean.sum(0), mean.any(1).sum().clamp(min=1)
            mean = (mean + total / used) * (used / (used + len(w)))  # the sums of columns stay
        return mean
    if is_table:
        return ((total[1:] + 1) / (total[1:].sum() + len(w)))[:, None].expand(w.shape).contiguous()
    mean = total[1:] / total[0]
    axis = output_axis(place.module)
    if axis == 0 and isinstance(place.module, nn.modules.conv._ConvNd):  # each output channel reads its group's
        mean = mean.view(place.module.groups, -1).repeat_interleave(len(w) // place.module.groups, 0)
    else:
        mean = mean[:, None] if axis else mean[None]
    return mean.reshape(*mean.shape, *[1] * (w.dim() - 2)).expand(w.shape).contiguous()


def _fisher(model, loader, candidates, kept, loss, batches, forward):
    """(name -> sum of squared gradients over batches, the number of batches)"""
    sums = {f.name: torch.zeros_like(f.tensor, dtype=torch.float32) for f in kept}
    generator = torch.Generator("cpu").manual_seed(0)
    run = forward or loaders.call

    def backward(model, batch):
        with torch.enable_grad():
            value = _probe(run(model, batch), generator) if loss is None else loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ValueError(f"loss must give one number that depends on the weights, got {value!r}")
        value.backward()

    with _hooked(model, {f.tensor: sums[f.name] for f in kept}):
        count = loaders.run(
            model, loader, kept[0].tensor.device, batches=batches, forward=backward, title="sensitivity"
        )
    return sums, count


@contextlib.contextmanager
def _hooked(model, sums):
    """In the block a gradient of a parameter in `sums` is squared, added to its sum, and dropped; others have none."""
    stood = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    handles = []

    def take(p):
        sums[p].addcmul_(p.grad, p.grad)
        p.grad = None

    try:
        for p, _, _ in stood:
            p.grad = None
            p.requires_grad_(p in sums)
            if p in sums:
                handles.append(p.register_post_accumulate_grad_hook(take))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for p, grad, requires_grad in stood:
            p.requires_grad_(requires_grad)
            p.grad = grad


def _probe(outputs, generator):
    """sum(r * outputs) for random signs r."""
    terms = []
    for out in _floating(outputs):
        signs = torch.randint(0, 2, out.shape, generator=generator, device="cpu").mul_(2).sub_(1)
        terms.append((out * signs.to(out)).sum(dtype=torch.promote_types(out.dtype, torch.float32)))
    if not terms:
        raise ValueError("the model gave no output with a gradient; see forward= or loss=")
    return sum(terms)


def _floating(outputs):
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.requires_grad else []
    parts = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [t for part in parts for t in _floating(part)] if isinstance(outputs, (Mapping, tuple, list)) else []


class _Squares:
    """Adds up what modules are given; the owner of `InputHook`s that change nothing."""

    def __init__(self, sums):
        self.sums = sums

    def _input(self, name, i, module, x):
        if isinstance(module, _EMBEDDINGS):
            count, seen = x.numel(), torch.bincount(x.reshape(-1), minlength=module.num_embeddings)
        else:
            is_conv = isinstance(module, nn.modules.conv._ConvNd)
            rows = x.detach().movedim(1 - module.weight.dim() if is_conv else -1, -1).flatten(0, -2).float()
            count, seen = len(rows), rows.square().sum(0)
        self.sums[name][0] += count
        self.sums[name][1:] += seen
        return x


def _inputs(model, loader, candidates, kept, loss, batches, forward):
    """(name -> (1 + I,) how many vectors the modules of a weight were given, and sums of squares; the batches)"""
    kinds, sums, handles = (nn.Linear, nn.modules.conv._ConvNd, *_EMBEDDINGS), {}, []
    owner = _Squares(sums)
    for f in kept:
        for module in {c.module: None for c in candidates if c.tensor is f.tensor and c.attribute == "weight"}:
            if isinstance(module, kinds) or is_conv1d(module):
                sums.setdefault(f.name, f.tensor.new_zeros(1 + _width(module), dtype=torch.float32))
                hook = InputHook(owner, f.name, 0)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        count = loaders.run(model, loader, kept[0].tensor.device, batches=batches, forward=forward, title="sensitivity")
    finally:
        for handle in handles:
            handle.remove()
    return sums, count


def _width(module):
    """How many numbers a module is given at once: channels, features, or rows of a table."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels
    return module.weight.shape[0 if isinstance(module, _EMBEDDINGS) or is_conv1d(module) else 1]
