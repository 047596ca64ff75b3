"""GPU kernels for training models that quantize and compress well: the R2 range losses, fused. See README.md."""

from . import integrations, reference
from .backends import backends, use_backend
from .files import coreml
from .files.loading import load_palettized, load_ranges
from .files.saving import save_palettized, save_quantized
from .functional import (
    WeightStats,
    assign,
    bin_reg,
    dkm,
    dorefa,
    ewgs,
    kmeans,
    kure,
    l_inf,
    lsq,
    margin,
    msqe,
    pact,
    partial_l2,
    soft_extrema,
    soft_min_max,
    weight_stats,
    weight_terms,
)
from .nn import LearnableCoefficient, Palettizer, Quantizer, RangeRegularizer, allocate, calibrate, export, sensitivity
from .version import __version__

__all__ = [
    "LearnableCoefficient",
    "Palettizer",
    "Quantizer",
    "RangeRegularizer",
    "WeightStats",
    "__version__",
    "allocate",
    "assign",
    "backends",
    "bin_reg",
    "calibrate",
    "coreml",
    "dkm",
    "dorefa",
    "ewgs",
    "export",
    "integrations",
    "kmeans",
    "kure",
    "l_inf",
    "load_palettized",
    "load_ranges",
    "lsq",
    "margin",
    "msqe",
    "pact",
    "partial_l2",
    "reference",
    "save_palettized",
    "save_quantized",
    "sensitivity",
    "soft_extrema",
    "soft_min_max",
    "use_backend",
    "weight_stats",
    "weight_terms",
]
