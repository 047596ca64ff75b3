"""DKM and hard assignment: what a user calls.

`W` is a floating-point tensor (float64, float32, bfloat16, float16; any shape and strides), or a sequence of L of
them with one dtype and device, all in the same batched passes. `cluster_dim=d` reads W as rows of d
(`layout="output"`: `W.transpose(0, -1).reshape(-1, d)`, d consecutive output channels; `"contiguous"`: `W.reshape(-1,
d)`). Centroids are float32 (float64 for float64 W): (K,) for d = 1, else (K, d); for a sequence one such tensor for
each, not all of the same K.

DTensors, sharded over any mesh, give a W_hat with their placements and centroids that are plain and the same bits on
all ranks; every pass over the weights takes one message of some numbers for each centroid. All ranks call.
"""

import torch

from .. import ops
from ..reference import checks, parameters
from ..reference.zeros import zeros_of
from ..sharding.dkm import tolerance
from ..sharding.shards import mapped, with_zeros
from . import differentiable


class _DifferentiableKMeans(torch.autograd.Function):
    """W_hat and centroids of a list. Inputs: options, geometry, tau (L,), then L centroids as the user gave them and
    L weights."""

    @staticmethod
    def forward(ctx, *inputs):
        iterations, metric, gradient, pinned, clusters, tol, max_passes, d, layout, tau, *rest = inputs
        count = len(clusters)
        given, weights = rest[:count], rest[count:]
        centroids, order = parameters.finite_or_nan(parameters.padded(given, d)), None
        if d == 1:
            centroids, order = _sorted(centroids, clusters)
        start = centroids
        problem = tau, clusters, metric, d, layout
        if iterations == "converge":
            start, passes = ops.dkm_solve(weights, start, tol, max_passes, gradient != "unrolled", *problem)
            iterations = max(int(passes), 1) if gradient == "unrolled" else 1
            if gradient == "unrolled":
                start = centroids
        hats, history, moments = ops.dkm.fwd(weights, start, iterations, pinned, *problem)
        ctx.save_for_backward(tau, history, moments, order, *weights)
        ctx.call = clusters, metric, gradient, pinned, d, layout
        ctx.shapes = [c.shape for c in given]
        ctx.backend = ops.backend_of_forward()
        ctx.set_materialize_grads(False)
        ctx.function = "dkm"
        return *hats, *_restored(history[-1], order, ctx.shapes)

    @staticmethod
    @differentiable.once
    def backward(ctx, tensors, *grads):
        tau, history, moments, order, *weights = tensors
        clusters, metric, gradient, pinned, d, layout = ctx.call
        count = len(weights)
        gs = with_zeros(grads[:count], weights, d, layout)
        upstream = _upstream(grads[count:], order, ctx.shapes, history[-1])
        needed, problem = ctx.needs_input_grad[10:], (tau, clusters, metric, d, layout)
        args = upstream, weights, gs, history, moments, gradient, any(needed[:count]), pinned, *problem
        of_weights, first = ops.backward(ctx.backend, ops.dkm.bwd, *args)
        learned = gradient == "unrolled" and any(needed[:count])
        centroid_gradients = _restored(first, order, ctx.shapes) if learned else [None] * count
        gradients = [*centroid_gradients, *of_weights]
        return *[None] * 10, *[g if need else None for g, need in zip(gradients, needed, strict=True)]


def _sorted(c, clusters):
    """(centroids in rising order within each tensor, the order); what fills up stays behind."""
    if min(clusters) == c.shape[1]:
        return c.sort(dim=1, stable=True)
    order = torch.where(parameters.are_centroids(clusters, c.device), c, torch.inf).argsort(dim=1, stable=True)
    return c.gather(1, order), order


def _restored(c, order, shapes):
    """The (L, K, d) numbers of centroids as one tensor for each, in the caller's order and shape; views of one copy."""
    c = c.clone() if order is None else torch.empty_like(c).scatter_(1, order, c)
    return [c[i, : shape[0]].view(shape) for i, shape in enumerate(shapes)]


def _upstream(grads, order, shapes, like):
    """The gradients of the centroids, of which those that are None are 0, as the passes have them: (L, K, d), or None
    for none at all."""
    if not any([g is not None for g in grads]):
        return None
    zero = None if all([g is not None for g in grads]) else like.new_zeros(())
    grads = [zero.expand(shape) if g is None else g for g, shape in zip(grads, shapes, strict=True)]
    upstream = parameters.padded(grads, like.shape[2])
    return upstream if order is None else upstream.gather(1, order)


def dkm(
    W,
    centroids,
    tau,
    *,
    iterations=5,
    metric="euclidean",
    gradient="unrolled",
    cluster_dim=1,
    layout="output",
    tol=None,
    max_passes=100,
    preserve_zeros=False,
):
    """(W_hat, centroids) of differentiable k-means (Cho et al. 2022, DKM, arXiv 2108.12659); for a sequence two lists.

    One iteration: a_ij = softmax_j(-D_ij / tau), c'_j = sum_i a_ij w_i / sum_i a_ij, with D_ij = ||w_i - c_j||
    ("euclidean", the paper's) or ||w_i - c_j||^2 ("sqeuclidean", coremltools'; tau then has the units of W^2). After T
    iterations W_hat = A_T C_T with A_T the attention to C_(T-1). W_hat has the shape, strides and dtype of W; centroids
    come back in the caller's order. A centroid that no weight attends to (sum 0 in this precision) stays where it is,
    without gradient; so do all those of an empty tensor of a sequence. For the numel mod d leftovers W_hat is W. A
    centroid that is infinite or NaN makes all results of its tensor NaN.

    Weights may have any scale that tau has too: float32 holds a "sqeuclidean" tau, the square of theirs, of weights
    between 1e-18 and 1e18. (On a GPU scalars in the "euclidean" metric have no unit of their own: at 1e30 a centroid to
    which weights attend with less than 1e-8 in all moves to infinity or NaN.)

    Nothing of size N x K is stored; saved for backward are W and O(T K) numbers. With d = 1 and "euclidean" the time
    does not grow with K: with sorted centroids and w between c_k and c_(k+1), exp(-|w - c_j| / tau) =
    exp(-(w - c_k) / tau) exp(-(c_k - c_j) / tau) for every centroid on the left, likewise on the right, so the sums
    over one side are K + 1 numbers per pass, and a weight needs one exponential and its interval. Sums over weights are
    collected by interval, then turned into sums by centroid. That is exact, backward too. "sqeuclidean" costs K
    exponentials per weight; for 16-bit weights both metrics work on the at most 65,536 values that occur.

    tau: a number > 0, a 0-dim tensor, for a sequence also (L,) or a sequence of numbers; no gradient. A tenth of the
    distance of neighbouring centroids (squared for "sqeuclidean") is a good start; a quarter leaves W_hat far from the
    hard weights, a fiftieth hardly moves codes.
    iterations: an int >= 1, or "converge": until |F(C) - C| <= tol (default 1e-6 of the range of each tensor), by
    Newton (d = 1, "euclidean"; from `kmeans` typically 3 to 10 passes for K <= 16, where plain iterations take
    hundreds) or Anderson's acceleration, which may end at another fixed point than plain iterations; with
    gradient="unrolled" by plain iterations, all differentiated, which torch.compile(fullgraph=True) refuses. It reads
    values on the host; a warning after max_passes.
    gradient: "unrolled" through all iterations; "last" through the last one only; "implicit" that of the fixed point,
    (I - J)^T lambda = u, exact where the iteration has converged, in memory and time that do not depend on the
    iterations. The last two give `centroids` no gradient.
    preserve_zeros: zeros of W (for cluster_dim=d: rows of d zeros) are zeros of W_hat, without gradient. Centroids that
    are 0 stay exactly 0 in every iteration, without gradient, and for d = 1 none crosses 0; of `kmeans` with the same
    option one is 0. Not for "converge" and "implicit".

    TypeError or ValueError names the argument that is wrong. NaN in W, or an invalid value in a tensor, gives NaN. More
    clusters than rows: a warning. A second derivative through it raises RuntimeError.
    """
    ws, single = differentiable.weights("dkm", W, cluster_dim, layout)
    given, clusters = checks.centroids(centroids, ws, single, cluster_dim)
    tau = parameters.temperature(tau, ws, single)
    checks.dkm_options(iterations, metric, gradient, tol, max_passes)
    checks.preserved(preserve_zeros, iterations, gradient)
    if torch.compiler.is_compiling() and (iterations, gradient) == ("converge", "unrolled"):
        raise RuntimeError(
            'dkm(iterations="converge", gradient="unrolled") runs as many iterations as the values ask for, which no '
            'compiled graph can hold; give gradient="last" or "implicit", or a number of iterations'
        )
    zeros = [mapped(lambda x: zeros_of(x, cluster_dim, layout), w) for w in ws] if preserve_zeros else None
    if preserve_zeros:  # so that these get no gradient through the centroids either
        ws = [w.masked_fill(z, 0) for w, z in zip(ws, zeros, strict=True)]
    limit = tolerance(tol, [w.detach() for w in ws]) if iterations == "converge" else None
    results = _DifferentiableKMeans.apply(
        iterations, metric, gradient, preserve_zeros, clusters, limit, max_passes, cluster_dim, layout, tau, *given, *ws
    )
    outputs, fresh = list(results[: len(ws)]), list(results[len(ws) :])
    if preserve_zeros:
        outputs = [hat.masked_fill(z, 0) for hat, z in zip(outputs, zeros, strict=True)]
    return (outputs[0], fresh[0]) if single else (outputs, fresh)


def assign(W, centroids, *, cluster_dim=1, layout="output"):
    """Codes of the nearest centroid (Euclidean distance) of each row: (numel // d,), uint8 up to 256 clusters, int32
    above; for a sequence a list.

    Rows are in the order of `layout`. Ties take the lower index; what is infinitely far away, or NaN, is never nearest,
    and a row that has no other takes 0. No gradient. Nothing of size N x K is stored. Of a DTensor the codes are those
    of the shard here, in the order of its rows.
    """
    ws, single = differentiable.weights("assign", W, cluster_dim, layout)
    given, clusters = checks.centroids(centroids, ws, single, cluster_dim)
    with torch.no_grad():
        codes = ops.assign.fwd(ws, parameters.padded(given, cluster_dim), clusters, cluster_dim, layout)
    return codes[0] if single else codes
