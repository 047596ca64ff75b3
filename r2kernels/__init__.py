"""GPU kernels for training models that quantize and compress well: the R2 range losses, fused. See README.md."""
from . import reference
from .backends import backends, use_backend
from .clustering import assign, dkm
from .functional import WeightStats, kure, l_inf, margin, soft_extrema, soft_min_max, weight_stats
from .io import load_palettized, save_palettized
from .kmeans import kmeans
from .nn import Palettizer, RangeRegularizer
from .version import __version__

__all__ = [
    "Palettizer", "RangeRegularizer", "WeightStats", "__version__", "assign", "backends", "dkm", "kmeans", "kure", "l_inf",
    "load_palettized", "margin", "reference", "save_palettized", "soft_extrema", "soft_min_max", "use_backend", "weight_stats",
]
