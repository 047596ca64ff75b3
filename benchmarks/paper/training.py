"""Training with a range loss, then each way to quantize what was trained."""

import contextlib
import copy
import os
from typing import NamedTuple

import torch
from data import digits, pictures
from networks import NETWORKS
from torch import distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from r2kernels import Palettizer, Quantizer, RangeRegularizer, calibrate


class Loss(NamedTuple):
    """A row of the tables: options of RangeRegularizer or None, the learning rate of its parameter, standard deviations
    at which weights are clipped."""

    options: dict | None
    learning_rate: float = 0.0
    clip: float | None = None


NONE = "no R2"
# for digits: found by the demo; alpha follows the standard deviation, which a learned alpha at its start of 0.1 does
# not in so few steps
LOSSES = {
    NONE: Loss(None),
    "L-infinity": Loss(dict(loss="l_inf", weight=0.01)),
    "margin": Loss(dict(loss="margin", weight=0.1, k=0.01), learning_rate=0.02),
    "soft-min-max": Loss(dict(loss="soft_min_max", weight=0.03, alpha=8.0, alpha_unit="std", learn=False)),
    "KURE": Loss(dict(loss="kure", weight=0.01)),
    "clipping at 2.5 std": Loss(None, clip=2.5),
}
METHODS = {
    **{f"{name} {bits} bit": ("qat", name, bits) for name in ("PACT", "LSQ", "EWGS") for bits in (2, 4)},
    **{f"DKM {bits} bit, {d}-dim": ("dkm", bits, d) for bits, d in ((1, 1), (2, 1), (4, 1), (2, 2), (4, 4))},
    "PTQ W2A8": ("ptq", 2, 8),
}


# How much slower than the weights the ranges of a quantizer are trained. EWGS's bounds have sums over all weights for
# gradients, without LSQ's scale: at the rate of the weights they run away, and 2 bits end at chance.
RANGE_RATES = {"EWGS": 0.01}


class Plan(NamedTuple):
    """How long and how fast to train."""

    epochs: int
    tuning_epochs: int
    learning_rate: float = 0.2
    tuning_rate: float = 0.01
    clustering_rate: float = 0.05
    weight_decay: float = 1e-4
    data: str | None = None
    batch: int = 256
    size: int = 224
    workers: int = 4


class Job(NamedTuple):
    """One training and all that follows from it."""

    network: str
    loss: str
    seed: int
    methods: tuple
    plan: Plan
    device: str = "cpu"


def images_of(job):
    device = torch.device(job.device)
    if job.plan.data is None:
        return digits(job.seed, device)
    return pictures(job.plan.data, device, job.plan.batch, job.plan.size, job.plan.workers)


def run(job, say=lambda what: None):
    """{"fp32": accuracy, "range": mean range of the layers, "range/std": ..., method: accuracy, ...}; every accuracy is
    of the test images."""
    images = images_of(job)
    torch.manual_seed(job.seed)
    model = NETWORKS[job.network](images.small, images.channels, images.classes).to(job.device)
    say("training")
    pretrain(model, images, LOSSES[job.loss], job.plan)
    found = {"fp32": accuracy(model, images.test)}
    with torch.no_grad():
        weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        ranges = [(w.max() - w.min()).item() for w in weights]
        found["range"] = sum(ranges) / len(ranges)
        found["range/std"] = sum(r / w.std().item() for r, w in zip(ranges, weights, strict=True)) / len(ranges)
    for name in job.methods:
        say(name)
        torch.manual_seed(job.seed)
        kind, *rest = METHODS[name]
        found[name] = {"qat": quantized, "dkm": clustered, "ptq": calibrated}[kind](
            copy.deepcopy(model), images, job.plan, *rest
        )
    return found


def alone(job):
    """`run` in a process of its own."""
    torch.set_num_threads(1)  # more gain little on networks of this size
    return run(job)


def pretrain(model, images, loss, plan):
    groups = [{"params": list(model.parameters())}]
    regularizer = RangeRegularizer(model, **loss.options) if loss.options else None
    groups += regularizer.param_groups() if regularizer else []
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

    def after():
        if loss.clip:
            with torch.no_grad():
                for w in weights:
                    most = loss.clip * w.std()
                    w.clamp_(-most, most)

    fit(
        model,
        images,
        groups,
        [plan.learning_rate, loss.learning_rate][: len(groups)],
        plan,
        plan.epochs,
        regularizer=regularizer,
        after=after,
    )


def quantized(model, images, plan, method, bits):
    quantizer = Quantizer(model, method.lower(), bits, bits)
    groups = [{"params": list(model.parameters())}, *quantizer.param_groups()]
    rates = [plan.tuning_rate, *[plan.tuning_rate * RANGE_RATES.get(method, 1)] * (len(groups) - 1)]
    fit(model, images, groups, rates, plan, plan.tuning_epochs)  # its first batch sets the ranges
    return accuracy(model, images.test)


def clustered(model, images, plan, bits, cluster_dim):
    palettizer = Palettizer(model, bits, cluster_dim=cluster_dim)
    fit(
        model,
        images,
        [{"params": list(model.parameters())}],
        [plan.clustering_rate],
        plan,
        plan.tuning_epochs,
        after=palettizer.step,
    )
    palettizer.remove()
    estimate_norms(model, images)
    return accuracy(model, images.test)


def calibrated(model, images, plan, bits, activation_bits):
    model.eval()
    calibrate(model, _first(images.train, 5), bits, activation_bits, method="minmax", axis=None)
    estimate_norms(model, images)
    return accuracy(model, images.test)


def _first(loader, count):
    return [batch for batch, _ in zip(loader, range(count), strict=False)]


def fit(model, images, groups, rates, plan, epochs, *, regularizer=None, after=lambda: None):
    """SGD with Nesterov momentum, one cycle of the learning rates."""
    optimizer = torch.optim.SGD(groups, plan.learning_rate, momentum=0.9, nesterov=True, weight_decay=plan.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [max(rate, 1e-9) for rate in rates], total_steps=epochs * len(images.train)
    )
    device, whole = _device(model), model.train()
    if distributed.is_initialized():
        whole = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    for epoch in range(epochs):
        images.start(epoch)
        for inputs, labels in images.train:
            optimizer.zero_grad()
            cross_entropy(whole(inputs.to(device, non_blocking=True)), labels.to(device, non_blocking=True)).backward()
            if regularizer is not None:
                regularizer.accumulate_grad_()
            optimizer.step()
            schedule.step()
            after()


def _device(model):
    return next(model.parameters()).device


@torch.no_grad()
def estimate_norms(model, images, batches=20):
    """Batch norms as the weights now are."""
    model.train()
    for inputs, _ in _first(images.train, batches):
        model(inputs.to(_device(model)))


@torch.no_grad()
def accuracy(model, loader):
    """Of all processes together. (Where their number does not divide the pictures, a few count twice.)"""
    device, counts = _device(model), torch.zeros(2, dtype=torch.float64)
    model.eval()
    for inputs, labels in loader:
        hits = (model(inputs.to(device)).argmax(1) == labels.to(device)).sum()
        counts += torch.tensor([hits.item(), len(labels)], dtype=torch.float64)
    if distributed.is_initialized():
        counts = counts.to(device)
        distributed.all_reduce(counts)
    return (counts[0] / counts[1]).item()


@contextlib.contextmanager
def processes(device):
    """The process group of a run under torchrun, and the device of this process."""
    if not distributed.is_torchelastic_launched():
        yield device
        return
    local = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()
