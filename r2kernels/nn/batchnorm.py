"""The running statistics of batch norms, estimated anew for weights and activations that have been quantized."""

import contextlib

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from .batches import check_loader, evaluating, run
from .ranks import is_distributed, reduce


@torch.no_grad()
def reestimate_batchnorm(model, loader, *, batches=None, forward=None):
    """Sets the running mean and variance of every batch norm to their averages over the batches of the loader.

        quantizer = calibrate(model, loader)  # or Quantizer, after training
        reestimate_batchnorm(model, loader, batches=100)  # of what eval() runs on

    Each batch norm normalizes by the statistics of the batch, as in train(); all else runs as in eval(), on hard
    weights and quantized activations where a `Quantizer` or `Palettizer` is attached. Batches count the same whatever
    their size, as do the calls of a batch norm that a forward calls more often; one that no batch reaches keeps its
    statistics. Modes and momenta are afterwards what they were; after an exception so are the statistics. Under
    torch.distributed all ranks must call this, and take the average of all.

    loader, batches, forward: as for `calibrate`. ValueError for an empty loader, or a model without a batch norm that
    has running statistics. (Precise-BN, https://arxiv.org/abs/2105.07576, section 3.)
    """
    check_loader(loader, batches, forward)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no batch norm with running statistics")
    device = norms[0].running_mean.device
    with evaluating(model), _averaging(norms) as calls:
        if not run(model, loader, device, batches=batches, forward=forward, title="batch norm"):
            raise ValueError("loader is empty; reestimate_batchnorm needs at least one batch")
        if is_distributed():
            _average_of_ranks(norms, calls)


@contextlib.contextmanager
def _averaging(norms):
    """Batch norms average over their calls; gives the list of how many each has had. An exception undoes all."""
    before = [(m.momentum, [(b, b.clone()) for b in m.buffers()]) for m in norms]
    calls = [0] * len(norms)

    def hook(i):
        def before_call(module, args):
            calls[i] += 1
            module.momentum = 1 / calls[i]  # momentum=None would read the count back from the device

        return before_call

    handles = [m.register_forward_pre_hook(hook(i)) for i, m in enumerate(norms)]
    try:
        for m in norms:
            m.train()
        yield calls
    except BaseException:
        for _, buffers in before:
            for b, value in buffers:
                b.copy_(value)
        raise
    finally:
        for m, handle, (momentum, _) in zip(norms, handles, before, strict=True):
            handle.remove()
            m.momentum = momentum


def _average_of_ranks(norms, calls):
    """The statistics, weighed by each rank's calls."""
    statistics = [t for m in norms for t in (m.running_mean, m.running_var)]
    sums = [t.double() * n for t, n in zip(statistics, [n for n in calls for _ in range(2)], strict=True)]
    counts = torch.tensor(calls, dtype=torch.float64, device=sums[0].device)
    reduce([*sums, counts], "sum")
    for i, (t, total) in enumerate(zip(statistics, sums, strict=True)):
        count = counts[i // 2].to(t.device)
        t.copy_(torch.where(count > 0, total / count, t))
