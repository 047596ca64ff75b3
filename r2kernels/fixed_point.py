"""The fixed point C* = F(C*, W) of DKM's iteration, and the gradient through it.

Scalars in the Euclidean metric: Newton on F(C) - C, whose Jacobian a pass gives besides F; else Anderson's acceleration, which needs F alone. Both fall back on
the plain step wherever theirs does not help. Gradient: (I - J)^T lambda = u.
"""
import warnings

import torch

MEMORY = 8              # differences that Anderson's acceleration keeps
MOST_KRYLOV = 64        # products with the Jacobian in the adjoint solution


def solve(passes_of, centroids, tol, max_passes, accelerated=True):
    """(C*, passes over W): until |F(C) - C| <= tol (L,) for every tensor. `passes_of(indices)` gives the passes over some of the tensors."""
    c, residual = centroids.clone(), tol.new_full(tol.shape, torch.inf)
    state = {}
    active = list(range(len(c)))
    count = 0
    while active and count < max_passes:
        count += 1
        passes = passes_of(active)
        now = c[active]
        new, moments = passes.update(now)
        r = (new - now).double()
        size = r.abs().flatten(1).amax(1)
        residual[active] = size.to(residual)
        step = r
        if accelerated:
            step = (_newton if passes.signed else _anderson)(passes, active, now, new, moments, r, size, state)
        done = ~(size > tol[active])
        c[active] = torch.where(done[:, None, None], now, (now.double() + step).to(c.dtype))
        active = [i for i, finished in zip(active, done.tolist(), strict=True) if not finished]
    if active:
        worst = ", ".join(f"{i}: {residual[i].item():.2g} > {tol[i].item():.2g}" for i in active[:4])
        warnings.warn(f"r2kernels.dkm: {len(active)} of {len(c)} tensors did not converge in max_passes={max_passes} (index: largest |F(C) - C|: {worst}); "
                      "their centroids, and an implicit gradient, are those of the last point", stacklevel=2)
    return c, torch.tensor(count)


def _guarded(active, now, step, r, size, state):
    """`step` where it keeps the order and the residual has not grown since the best one; else the plain step r."""
    best, sizes = state.setdefault("best", {}), dict(zip(active, size.tolist(), strict=True))
    near = torch.tensor([s < 1.5 * best.get(i, torch.inf) for i, s in sizes.items()], device=r.device)
    good = torch.isfinite(step).flatten(1).all(1) & near
    for i, s in sizes.items():
        best[i] = min(best.get(i, torch.inf), s)
    return torch.where(good[:, None, None], step, r)


def _newton(passes, active, now, new, moments, r, size, state):
    J = passes.jacobian(now, new, moments)
    eye = torch.eye(J.shape[1], dtype=J.dtype, device=J.device)
    step = torch.linalg.solve_ex(eye - J, r[..., 0])[0][..., None]
    moved = now.double() + step
    real = torch.arange(J.shape[1], device=J.device) < torch.tensor(passes.clusters, device=J.device)[:, None]
    spread = torch.stack([c[:k].amax() - c[:k].amin() for c, k in zip(new.double(), passes.clusters, strict=True)])
    ordered = (moved[:, 1:, 0] >= moved[:, :-1, 0]) | ~real[:, 1:]
    fine = ordered.all(1) & (step.abs().flatten(1).amax(1) <= 0.5 * spread)
    return _guarded(active, now, torch.where(fine[:, None, None], step, r), r, size, state)


def _anderson(passes, active, now, new, moments, r, size, state):
    steps = r.clone()
    pasts = state.setdefault("past", {})
    for row, i in enumerate(active):
        points, residuals = pasts.setdefault(i, ([], []))
        points.append(now[row].double().flatten())
        residuals.append(r[row].flatten())
        del points[: -MEMORY - 1], residuals[: -MEMORY - 1]
        if len(points) > 1:
            dR, dX = torch.stack(residuals).diff(dim=0).t(), torch.stack(points).diff(dim=0).t()
            mix = torch.linalg.pinv(dR, rtol=1e-10) @ residuals[-1]
            steps[row] = (residuals[-1] - (dX + dR) @ mix).reshape(r[row].shape)
    guarded = _guarded(active, now, steps, r, size, state)
    for row, i in enumerate(active):
        if not torch.equal(guarded[row], steps[row]):
            pasts.pop(i)
    return guarded


def adjoint(passes, old, new, moments, u):
    """lambda with (I - J)^T lambda = u, J the Jacobian of the iteration from `old` to `new`."""
    if passes.signed:
        J = passes.jacobian(old, new, moments)
        eye = torch.eye(J.shape[1], dtype=J.dtype, device=J.device)
        return torch.linalg.solve_ex((eye - J).mT, u[..., 0].double())[0][..., None].to(u.dtype)
    return _gmres(lambda x: x - passes.recur(old, new, x.to(u.dtype), moments).double(), u.double()).to(u.dtype)


def _gmres(product, b):
    """The solution of product(x) = b for every tensor of the list at once, in the Krylov space of at most MOST_KRYLOV dimensions; without reading values."""
    count, shape = len(b), b.shape
    size = min(b[0].numel(), MOST_KRYLOV)
    norm = b.flatten(1).norm(dim=1)
    basis = [b.flatten(1) / torch.where(norm == 0, 1, norm)[:, None]]
    H = b.new_zeros(count, size + 1, size)
    for j in range(size):
        y = product(basis[j].reshape(shape)).flatten(1)
        scale = y.norm(dim=1)
        for _ in range(2):              # twice is enough for orthogonality
            for i, q in enumerate(basis):
                h = (q * y).sum(1)
                H[:, i, j] += h
                y = y - h[:, None] * q
        rest = y.norm(dim=1)
        rest = torch.where(rest > 1e-12 * scale, rest, 0)
        H[:, j + 1, j] = rest
        basis.append(torch.where(rest[:, None] > 0, y / torch.where(rest == 0, 1, rest)[:, None], 0))
    first = torch.zeros(size + 1, dtype=b.dtype, device=b.device)
    first[0] = 1
    weights = (torch.linalg.pinv(H, rtol=1e-13) @ first) * norm[:, None]
    return torch.einsum("ls,sln->ln", weights, torch.stack(basis[:size])).reshape(shape)
