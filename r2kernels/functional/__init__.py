"""What a user calls, a file for each family: documented, checked, differentiable, over the ops."""

from .dkm import assign, dkm
from .kmeans import kmeans
from .quantizers import dorefa, ewgs, lsq, pact
from .range_losses import l_inf, margin, soft_extrema, soft_min_max
from .regularizers import WeightStats, bin_reg, kure, msqe, partial_l2, weight_stats, weight_terms

__all__ = [
    "WeightStats",
    "assign",
    "bin_reg",
    "dkm",
    "dorefa",
    "ewgs",
    "kmeans",
    "kure",
    "l_inf",
    "lsq",
    "margin",
    "msqe",
    "pact",
    "partial_l2",
    "soft_extrema",
    "soft_min_max",
    "weight_stats",
    "weight_terms",
]
