"""The range losses: what a user calls.

`W` is a floating-point tensor (float64, float32, bfloat16, float16; any shape and strides), giving a 0-dim loss, or a
sequence of L of them with one dtype and device, giving an (L,) loss from one fused pass over all. Losses are float32
(float64 for float64 W); gradients have the dtype of what they belong to. Nothing is read back to the host. With
create_graph=True a first derivative is part of the graph; RuntimeError where a second one would go through the loss,
and inside of vmap, grad and the other transforms of torch.func.

A tensor of a sequence may be empty, as the local shards of a sharded model are: a range of no numbers is 0, so the
loss is 0, |M| or exp(-alpha) for each column, both soft extrema are 0, and the gradient is empty.

DTensors, sharded over any mesh, give the loss of the whole weight, plain and with the same bits on all ranks, for one
message forward and none backward; gradients are sharded as the weights. ValueError for Partial placements, and where a
row of `cluster_dim` numbers would lie on two shards. All ranks call.

Parameters are a number, a 0-dim tensor, for a sequence also an (L,) tensor or a sequence of numbers. `cluster_dim=d`
reads W as rows of d (`layout="output"`: `W.transpose(0, -1).reshape(-1, d)`, d consecutive output channels;
`"contiguous"`: `W.reshape(-1, d)`), takes the loss of each of the d columns and sums; a parameter may then be (d,),
or (L, d) for a sequence. The numel mod d leftovers are ignored.

Every function raises TypeError or ValueError, naming the argument, for a wrong type, dtype, device mix, shape or
value. The values of tensors are never read: an invalid one gives NaN.
"""

from torch import Tensor

from .. import ops
from ..reference import parameters
from .differentiable import weights
from .loss import Call, Loss, learnable


def l_inf(W, *, cluster_dim=1, layout="output") -> Tensor:
    """max|W| (R2 eq. 1). It moves only one weight of a layer in each step.

    dL/dW = sign(W) / ties where |W| is the maximum (split evenly, as `torch.amax` does), 0 elsewhere.
    """
    ws, single = weights("l_inf", W, cluster_dim, layout)
    columns = cluster_dim, layout
    return Loss.apply(ops.l_inf, Call(single, columns, columns, *columns), 0, None, *ws)


def margin(W, M, *, k=1, cluster_dim=1, layout="output") -> Tensor:
    """|M| + (1/k) sum relu(|W| - |M|) (R2 eq. 2; k = 1 is the paper's sum). Differentiable in W and M.

    k: an int >= 1, or a fraction in (0, 1), then k times the number of weights in a column, unrounded. Minimised over M
    it is the mean of the k largest |W|, so k decides what the loss does: 1 is L-infinity, all weights is L1 (M then
    collapses to 0), 0.01 the mean of the top 1 %, a good start.
    dL/dW = sign(W) [|W| > |M|] / k; dL/dM = sign(M) (1 - #{|W| > |M|} / k). Keep M out of weight decay.
    """
    ws, single = weights("margin", W, cluster_dim, layout)
    k = parameters.margin_k(k, ws, single, cluster_dim)
    learned, fixed = learnable("M", M, ws, single, cluster_dim)
    columns = cluster_dim, layout
    call = Call(single, columns, columns, *columns)
    return Loss.apply(ops.margin, call, len(fixed) + 1, learned, *fixed, k, *ws)


def soft_min_max(W, alpha, *, cluster_dim=1, layout="output") -> Tensor:
    """s_max - s_min + exp(-alpha) (R2 eq. 3), with s_max = sum p W, s_min = sum q W, p = softmax(alpha W) and
    q = softmax(-alpha W).

    Differentiable in W and alpha; any sign of alpha. alpha -> infinity gives the range max(W) - min(W), alpha -> 0
    gives 1 + 2 alpha Var(W).
    dL/dW = p (1 + alpha (W - s_max)) - q (1 - alpha (W - s_min)); dL/dalpha = Var_p(W) + Var_q(W) - exp(-alpha).
    A learned alpha settles where Var_p + Var_q = exp(-alpha), usually between 2 and 8: for layers of small weights that
    is nearly no softmax, and `RangeRegularizer(alpha_unit="std", alpha=8, learn=False)` is a good start. Keep alpha out
    of weight decay. Leaving alpha without gradient is cheaper.
    """
    ws, single = weights("soft_min_max", W, cluster_dim, layout)
    learned, fixed = learnable("alpha", alpha, ws, single, cluster_dim)
    call = _soft_call(single, learned, cluster_dim, layout)
    return Loss.apply(ops.soft_min_max, call, len(fixed), learned, *fixed, *ws)


def soft_extrema(W, alpha, *, cluster_dim=1, layout="output") -> tuple[Tensor, Tensor]:
    """(s_min, s_max) of `soft_min_max`, differentiable in W and alpha; with cluster_dim > 1 per column: (d,), or (L,
    d) for a sequence."""
    ws, single = weights("soft_extrema", W, cluster_dim, layout)
    learned, fixed = learnable("alpha", alpha, ws, single, cluster_dim)
    call = _soft_call(single, learned, cluster_dim, layout, planes=True)
    return Loss.apply(ops.soft_extrema, call, len(fixed), learned, *fixed, *ws).unbind(0)


def _soft_call(single, learned, d, layout, planes=False):
    alpha_grad = learned is not None and learned.requires_grad
    return Call(single, (alpha_grad, d, layout), (d, layout), d, layout, planes)
