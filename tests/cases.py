"""The one table of ops and inputs that tests and benchmarks read: whatever runs over all ops runs over these rows."""

import math
from typing import Any, NamedTuple

import torch

from r2kernels.reference.parameters import levels

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SCALE = 0.05  # the standard deviation of the inputs below

# what a parameter is measured in, of numbers with this standard deviation
UNITS = {
    "1": lambda std, bits, signed: 1.0,
    "std": lambda std, bits, signed: std,
    "std^2": lambda std, bits, signed: std**2,
    "1/std": lambda std, bits, signed: 1 / std,
    "std/codes": lambda std, bits, signed: std / 2**bits,
    "std/largest code": lambda std, bits, signed: std / (levels(bits, signed)[1] + 0.5),
}


class Parameter(NamedTuple):
    name: str
    value: float
    unit: str = "std"
    learned: bool = True


class Op(NamedTuple):
    """A public function, what it takes beside the weights and, where that has a gradient, in which place."""

    label: str
    function: str
    family: str
    parameters: tuple[Parameter, ...] = ()
    options: dict[str, Any] = {}
    columns: bool = False  # takes cluster_dim

    @property
    def parameter(self):
        """The name of the differentiable one of a loss."""
        return next((p.name for p in self.parameters if p.learned), None)

    @property
    def value(self):
        """Of the first, in its unit."""
        return self.parameters[0].value

    def natural(self, scale, bits=0, signed=True):
        """name -> its size for numbers of standard deviation `scale`."""
        return {p.name: p.value * UNITS[p.unit](scale, bits, signed) for p in self.parameters}

    def arguments(self, scale):
        """The keyword arguments for weights of standard deviation `scale`."""
        return {**self.natural(scale, self.options.get("bits", 0)), **self.options}


CODES = {"bits": 4}
# of the rows of a function the first is the one that most tests take
OPS = (
    Op("l_inf", "l_inf", "range_losses", columns=True),
    Op("margin-fraction", "margin", "range_losses", (Parameter("M", -2.0),), {"k": 0.01}, columns=True),
    Op("margin", "margin", "range_losses", (Parameter("M", 1.5),), columns=True),
    Op("soft_min_max", "soft_min_max", "range_losses", (Parameter("alpha", 2.0, "1/std"),), columns=True),
    Op("soft_min_max-sharp", "soft_min_max", "range_losses", (Parameter("alpha", 20.0, "1/std"),), columns=True),
    Op("soft_min_max-flat", "soft_min_max", "range_losses", (Parameter("alpha", 0.0, "1/std"),), columns=True),
    Op("soft_min_max-negative", "soft_min_max", "range_losses", (Parameter("alpha", -1.0, "1/std"),), columns=True),
    Op("soft_extrema-negative", "soft_extrema", "range_losses", (Parameter("alpha", -4.0, "1/std"),), columns=True),
    Op("soft_extrema", "soft_extrema", "range_losses", (Parameter("alpha", 4.0, "1/std"),), columns=True),
    Op("kure", "kure", "regularizers"),
    Op("bin_reg", "bin_reg", "regularizers", (Parameter("step", 3.0, "std/codes", learned=False),), CODES),
    Op("msqe", "msqe", "regularizers", (Parameter("step", 3.0, "std/codes"),), CODES),
    Op("partial_l2", "partial_l2", "regularizers", (Parameter("fraction", 0.8, "1", learned=False),)),
    Op("lsq", "lsq", "quantizers", (Parameter("step", 2.5, "std/largest code"),), CODES),
    Op(
        "ewgs",
        "ewgs",
        "quantizers",
        (Parameter("lower", -1.5), Parameter("upper", 1.8), Parameter("delta", 0.1, "1", learned=False)),
        CODES,
    ),
    Op("pact", "pact", "quantizers", (Parameter("alpha", 1.5),), CODES),
    Op("dorefa", "dorefa", "quantizers", (), CODES),
    Op("dkm", "dkm", "dkm", (Parameter("tau", 0.3, learned=False),), {"metric": "euclidean"}),
    Op("dkm-squares", "dkm", "dkm", (Parameter("tau", 0.3, "std^2", learned=False),), {"metric": "sqeuclidean"}),
    Op("assign", "assign", "dkm"),
)
BY_LABEL = {op.label: op for op in OPS}

SPECIALS = {
    "nan": [math.nan],
    "inf": [math.inf],
    "-inf": [-math.inf],
    "both": [math.inf, -math.inf],
    "nan and inf": [math.nan, math.inf],
}


def of(*families):
    """Their rows."""
    return [op for op in OPS if op.family in families]


LOSSES = of("range_losses", "regularizers")  # one number, or two, for each tensor
ONE_EACH = [next(op for op in LOSSES if op.function == name) for name in dict.fromkeys(op.function for op in LOSSES)]


def _normal(*shape):
    return lambda g: torch.randn(shape, generator=g, dtype=torch.float64) * SCALE


def _outliers(*shape):
    def make(g):
        w = torch.randn(shape, generator=g, dtype=torch.float64) * SCALE
        flat = w.view(-1)
        flat[:: max(flat.numel() // 5, 1)] *= 10
        return w

    return make


def _ties(*shape):
    return lambda g: (torch.randn(shape, generator=g, dtype=torch.float64) * 2).round() * SCALE


def _shifted(*shape):
    return lambda g: 3 + torch.randn(shape, generator=g, dtype=torch.float64) * SCALE


# name -> makers of the tensors of a list; a list of one is also given as a single tensor
INPUTS = {
    "one element": [_normal(1)],
    "two elements": [_normal(2)],
    "below a vector": [_normal(7)],
    "a chunk and one": [_normal(4097)],
    "several chunks": [_normal(37, 311, 3)],
    "outliers": [_outliers(64, 33, 3, 3)],
    "ties": [_ties(48, 65)],
    "far from zero": [_shifted(40, 129)],
    "constant": [lambda g: torch.full((33, 17), 0.1, dtype=torch.float64)],
    "zero": [lambda g: torch.zeros(19, 5, dtype=torch.float64)],
    "scalar": [lambda g: torch.randn((), generator=g, dtype=torch.float64)],
    "channels last": [lambda g: _normal(16, 8, 5, 5)(g).contiguous(memory_format=torch.channels_last)],
    "transposed": [lambda g: _normal(31, 66)(g).t()],
    "every second": [lambda g: _normal(64, 50)(g)[:, ::2]],
    "expanded": [lambda g: _normal(64, 1)(g).expand(64, 9)],
    "unaligned": [lambda g: _normal(5000)(g)[1:]],
    "mixed list": [
        _normal(3),
        _outliers(64, 3, 7, 7),
        _ties(1000),
        _normal(1),
        _normal(5000),
        lambda g: _normal(12, 40)(g).t(),
        _normal(128, 64, 1, 1),
    ],
}


def make(name, dtype=torch.float64, device="cpu", seed=0):
    """The tensors of an input, with their strides."""
    g = torch.Generator().manual_seed(seed)
    return [like(maker(g), dtype, device) for maker in INPUTS[name]]


def like(w, dtype, device):
    """w in another dtype, with the same strides and storage offset."""
    base = torch.zeros(w.untyped_storage().nbytes() // w.element_size(), dtype=dtype, device=device)
    base.copy_(torch.as_strided(w, base.shape, (1,), 0))
    return torch.as_strided(base, w.shape, w.stride(), w.storage_offset())


def resnet18():
    """The 21 conv and fc weights of ResNet-18: 11.7M."""
    shapes = [(64, 3, 7, 7)] + [(64, 64, 3, 3)] * 4
    for i, o in ((64, 128), (128, 256), (256, 512)):
        shapes += [(o, i, 3, 3), (o, o, 3, 3), (o, i, 1, 1), (o, o, 3, 3), (o, o, 3, 3)]
    return [*shapes, (1000, 512)]


def mobilenet_v2():
    """The 53 conv and fc weights of MobileNet-V2: 3.5M."""
    shapes, channels = [(32, 3, 3, 3)], 32
    for expand, out, repeat in ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)):
        for _ in range(repeat):
            hidden = channels * expand
            shapes += [(hidden, channels, 1, 1)] * (expand > 1) + [(hidden, 1, 3, 3), (out, hidden, 1, 1)]
            channels = out
    return [*shapes, (1280, 320, 1, 1), (1000, 1280)]


def llama_block():
    """The 7 linear weights of one Llama-7B block: 202M."""
    return [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


MODELS = {
    "one tensor 11.7M": lambda: [(11_678_912,)],
    "ResNet-18": resnet18,
    "MobileNet-V2": mobilenet_v2,
    "Llama-7B block": llama_block,
    "1,000 x 1,000": lambda: [(1000,)] * 1000,
    "one tensor 10k": lambda: [(10_000,)],
}


def model_weights(name, dtype=torch.float32, device="cpu", seed=0):
    """Weights of a model's shapes, drawn with the usual 1/sqrt(fan-in) scale."""
    g = torch.Generator(device).manual_seed(seed)
    fan_in = [torch.Size(s[1:]).numel() if len(s) > 1 else 400 for s in MODELS[name]()]
    return [
        torch.randn(s, generator=g, device=device).mul_(n**-0.5).to(dtype)
        for s, n in zip(MODELS[name](), fan_in, strict=True)
    ]
