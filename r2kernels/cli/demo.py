"""What the range losses are for, in minutes on a CPU.

A small MobileNet-V1 is trained on scikit-learn's digits without and with them, then rounded or clustered. The images
are 1,797 real 8x8 digits, 1,200 of them to train. Rounding is the simplest there is (per-tensor min-max, first and last
layer included, no fine-tuning; batch norms re-estimated), so that what is left of the accuracy shows what the range of
the weights is worth. Clustering is DKM, all layers, with a few epochs of training: the shape of the paper's tables 3
and 4. `demo_results` prints and draws what came of it.
"""

import contextlib
import copy
import statistics
import time
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from .. import Palettizer, RangeRegularizer
from ..backends import serving

BITS = (32, 4, 3, 2)
TRAIN, BATCH = 1200, 120
LEARNING_RATE = 0.2
TIMED_CALLS = 100
HOST = {"device": "cpu", "dtype": torch.float32}  # where networks are drawn, whatever the defaults
PALETTES = ((1, 1), (2, 1), (4, 1), (2, 2), (4, 4))  # (bits of a code, weights that share it)
PALETTE_EPOCHS, PALETTE_LEARNING_RATE = 3, 0.05


class Case(NamedTuple):
    """A way to train. `learning_rate` is that of the loss's own parameter (alpha or M)."""

    name: str
    options: dict | None
    learning_rate: float = 0.0


CASES = (
    Case("no R2", None),
    Case("L-infinity", dict(loss="l_inf", weight=0.01)),
    Case("margin, top 1 %", dict(loss="margin", weight=0.1, k=0.01), learning_rate=0.02),
    Case("soft-min-max, alpha 8/std", dict(loss="soft_min_max", weight=0.03, alpha=8.0, alpha_unit="std", learn=False)),
    Case("soft-min-max, alpha learned", dict(loss="soft_min_max", weight=0.01, alpha=0.1), learning_rate=LEARNING_RATE),
)


class Trained(NamedTuple):
    """One training.

    Per layer the range and std of its weights, bits -> accuracy on the test images, and alpha or M at the end (a list
    or None).
    """

    ranges: list
    stds: list
    accuracy: dict
    parameter: list | None


class ClusteredModel(NamedTuple):
    """A model after DKM: accuracy on hard weights, and bytes of all clustered weights.

    Packed, with an ideal entropy code, and dense.
    """

    accuracy: float
    packed: int
    coded: int
    dense: int


class Speed(NamedTuple):
    """Median milliseconds of one forward and backward pass of the loss over all weights.

    And how far apart the gradients of the two ways are.
    """

    fused: float
    eager: float
    difference: float


class DemoResult(NamedTuple):
    """What every case came to.

    trained: case -> a `Trained` for each seed. Of the first seed, clustered: case -> a `ClusteredModel` for each of
    PALETTES; speed: case -> `Speed`; weights: case -> weights, in the order of `layers`.
    """

    layers: list
    trained: dict
    clustered: dict
    speed: dict
    weights: dict
    setting: dict


def steps(seeds, epochs):
    """How often `run` will advance."""
    return len(CASES) * (seeds * epochs + len(PALETTES) * PALETTE_EPOCHS) * (TRAIN // BATCH)


def run(seeds=1, epochs=40, device=None, advance=lambda steps: None):
    """Trains every case with every seed and measures the regularizers.

    The global random state and thread count are left as they were. Calls `advance` after every training step.
    """
    device = torch.device(device or default_device())
    start = time.perf_counter()
    images, labels = load_images(device)
    trained, clustered, speed, weights = {case.name: [] for case in CASES}, {}, {}, {}
    with _one_thread(), torch.random.fork_rng():
        for case in CASES:
            for seed in range(seeds):
                model, regularizer, split = train(case, seed, epochs, images, labels, advance)
                if seed == 0:
                    weights[case.name] = [w.detach().cpu().clone() for w in weight_matrices(model).values()]
                    if regularizer:
                        speed[case.name] = _speed(regularizer, model)
                    clustered[case.name] = [
                        _cluster(model, *palette, split, images, labels, advance) for palette in PALETTES
                    ]
                trained[case.name].append(measure(model, regularizer, split, images, labels))
    setting = {"seeds": seeds, "epochs": epochs, "device": _device_name(device), "backend": serving(device)}
    setting["seconds"] = time.perf_counter() - start
    return DemoResult(list(weight_matrices(model)), trained, clustered, speed, weights, setting)


def default_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_images(device):
    """(images from -0.3 to 0.7, labels)"""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=device)[:, None] / 16 - 0.3
    return images, torch.tensor(digits.target, device=device)


def network():
    """MobileNet-V1's blocks, 32-64-64-128-128 channels."""
    return nn.Sequential(
        OrderedDict(
            stem=_convolution(1, 32, 3),
            block1=_separable(32, 64, 1),
            block2=_separable(64, 64, 2),
            block3=_separable(64, 128, 1),
            block4=_separable(128, 128, 2),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(128, 10, **HOST),
        )
    )


def _separable(inputs, outputs, stride):
    depthwise, pointwise = _convolution(inputs, inputs, 3, stride, inputs), _convolution(inputs, outputs, 1)
    return nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=pointwise))


def _convolution(inputs, outputs, size, stride=1, groups=1):
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False, **HOST)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs, **HOST), relu=nn.ReLU()))


def weight_matrices(model):
    """layer name -> weight, the layers that the regularizer takes."""
    return {
        name.removesuffix(".conv"): module.weight
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }


def train(case, seed, epochs, images, labels, advance):
    """(model, its regularizer or None, (training indices, test indices))."""
    torch.manual_seed(seed)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed), device="cpu")
    split = order.split([TRAIN, len(images) - TRAIN])
    model = network().to(images.device)
    groups = [{"params": list(model.parameters())}]
    regularizer = RangeRegularizer(model, **case.options) if case.options else None
    groups += regularizer.param_groups() if regularizer else []
    optimizer = torch.optim.SGD(groups, LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [LEARNING_RATE, case.learning_rate][: len(groups)], total_steps=epochs * (TRAIN // BATCH)
    )
    for _ in range(epochs):
        for batch in split[0][torch.randperm(TRAIN, device="cpu")].split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            if regularizer:
                regularizer.accumulate_grad_()
            optimizer.step()
            schedule.step()
            advance(1)
    return model, regularizer, split


@torch.no_grad()
def measure(model, regularizer, split, images, labels):
    """The figures of a trained model, whose weights are left rounded to the fewest bits."""
    weights = list(weight_matrices(model).values())
    originals = [w.clone() for w in weights]
    accuracy = {}
    for bits in BITS:
        if bits < 32:
            for w, original in zip(weights, originals, strict=True):
                w.copy_(round_min_max(original, bits))
            _estimate_norms(model, images[split[0]])
        accuracy[bits] = _accuracy(model, images[split[1]], labels[split[1]])
    parameter = next((p.tolist() for p in regularizer.parameters()), None) if regularizer else None
    ranges, stds = [(w.max() - w.min()).item() for w in originals], [w.std().item() for w in originals]
    return Trained(ranges, stds, accuracy, parameter)


@torch.no_grad()
def _accuracy(model, images, labels):
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def _cluster(model, bits, cluster_dim, split, images, labels, advance):
    """A copy of the model trained on with all its weights clustered, then on hard codes."""
    torch.manual_seed(0)
    model = copy.deepcopy(model).train()
    palettizer = Palettizer(model, bits, cluster_dim=cluster_dim)
    optimizer = torch.optim.SGD(model.parameters(), PALETTE_LEARNING_RATE, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PALETTE_EPOCHS * (TRAIN // BATCH))
    for _ in range(PALETTE_EPOCHS):
        for batch in split[0][torch.randperm(TRAIN, device="cpu")].split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            palettizer.step()
            schedule.step()
            advance(1)
    sizes = palettizer.sizes().values()
    palettizer.remove()
    with torch.no_grad():
        _estimate_norms(model, images[split[0]])
    total = [sum(getattr(size, field) for size in sizes) for field in ("packed", "coded", "dense")]
    return ClusteredModel(_accuracy(model, images[split[1]], labels[split[1]]), *total)


def round_min_max(w, bits):
    """w rounded to 2^bits equally spaced values from min(w) to max(w)."""
    low, high = w.aminmax()
    step = (high - low) / (2**bits - 1)
    return ((w - low) / step).round() * step + low


def _estimate_norms(model, images):
    """Gives the batch norms the statistics of the model as it is now."""
    model.train()
    for _ in range(5):
        model(images)


def eager_loss(regularizer, weights):
    """The regularizer's loss as plain PyTorch has it: one layer after the other, differentiated by autograd."""
    if regularizer.loss == "l_inf":
        return sum(w.abs().amax() for w in weights)
    if regularizer.loss == "margin":
        return sum(
            m.abs() + (w.abs() - m.abs()).relu().sum() / (regularizer.k * w.numel())
            for w, m in zip(weights, regularizer.M, strict=True)
        )
    std = regularizer.alpha_unit == "std"
    return sum(
        _eager_soft_min_max(w, a / w.detach().std() if std else a) + (-a).exp()
        for w, a in zip(weights, regularizer.alpha, strict=True)
    )


def _eager_soft_min_max(w, alpha):
    w = w.flatten()
    return (torch.softmax(alpha * w, 0) * w).sum() - (torch.softmax(-alpha * w, 0) * w).sum()


def _speed(regularizer, model):
    """Both ways on the trained model; RuntimeError where their gradients differ."""
    weights = list(weight_matrices(model).values())

    def eager():
        (regularizer.weight * eager_loss(regularizer, weights)).backward()

    gradients = [_gradient(model, regularizer, way) for way in (regularizer.accumulate_grad_, eager)]
    difference = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    if not difference < 1e-3:
        raise RuntimeError(
            f"{regularizer.loss}: the fused gradient differs from the eager one by {difference:.2g} of its norm"
        )
    device = weights[0].device
    return Speed(_median(regularizer.accumulate_grad_, device), _median(eager, device), difference)


def _gradient(model, regularizer, way):
    """The gradient of the weights and of alpha or M, in one vector."""
    parameters = [*weight_matrices(model).values(), *regularizer.parameters()]
    for p in parameters:
        p.grad = None
    way()
    return torch.cat([p.grad.flatten() for p in parameters])


def _median(call, device):
    """Median milliseconds of a call."""
    seconds = []
    for _ in range(TIMED_CALLS):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


@contextlib.contextmanager
def _one_thread():
    """More gain little on a network of this size, and lose much where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, 1 thread"
