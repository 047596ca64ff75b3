"""The specification, in plain eager PyTorch: every op as `<op>_fwd` and `<op>_bwd`, and the public functions, usable on their own."""
from .columns import columns, from_columns
from .range import (
    kure,
    kure_bwd,
    kure_fwd,
    l_inf,
    l_inf_bwd,
    l_inf_fwd,
    margin,
    margin_bwd,
    margin_fwd,
    soft_extrema,
    soft_extrema_bwd,
    soft_extrema_fwd,
    soft_min_max,
    soft_min_max_bwd,
    soft_min_max_fwd,
    weight_stats,
    weight_stats_fwd,
)

__all__ = [
    "columns", "from_columns", "kure", "kure_bwd", "kure_fwd", "l_inf", "l_inf_bwd", "l_inf_fwd", "margin", "margin_bwd", "margin_fwd",
    "soft_extrema", "soft_extrema_bwd", "soft_extrema_fwd", "soft_min_max", "soft_min_max_bwd", "soft_min_max_fwd", "weight_stats", "weight_stats_fwd",
]
