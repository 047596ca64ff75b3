"""The one table of ops and inputs that tests and benchmarks read."""

from typing import Any, NamedTuple

import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Op(NamedTuple):
    """A public function with its arguments; `parameter` is the differentiable one, given in units of 1/std (alpha) or std (M) of the weights."""

    label: str
    function: str
    parameter: str | None = None
    value: float | None = None
    options: dict[str, Any] = {}
    columns: bool = True  # takes cluster_dim

    def arguments(self, scale):
        """The keyword arguments for weights of standard deviation `scale`."""
        if self.parameter is None:
            return dict(self.options)
        return {self.parameter: self.value / scale if self.parameter == "alpha" else self.value * scale, **self.options}


OPS = (
    Op("l_inf", "l_inf"),
    Op("margin", "margin", "M", 1.5),
    Op("margin-fraction", "margin", "M", -2.0, {"k": 0.01}),
    Op("soft_min_max", "soft_min_max", "alpha", 2.0),
    Op("soft_min_max-sharp", "soft_min_max", "alpha", 20.0),
    Op("soft_min_max-flat", "soft_min_max", "alpha", 0.0),
    Op("soft_min_max-negative", "soft_min_max", "alpha", -1.0),
    Op("soft_extrema", "soft_extrema", "alpha", 4.0),
    Op("soft_extrema-negative", "soft_extrema", "alpha", -4.0),
    Op("kure", "kure", columns=False),
)
BY_LABEL = {op.label: op for op in OPS}
SCALE = 0.05  # of the inputs below


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
    return [_like(maker(g), dtype, device) for maker in INPUTS[name]]


def _like(w, dtype, device):
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
