"""What keeps zeros of a weight 0 where it is clustered."""

import torch

from .columns import columns, from_columns

# times the weight of all other rows: the centroid nearest to 0 ends within a millionth of the others from it, and sums
# in float64 keep ten digits
ANCHOR = 2.0**20


def zeros_of(w, d=1, layout="output"):
    """Where w is 0 and, for rows of d, with it all of its row; leftovers are in no row."""
    if d == 1:
        return w == 0
    rows = (columns(w, d, layout) == 0).all(0)
    return from_columns(rows.expand(d, -1).to(w.dtype), w, d, layout) != 0


def anchored(rows, mass):
    """(rows (N, d), their weights) in which those of zeros are one that is so heavy that a centroid must be there."""
    used = (rows != 0).any(1)
    mass = rows.new_ones(len(rows), dtype=torch.float64) if mass is None else mass
    rows, mass = rows[used], mass[used]
    total = mass.sum()
    heavy = torch.where(total > 0, ANCHOR * total, 1)
    return torch.cat([rows.new_zeros(1, rows.shape[1]), rows]), torch.cat([heavy[None], mass])


def with_zero(c):
    """Centroids (..., K, d) of which the one nearest to 0 is put there; NaN stays NaN."""
    at = c.abs().amax(-1, keepdim=True).argmin(-2, keepdim=True)
    return c.scatter(-2, at.expand_as(c[..., :1, :]), 0 * c.gather(-2, at.expand_as(c[..., :1, :])))
