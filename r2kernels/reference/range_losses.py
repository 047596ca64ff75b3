"""The range losses: `<op>_fwd` and `<op>_bwd` as every backend has them, and the public functions.

Equations: R2 (arXiv 2303.08253), eqs. 1-3. Rows x of a weight are (d, N): column c of `cluster_dim` in row c, leftovers
dropped. In `<op>_fwd(weights, ...) -> (loss, saved)` and `<op>_bwd(grad, weights,
..., saved, ...)` the parameters are (L, d) tensors of the accumulator's dtype; `saved` is (L, d, numbers per column).
No branch depends on a value.
"""

import torch

from . import checks, parameters
from .columns import columns, from_columns


def _each(weights, d, layout):
    return enumerate(columns(w, d, layout) for w in weights)


def _gradients(weights, d, layout, formula):
    return [from_columns(formula(i, columns(w, d, layout)), w, d, layout) for i, w in enumerate(weights)]


def ratio(k, n):
    """The divisor of the margin's sum: k itself, or k times the n rows where k is a fraction; NaN where k is not
    positive."""
    return torch.where(k > 0, torch.where(k < 1, k * n, k), torch.nan)


def _ratio(k, n):
    """Of no rows the sum is 0, whatever divides it."""
    return ratio(k, max(n, 1))


def _top(x):
    """max|x| of each row; 0 of an empty one."""
    return x.abs().amax(1) if x.shape[1] else x.sum(1)


# saved: max|x|, how many attain it
def l_inf_fwd(weights, d=1, layout="output"):
    saved = []
    for _, x in _each(weights, d, layout):
        top = _top(x)
        saved.append(torch.stack([top, (x.abs() == top[:, None]).sum(1).to(x.dtype)], 1))
    saved = torch.stack(saved)
    return l_inf_loss(saved), saved


def l_inf_loss(saved):
    return saved[..., 0].sum(1)


def l_inf_bwd(grad, weights, saved, d=1, layout="output"):
    def formula(i, x):
        top, ties = saved[i].unbind(1)
        return torch.where(x.abs() == top[:, None], x.sign(), 0) * (grad[i] / ties)[:, None]

    return _gradients(weights, d, layout, formula)


# saved: how many lie outside the margin
def margin_fwd(weights, M, k, d=1, layout="output"):
    loss, saved = [], []
    for i, x in _each(weights, d, layout):
        m = M[i].abs()
        loss.append((m + (x.abs() - m[:, None]).relu().sum(1) / _ratio(k[i], x.shape[1])).sum())
        saved.append((x.abs() > m[:, None]).sum(1, keepdim=True).to(x.dtype))
    return torch.stack(loss), torch.stack(saved)


def margin_bwd(grad, weights, M, k, saved, d=1, layout="output"):
    rows = torch.stack([_ratio(k[i], w.numel() // d) for i, w in enumerate(weights)])

    def formula(i, x):
        return torch.where(x.abs() > M[i].abs()[:, None], x.sign(), 0) * (grad[i] / rows[i])[:, None]

    return _gradients(weights, d, layout, formula), margin_learned(grad, M, rows, saved)


def margin_learned(grad, M, rows, saved):
    """The gradient of M; rows: what divides the sum."""
    sign = torch.where(M.isnan(), M, M.sign())  # torch.sign(NaN) is 0
    return grad[:, None] * sign * (1 - saved[..., 0] / rows)


# saved: for p = softmax(alpha x), then for q = softmax(-alpha x): a shift near the extreme, 1 / sum of exponentials
# relative to it, the soft extreme minus the shift, the standard deviation (which a backend may leave out where
# alpha_grad is False)
def _soft_extremes(weights, alpha, d, layout):
    saved = []
    for i, x in _each(weights, d, layout):
        if x.shape[1] == 0:  # no range
            saved.append(x.new_zeros(d, 8))
            continue
        a = alpha[i]
        high, low = torch.where(a >= 0, x.amax(1), x.amin(1)), torch.where(a >= 0, x.amin(1), x.amax(1))
        sides, reach = [], x.amax(1) - x.amin(1)
        unit = torch.where(reach == 0, 1, reach)  # squares of deviations need not be numbers
        for sign, shift in ((a, high), (-a, low)):
            delta = x - shift[:, None]
            e = (sign[:, None] * delta).exp()
            total = e.sum(1)
            mean = (delta * e).sum(1) / total
            away = (delta - mean[:, None]) / unit[:, None]
            sides += [shift, 1 / total, mean, unit * ((away.square() * e).sum(1) / total).sqrt()]
        saved.append(torch.stack(sides, 1))
    return torch.stack(saved)


def _soft_gradients(g_max, g_min, weights, alpha, saved, d, layout):
    def formula(i, x):
        a = alpha[i, :, None]
        top, rp, up, _, bottom, rq, uq, _ = saved[i, :, :, None].unbind(1)
        p, q = (a * (x - top)).exp() * rp, (-a * (x - bottom)).exp() * rq
        return g_max[i, :, None] * p * (1 + a * (x - top - up)) + g_min[i, :, None] * q * (1 - a * (x - bottom - uq))

    return _gradients(weights, d, layout, formula)


def _soft_learned(g_max, g_min, saved):
    of_p, of_q = saved[..., 3].double(), saved[..., 7].double()  # whose squares float32 may not have
    return (g_max * of_p * of_p - g_min * of_q * of_q).to(saved)


def soft_min_max_fwd(weights, alpha, alpha_grad=True, d=1, layout="output"):
    saved = _soft_extremes(weights, alpha, d, layout)
    return soft_min_max_loss(saved, alpha), saved


def soft_min_max_loss(saved, alpha):
    return ((saved[..., 0] - saved[..., 4]) + (saved[..., 2] - saved[..., 6]) + (-alpha).exp()).sum(1)


def soft_min_max_bwd(grad, weights, alpha, saved, d=1, layout="output"):
    g = grad[:, None].expand_as(alpha)
    gradients = _soft_gradients(g, -g, weights, alpha, saved, d, layout)
    return gradients, soft_min_max_learned(grad, alpha, saved)


def soft_min_max_learned(grad, alpha, saved):
    """The gradient of alpha."""
    g = grad[:, None].expand_as(alpha)
    return _soft_learned(g, -g, saved) - g * (-alpha).exp()


# loss: (2, L, d), the soft minima and the soft maxima
def soft_extrema_fwd(weights, alpha, alpha_grad=True, d=1, layout="output"):
    saved = _soft_extremes(weights, alpha, d, layout)
    return soft_extrema_loss(saved), saved


def soft_extrema_loss(saved):
    return torch.stack([saved[..., 4] + saved[..., 6], saved[..., 0] + saved[..., 2]])


def soft_extrema_bwd(grad, weights, alpha, saved, d=1, layout="output"):
    gradients = _soft_gradients(grad[1], grad[0], weights, alpha, saved, d, layout)
    return gradients, soft_extrema_learned(grad, saved)


def soft_extrema_learned(grad, saved):
    """The gradient of alpha."""
    return _soft_learned(grad[1], grad[0], saved)


def _stack(losses, single):
    return losses[0] if single else torch.stack(losses)


def l_inf(W, *, cluster_dim=1, layout="output"):
    ws, single = checks.weights(W, cluster_dim, layout)
    return _stack([_top(columns(w, cluster_dim, layout)).sum() for w in ws], single)


def margin(W, M, *, k=1, cluster_dim=1, layout="output"):
    ws, single = checks.weights(W, cluster_dim, layout)
    k = parameters.margin_k(k, ws, single, cluster_dim)
    M = parameters.parameter("M", M, len(ws), single, cluster_dim, ws[0])
    losses = []
    for i, x in _each(ws, cluster_dim, layout):
        m = M[i].abs()
        losses.append((m + (x.abs() - m[:, None]).relu().sum(1) / _ratio(k[i], x.shape[1])).sum())
    return _stack(losses, single)


def soft_extrema(W, alpha, *, cluster_dim=1, layout="output"):
    ws, single = checks.weights(W, cluster_dim, layout)
    alpha = parameters.parameter("alpha", alpha, len(ws), single, cluster_dim, ws[0])
    low, high = [], []
    for i, x in _each(ws, cluster_dim, layout):
        z = alpha[i, :, None] * x
        high.append((z.softmax(1) * x).sum(1))
        low.append(((-z).softmax(1) * x).sum(1))
    low, high = _stack(low, single), _stack(high, single)
    return (low, high) if cluster_dim > 1 else (low.squeeze(-1), high.squeeze(-1))


def soft_min_max(W, alpha, *, cluster_dim=1, layout="output"):
    ws, single = checks.weights(W, cluster_dim, layout)
    alpha = parameters.parameter("alpha", alpha, len(ws), single, cluster_dim, ws[0])
    losses = []
    for i, x in _each(ws, cluster_dim, layout):
        z = alpha[i, :, None] * x
        losses.append((((z.softmax(1) - (-z).softmax(1)) * x).sum(1) + (-alpha[i]).exp()).sum())
    return _stack(losses, single)
