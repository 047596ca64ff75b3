"""The op contract: one table of what every backend has, a row for each op.

The op `margin_fwd` is the function of that name in reference/, and the method of that name of every backend's
launchers; `ops.py` registers it as `torch.ops.r2kernels.margin_fwd`. Lists of tensors have one dtype and device; the
empty ones among them never come to a backend (empty.py). Losses, parameters and what is saved have the accumulator's
dtype; gradients and quantized tensors have the dtype of the weights and are laid out as `lists.empty_gradients` has
them.

Losses: `<op>_fwd(weights, parameters..., options..., d, layout) -> (loss, saved)`, loss (L,), saved (L, d, numbers),
parameters (L, d); `<op>_bwd(grad, weights, parameters..., saved, options..., d, layout)` gives the gradients of the
weights, and of the learned parameter. The kernels behind it also take `out=`, a list of tensors that the gradients are
added to. Those without d and layout read a weight as one column.

Quantizers: `<op>_fwd(xs, parameters..., options...) -> ys` and `<op>_bwd(gs, xs, parameters..., options...)`;
parameters are flat, one number for each tensor or channel; told in reference/quantizers.py. `sized`: the sizes among
them, step, upper - lower, alpha and scale, are used as |p| + FLOOR; without they are NaN where they are not positive.

DKM: `dkm_fwd`, `dkm_bwd` and `dkm_solve` run algorithms/ over the passes of a backend, its `DKM`. Centroids are (L,
K, d), filled up with zeros where tensor t has fewer, clusters[t], than K; for d = 1 sorted, except for `assign_fwd`.
"""

from typing import NamedTuple

from .reference.checks import TERMS, tensors_of_term
from .reference.columns import accumulator
from .reference.parameters import levels
from .reference.quantizers import FLOOR

__all__ = [
    "BY_NAME",
    "FLOOR",
    "OPS",
    "RADIX",
    "STATISTICS",
    "TERMS",
    "Op",
    "accumulator",
    "levels",
    "numbers_saved",
    "tensors_of_term",
]


class Op(NamedTuple):
    name: str
    forward: str  # schema of <name>_fwd
    backward: str | None = None
    saved: int | None = 0  # numbers that a loss saves for each column; None: 2 2^bits
    learned: int = 0  # of its parameters the first so many have a gradient
    scatters: bool = False  # sums by cluster, or counts by code or digit

    @property
    def parameters(self):
        """How many tensors of parameters follow the weights."""
        return self.forward.count("Tensor ")

    @property
    def columns(self):
        """Whether a weight is read as the columns of rows of d."""
        return "str layout" in self.forward

    @property
    def soft(self):
        """Whether the forward can leave out what the gradient of alpha needs."""
        return "bool alpha_grad" in self.forward

    @property
    def gives_tensors(self):
        """Whether the forward gives tensors like those it takes."""
        return self.forward.endswith("-> Tensor[]") and self.backward is not None


L_INF = Op(
    "l_inf",
    "(Tensor[] weights, int d, str layout) -> (Tensor, Tensor)",
    "(Tensor grad, Tensor[] weights, Tensor saved, int d, str layout) -> Tensor[]",
    saved=2,
)
MARGIN = Op(
    "margin",
    "(Tensor[] weights, Tensor M, Tensor k, int d, str layout) -> (Tensor, Tensor)",
    "(Tensor grad, Tensor[] weights, Tensor M, Tensor k, Tensor saved, int d, str layout) -> (Tensor[], Tensor)",
    saved=1,
    learned=1,
)
SOFT_MIN_MAX = Op(
    "soft_min_max",
    "(Tensor[] weights, Tensor alpha, bool alpha_grad, int d, str layout) -> (Tensor, Tensor)",
    "(Tensor grad, Tensor[] weights, Tensor alpha, Tensor saved, int d, str layout) -> (Tensor[], Tensor)",
    saved=8,
    learned=1,
)
# The loss is (2, L, d): the soft minima and the soft maxima of every column.
SOFT_EXTREMA = Op("soft_extrema", SOFT_MIN_MAX.forward, SOFT_MIN_MAX.backward, saved=8, learned=1)
KURE = Op(
    "kure",
    "(Tensor[] weights, Tensor target) -> (Tensor, Tensor)",
    "(Tensor grad, Tensor[] weights, Tensor target, Tensor saved) -> Tensor[]",
    saved=4,
)
# (L, STATISTICS): min, max, mean, unbiased std, kurtosis, max|w|, skew, of which `WeightStats` has all but the last
WEIGHT_STATS = Op("weight_stats", "(Tensor[] weights) -> Tensor")
STATISTICS = 7
# (L,): the std of a sample of each weight, told in reference/sample.py
SAMPLED_STD = Op("sampled_std", "(Tensor[] weights) -> Tensor")
BIN_REG = Op(
    "bin_reg",
    "(Tensor[] weights, Tensor step, int bits) -> (Tensor, Tensor)",
    "(Tensor grad, Tensor[] weights, Tensor step, Tensor saved, int bits) -> Tensor[]",
    saved=None,
    scatters=True,
)
MSQE = Op(
    "msqe",
    "(Tensor[] weights, Tensor step, int bits) -> (Tensor, Tensor)",
    "(Tensor grad, Tensor[] weights, Tensor step, Tensor saved, int bits) -> (Tensor[], Tensor)",
    saved=1,
    learned=1,
)
PARTIAL_L2 = Op(
    "partial_l2",
    "(Tensor[] weights, Tensor rank) -> (Tensor, Tensor)",
    "(Tensor grad, Tensor[] weights, Tensor rank, Tensor saved) -> Tensor[]",
    saved=1,
    scatters=True,
)
# (L, RADIX) int64: of each weight how many |w| have each value of the digit `place`, of those whose digits before it
# are `prefix`, (L,) int64; no matter what that is for place 0. |w| is the unsigned integer that its bits are in the
# dtype of the weights, and so in the order of the numbers, with NaN last; its digits are the bytes of that from the
# highest on, of which there are dtype.itemsize. Sums of these tables over shards are those of the whole.
DIGITS = Op("digits", "(Tensor[] weights, Tensor prefix, int place) -> Tensor", scatters=True)
RADIX = 256
# Several losses from one read; bits are 0 and flags False for those without; flags: alpha_grad.
WEIGHT_TERMS = Op(
    "terms",
    "(Tensor[] weights, str[] names, Tensor[] parameters, int[] bits, bool[] flags) -> (Tensor[], Tensor[])",
    "(Tensor[] grads, Tensor[] weights, str[] names, Tensor[] parameters, int[] bits, bool[] flags, Tensor[] saved) "
    "-> (Tensor[], Tensor[])",
)
LSQ = Op(
    "lsq",
    "(Tensor[] xs, Tensor step, int bits, bool signed, int? axis, str levels, bool sized=False) -> Tensor[]",
    "(Tensor[] gs, Tensor[] xs, Tensor step, int bits, bool signed, int? axis, str levels, bool sized=False) "
    "-> (Tensor[], Tensor)",
    learned=1,
)
EWGS = Op(
    "ewgs",
    "(Tensor[] xs, Tensor lower, Tensor upper, Tensor delta, int bits, bool signed, bool sized=False) -> Tensor[]",
    "(Tensor[] gs, Tensor[] xs, Tensor lower, Tensor upper, Tensor delta, int bits, bool signed, bool sized=False) "
    "-> (Tensor[], Tensor, Tensor)",
    learned=2,
)
PACT = Op(
    "pact",
    "(Tensor[] xs, Tensor alpha, int bits, bool plus, bool sized=False) -> Tensor[]",
    "(Tensor[] gs, Tensor[] xs, Tensor alpha, int bits, bool plus, bool sized=False) -> (Tensor[], Tensor)",
    learned=1,
)
DOREFA = Op(
    "dorefa",
    "(Tensor[] xs, Tensor scale, int bits, bool detach_max) -> Tensor[]",
    "(Tensor[] gs, Tensor[] xs, Tensor scale, int bits, bool detach_max) -> Tensor[]",
)
RESCALE = Op(
    "rescale",
    "(Tensor[] xs, Tensor scale, bool sized=False) -> Tensor[]",
    "(Tensor[] gs, Tensor[] xs, Tensor scale, bool sized=False) -> (Tensor[], Tensor)",
    learned=1,
)
_PROBLEM = "Tensor tau, int[] clusters, str metric, int d, str layout"
DKM = Op(
    "dkm",
    f"(Tensor[] weights, Tensor centroids, int iterations, bool pinned, {_PROBLEM}) -> (Tensor[], Tensor, Tensor)",
    "(Tensor? grad_centroids, Tensor[] weights, Tensor[] grads, Tensor history, Tensor moments, str gradient, "
    f"bool centroid_grad, bool pinned, {_PROBLEM}) -> (Tensor[], Tensor)",
    scatters=True,
)
DKM_SOLVE = (
    "(Tensor[] weights, Tensor centroids, Tensor tol, int max_passes, bool accelerated, "
    f"{_PROBLEM}) -> (Tensor, Tensor)"
)
ASSIGN = Op(
    "assign", "(Tensor[] weights, Tensor centroids, int[] clusters, int d, str layout) -> Tensor[]", scatters=True
)

OPS = (
    L_INF,
    MARGIN,
    SOFT_MIN_MAX,
    SOFT_EXTREMA,
    KURE,
    WEIGHT_STATS,
    SAMPLED_STD,
    BIN_REG,
    MSQE,
    PARTIAL_L2,
    DIGITS,
    WEIGHT_TERMS,
    LSQ,
    EWGS,
    PACT,
    DOREFA,
    RESCALE,
    DKM,
    ASSIGN,
)
BY_NAME = {op.name: op for op in OPS}


def numbers_saved(name, bits):
    """How many numbers the loss of this name saves for each column."""
    fixed = BY_NAME[name].saved
    return 2 * 2**bits if fixed is None else fixed
