"""The fixed point C* = F(C*, W) of DKM's iteration, and the gradient through it.

Scalars in the Euclidean metric: Newton on F(C) - C, whose Jacobian a pass gives besides F, as pseudo-transient
continuation (Kelley and Keyes 1998): steps of implicit Euler along dC/dt = F(C) - C, longer as the residual falls, so
that it goes where plain iterations would go and ends as Newton. Else Anderson's acceleration, which needs F alone.
Gradient: (I - J)^T lambda = u.
"""

import warnings

import torch

FIRST_TIME = 30.0  # first step of the pseudo-time; 3 takes twice as many passes, 300 misses more of the hard cases
MOST_GROWTH = 10.0  # of the pseudo-time in a pass
SHORTENED = 20  # times that a step which breaks the order is made shorter, before the plain one is taken
DAMPING = 1e-12  # of Anderson's least squares, relative: below it differences are rounding
MEMORY = 8  # differences that Anderson's acceleration keeps
MOST_KRYLOV = 64  # products with the Jacobian in the adjoint solution


def solve(passes_of, centroids, tol, max_passes, accelerated=True):
    """(C*, passes over W): until |F(C) - C| <= tol (L,) for every tensor. `passes_of(indices)` gives the passes over
    some of the tensors."""
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
        warnings.warn(
            f"r2kernels.dkm: {len(active)} of {len(c)} tensors did not converge in max_passes={max_passes} "
            f"(index: largest |F(C) - C|: {worst}); "
            "their centroids, and an implicit gradient, are those of the last point",
            stacklevel=2,
        )
    return c, torch.tensor(count, device="cpu")


def _newton(passes, active, now, new, moments, r, size, state):
    times, sizes = (
        state.setdefault(name, torch.full((max(active) + 1,), value, dtype=r.dtype, device=r.device))
        for name, value in (("time", FIRST_TIME), ("size", torch.nan))
    )
    growth = (sizes[active] / size).clamp(1 / MOST_GROWTH, MOST_GROWTH)
    time = times[active] * torch.where(growth.isnan(), 1, growth)
    J = passes.jacobian(now, new, moments)
    eye = torch.eye(J.shape[1], dtype=J.dtype, device=J.device)
    filled_up = torch.arange(1, J.shape[1], device=J.device) >= torch.tensor(passes.clusters, device=J.device)[:, None]
    spread = torch.stack([c[:k].amax() - c[:k].amin() for c, k in zip(new.double(), passes.clusters, strict=True)])
    for _ in range(SHORTENED):
        step = torch.linalg.solve_ex(eye * (1 + 1 / time)[:, None, None] - J, r[..., 0])[0][..., None]
        moved = now.double() + step
        ordered = ((moved[:, 1:, 0] >= moved[:, :-1, 0]) | filled_up).all(1)
        fine = ordered & (step.abs().flatten(1).amax(1) <= 0.5 * spread)
        if fine.all():
            break
        time = torch.where(fine, time, time / 3)
    times[active], sizes[active] = time, size
    return torch.where(fine[:, None, None], step, r)


def _anderson(passes, active, now, new, moments, r, size, state):
    steps = r.clone()
    for row, i in enumerate(active):
        points, residuals, best = state.setdefault(i, ([], [], [torch.inf]))
        if not size[row] < 1.5 * best[0]:  # it went astray: the plain step, and a new start
            del points[:], residuals[:]
        best[0] = min(best[0], size[row].item())
        points.append(now[row].double().flatten())
        residuals.append(r[row].flatten())
        del points[: -MEMORY - 1], residuals[: -MEMORY - 1]
        if len(points) > 1:
            dR, dX = torch.stack(residuals).diff(dim=0), torch.stack(points).diff(dim=0)
            gram = (dR[:, None] * dR).sum(
                -1
            )  # not a product of matrices, nor an SVD: their bits change from run to run
            gram.diagonal().add_(DAMPING * gram.trace())
            mix = torch.linalg.solve_ex(gram, (dR * residuals[-1]).sum(-1))[0]
            steps[row] = (residuals[-1] - (mix[:, None] * (dX + dR)).sum(0)).reshape(r[row].shape)
    return steps


def adjoint(passes, old, new, moments, u):
    """lambda with (I - J)^T lambda = u, J the Jacobian of the iteration from `old` to `new`."""
    if passes.signed:
        J = passes.jacobian(old, new, moments)
        eye = torch.eye(J.shape[1], dtype=J.dtype, device=J.device)
        return torch.linalg.solve_ex((eye - J).mT, u[..., 0].double())[0][..., None].to(u.dtype)
    return _gmres(lambda x: x - passes.recur(old, new, x.to(u.dtype), moments).double(), u.double()).to(u.dtype)


def _gmres(product, b):
    """The solution of product(x) = b for every tensor of the list at once, in the Krylov space of at most MOST_KRYLOV
    dimensions; without reading values."""
    count, shape = len(b), b.shape
    size = min(b[0].numel(), MOST_KRYLOV)
    norm = b.flatten(1).norm(dim=1)
    basis = [b.flatten(1) / torch.where(norm == 0, 1, norm)[:, None]]
    H = b.new_zeros(count, size + 1, size)
    for j in range(size):
        y = product(basis[j].reshape(shape)).flatten(1)
        scale = y.norm(dim=1)
        for _ in range(2):  # twice is enough for orthogonality
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
