"""DKM, differentiable k-means (Cho et al. 2022, arXiv 2108.12659): `DKM` has the passes over the weights that every
backend has, and the public functions.

One iteration with centroids c: D_ij = dist(w_i, c_j), a_ij = softmax_j(-D_ij / tau), S_j = sum_i a_ij, c'_j = sum_i
a_ij w_i / S_j; where S_j = 0, c'_j = c_j without gradient. Rows w_i have d numbers. Arrays of centroids are (L, K,
d), filled up with zeros where tensor t has fewer than K; for d = 1 they are sorted. Slope: dD/dw = -dD/dc, which is 0
where w = c.
"""

import functools
import warnings

import torch

from . import checks, parameters, precision
from .columns import columns, from_columns
from .zeros import zeros_of


def unit(c):
    """A power of two, which these centroids are about 1 if multiplied by: then squares neither overflow nor vanish.

    1 for centroids of a usual size, beside which the smallest of weights keep their digits, and in a graph that is
    exported: ONNX has no exponents.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return torch.ones((), dtype=c.dtype, device=c.device)
    largest = c.detach().abs().amax()
    exponent = torch.where(largest.isfinite(), torch.frexp(largest).exponent, 0).clamp(-100, 100)
    exponent = torch.where(exponent.abs() > 24, exponent, 0)
    return torch.ldexp(torch.ones_like(largest), -exponent)


def distance(x, c, metric):
    """(N, K) distances between the rows of x (N, d) and c (K, d)."""
    if x.shape[1] == 1:
        difference = x - c.t()
        return difference.abs() if metric == "euclidean" else difference.square()
    if metric == "euclidean":
        scale = unit(c)
        return torch.cdist(x * scale, c * scale, compute_mode="donot_use_mm_for_euclid_dist") / scale
    return (x[:, None] - c).square().sum(-1)


def attention(x, c, tau, metric):
    """(N, K): a_ij."""
    return torch.softmax(distance(x, c, metric) / -torch.where(tau > 0, tau, torch.nan), 1)


def sums(a, x):
    """(K, d): sum_i a_ij x_i; not as a product of matrices, whose derivative autocast and TF32 would take."""
    return (a[..., None] * x[:, None]).sum(0)


def averages(a, c):
    """(N, d): sum_j a_ij c_j; as `sums`."""
    return (a[..., None] * c).sum(1)


def iterate(x, c, tau, metric, sums=sums):
    """(attention, S, new centroids) of one iteration."""
    a = attention(x, c, tau, metric)
    S = a.sum(0)
    empty = (S == 0)[:, None]
    return a, S, torch.where(empty, c.detach(), sums(a, x) / torch.where(empty, 1, S[:, None]))


def pinned(new, c):
    """The new centroids of an iteration from c, where those that are 0 stay 0, and for scalars none crosses 0."""
    stopped = new.sign() != c.sign() if c.shape[1] == 1 else (c == 0).all(1, keepdim=True)
    return new.masked_fill(stopped & (new == new), 0)


def slope(x, c, metric):
    """(N, K, d): dD/dw."""
    difference = x[:, None] - c
    if metric == "sqeuclidean":
        return 2 * difference
    if x.shape[1] == 1:
        return difference.sign()
    difference = difference * unit(c)
    D = difference.square().sum(-1, keepdim=True).sqrt()
    return difference / torch.where(D == 0, 1, D)


def _in_full_precision(one_pass):
    @functools.wraps(one_pass)
    def run(passes, *args):
        with precision.full(passes.weights[0].device):
            return one_pass(passes, *args)

    return run


class DKM:
    """The passes over a list of weights; `weights` as the ops take them, tau (L,), clusters the number of centroids
    of each tensor."""

    def __init__(self, weights, tau, clusters, metric, d, layout):
        self.weights, self.tau, self.clusters, self.metric, self.geometry = weights, tau, clusters, metric, (d, layout)
        self.signed = metric == "euclidean" and d == 1

    def _rows(self, tensors):
        """(index, rows, K) of each tensor"""
        return [
            (i, columns(w, *self.geometry).t(), k) for i, (w, k) in enumerate(zip(tensors, self.clusters, strict=True))
        ]

    def _each(self, c):
        """(index, rows, centroids (K, d), tau, unit) of each tensor: lengths times a unit, so that their products are
        numbers whatever the scale of the weights"""
        for i, x, k in self._rows(self.weights):
            u = unit(c[i, :k])
            yield i, x * u, c[i, :k] * u, self.tau[i] * u * (1 if self.metric == "euclidean" else u), u

    def _padded(self, rows, like):
        """(L, K, ...) from the numbers of each tensor's centroids."""
        most = like.shape[1]
        return torch.stack([torch.cat([r, r.new_zeros(most - r.shape[0], *r.shape[1:])]) for r in rows])

    @_in_full_precision
    def update(self, c):
        """(new centroids, moments): S_j, and for scalars in the Euclidean metric sum_i sign(w_i - c_j) a_ij {1, w_i -
        c'_j}. (L, K, 3) or (L, K, 1)."""
        fresh, moments = [], []
        for _, x, ct, tau, u in self._each(c):
            a, S, new = iterate(x, ct, tau, self.metric, lambda a, x: a.t() @ x)
            fresh.append(new / u)
            columns_ = [S]
            if self.signed:
                signed = a * (x - ct.t()).sign()
                columns_ += [signed.sum(0), (signed * (x - new.t())).sum(0) / u]
            moments.append(torch.stack(columns_, 1))
        return self._padded(fresh, c), self._padded(moments, c)

    @_in_full_precision
    def output(self, c, new):
        """W_hat = attention to c, applied to `new`; leftovers as they were."""
        outputs = []
        for i, x, ct, tau, _ in self._each(c):
            y = attention(x, ct, tau, self.metric) @ new[i, : ct.shape[0]]
            outputs.append(self._with_leftovers(y, self.weights[i], self.weights[i]))
        return outputs

    def _with_leftovers(self, rows, w, leftovers):
        """A tensor like w made of `rows`; past them, the numbers that `leftovers` has there."""
        out = from_columns(rows.t(), w, *self.geometry)
        if w.numel() % self.geometry[0] == 0:
            return out
        used = from_columns(torch.ones_like(rows.t()), w, *self.geometry) != 0
        return torch.where(used, out, leftovers)

    @_in_full_precision
    def upstream(self, c, grads):
        """u_j = sum_i a_ij g_i for the gradients g of W_hat."""
        us = []
        for (_, x, ct, tau, _), (_, g, _) in zip(self._each(c), self._rows(grads), strict=True):
            us.append(attention(x, ct, tau, self.metric).t() @ g)
        return self._padded(us, c)

    def _pull(self, x, ct, tau, new, u, S, g):
        """(attention, v, Q, slope) of the backward of an iteration; g is None but in the last one, where W_hat
        depends on the attention as well."""
        a, s = attention(x, ct, tau, self.metric), slope(x, ct, self.metric)
        v = torch.where(S[:, None] == 0, 0, u / torch.where(S[:, None] == 0, 1, S[:, None]))
        P = x @ v.t() - (new * v).sum(1)
        if g is not None:
            P = P + g @ new.t()
        return a, v, a * (P - (a * P).sum(1, keepdim=True)), s

    def _pulls(self, c, new, u, moments, grads):
        gs = [None] * len(self.weights) if grads is None else [g for _, g, _ in self._rows(grads)]
        for i, x, ct, tau, scale in self._each(c):
            k = ct.shape[0]
            yield i, x, tau, self._pull(x, ct, tau, new[i, :k] * scale, u[i, :k], moments[i, :k, 0], gs[i])

    @_in_full_precision
    def recur(self, c, new, u, moments, grads=None):
        """dL/dc from u = dL/dnew; with `grads`, of the last iteration, for which `upstream(c, grads)` was called
        before."""
        return self._padded(
            [
                torch.einsum("nk,nkd->kd", Q, s) / tau
                for _, _, tau, (_, _, Q, s) in self._pulls(c, new, u, moments, grads)
            ],
            c,
        )

    @_in_full_precision
    def gradient(self, steps, grads):
        """dL/dW, summed over steps (c, new, u, moments, last)."""
        total = [0] * len(self.weights)
        for c, new, u, moments, last in steps:
            for i, _, tau, (a, v, Q, s) in self._pulls(c, new, u, moments, grads if last else None):
                total[i] = total[i] + a @ v - torch.einsum("nk,nkd->nd", Q, s) / tau
        return [self._with_leftovers(rows, w, g) for rows, w, g in zip(total, self.weights, grads, strict=True)]

    @_in_full_precision
    def jacobian(self, c, new, moments):
        """(L, K, K) float64: dnew_j / dc_l, for scalars in the Euclidean metric (`signed`)."""
        blocks = c.new_zeros(c.shape[0], c.shape[1], c.shape[1], dtype=torch.float64)
        for i, x, ct, tau, u in self._each(c):
            k = ct.shape[0]
            a, s = attention(x, ct, tau, self.metric), slope(x, ct, self.metric)[..., 0]
            pull = a * (x - new[i, :k].t() * u)
            S = moments[i, :k, :1]
            J = (torch.diag((pull * s).sum(0)) - pull.t() @ (a * s)) / torch.where(S == 0, 1, S) / tau
            blocks[i, :k, :k] = torch.where(S == 0, 0, J)
        return blocks


def assign_fwd(weights, centroids, clusters, d, layout):
    """Codes (N,) of each tensor: uint8 up to 256 clusters, int32 above. A NaN is as far as infinity."""
    codes = []
    for i, w in enumerate(weights):
        x, c = columns(w, d, layout).t(), centroids[i, : clusters[i]]
        x, c = x * unit(c), c * unit(c)
        step = max(2**24 // clusters[i], 1)
        best = torch.cat(
            [
                distance(rows, c, "euclidean" if d == 1 else "sqeuclidean").nan_to_num(torch.inf, torch.inf).argmin(1)
                for rows in x.split(step)
            ]
        )
        codes.append(best.to(torch.uint8 if clusters[i] <= 256 else torch.int32))
    return codes


def spacing(centroids, squared=False):
    """(G,) mean distance of a centroid of (G, K, d) to the nearest other one, or its square; 1 where all are equal."""
    if centroids.shape[1] == 1:
        return torch.ones_like(centroids[:, 0, 0])
    if centroids.shape[2] == 1:
        gaps = centroids[..., 0].sort(1).values.diff(dim=1)
        nearest = torch.minimum(torch.cat([gaps[:, :1], gaps], 1), torch.cat([gaps, gaps[:, -1:]], 1))
    else:  # of differences: cdist's product of matrices errs by more than small distances
        D = torch.cdist(centroids, centroids, compute_mode="donot_use_mm_for_euclid_dist")
        itself = torch.eye(D.shape[-1], dtype=torch.bool, device=D.device)
        nearest = D.masked_fill(itself, torch.inf).amin(-1)
    mean = nearest.mean(-1)
    mean = torch.where((mean > 0) & mean.isfinite(), mean, 1)
    return mean.square() if squared else mean


def settled(old, new, squared):
    """(the centroids that a step of training ends with, their `spacing` in float64, whether those of a group are the
    new ones): the old ones where a new one is NaN or infinite. (G, K, d), in the dtype of the old ones."""
    sound = new.isfinite().flatten(1).all(1)
    c = torch.where(sound[:, None, None], new, old.to(new.dtype)).to(old.dtype)
    return c, spacing(c.double(), squared), sound


def assign(W, centroids, *, cluster_dim=1, layout="output"):
    ws, single = checks.weights(W, cluster_dim, layout)
    centroids, clusters = checks.centroids(centroids, ws, single, cluster_dim)
    codes = assign_fwd(ws, parameters.padded(centroids, cluster_dim), clusters, cluster_dim, layout)
    return codes[0] if single else codes


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
    ws, single = checks.weights(W, cluster_dim, layout)
    centroids, clusters = checks.centroids(centroids, ws, single, cluster_dim)
    tau = parameters.temperature(tau, ws, single)
    checks.dkm_options(iterations, metric, gradient, tol, max_passes)
    checks.preserved(preserve_zeros, iterations, gradient)
    outputs, fresh = [], []
    for i, (w, c0) in enumerate(zip(ws, centroids, strict=True)):
        zeros = zeros_of(w.detach(), cluster_dim, layout) if preserve_zeros else None
        w = w.masked_fill(zeros, 0) if preserve_zeros else w  # no gradient through the centroids either
        x, c = columns(w, cluster_dim, layout).t(), parameters.finite_or_nan(c0.reshape(1, -1, cluster_dim))[0]
        repeats = iterations
        if iterations == "converge":
            c_star, passes = _settled(x.detach(), c.detach(), tau[i], metric, tol, max_passes)
            repeats, c = (passes, c) if gradient == "unrolled" else (1, c_star)
        last = _differentiable_start(x, c, tau[i], repeats, metric, gradient, preserve_zeros)
        a, _, c = iterate(x, last, tau[i], metric)
        c = pinned(c, last) if preserve_zeros else c
        hat = DKM([w], tau, clusters, metric, cluster_dim, layout)._with_leftovers(averages(a, c), w, w)
        outputs.append(hat.masked_fill(zeros, 0) if preserve_zeros else hat)
        fresh.append(c.reshape(c0.shape))
    return (outputs[0], fresh[0]) if single else (outputs, fresh)


@torch.no_grad()
def _settled(x, c, tau, metric, tol, max_passes):
    """(c with |F(c) - c| <= tol, passes over x that it took), by plain iterations; a warning after `max_passes`."""
    limit = parameters.tolerance(tol, [x])[0]
    for passes in range(1, max_passes + 1):
        new = iterate(x, c, tau, metric)[2]
        residual = (new - c).abs().amax()
        if not residual > limit:
            return c, passes
        c = new
    warnings.warn(
        f"r2kernels.reference.dkm did not converge in max_passes={max_passes}: |F(C) - C| is {residual.item():.2g}, "
        f"allowed is {limit.item():.2g}",
        stacklevel=4,
    )
    return c, max_passes


def _differentiable_start(x, c, tau, iterations, metric, gradient, preserve_zeros):
    """The centroids that the last iteration starts from, with the dependence on W and c that `gradient` grants them."""
    for _ in range(iterations - 1):
        new = iterate(x, c, tau, metric)[2]
        c = pinned(new, c) if preserve_zeros else new
    if gradient == "unrolled":
        return c
    c = c.detach()
    if gradient == "last" or not x.requires_grad:
        return c
    J = torch.autograd.functional.jacobian(lambda c: iterate(x.detach(), c, tau, metric)[2], c)
    J = J.reshape(c.numel(), c.numel()).double()
    moved = iterate(x, c, tau, metric)[2]
    adjoint = (torch.eye(c.numel(), dtype=J.dtype, device=J.device) - J).t()
    moved.register_hook(lambda u: torch.linalg.solve(adjoint, u.double().reshape(-1)).reshape(u.shape).to(u))
    return c + (moved - moved.detach())
