"""One tensor of more than 2^31 numbers: soft_min_max and lsq, forward and backward, against its parts."""

import functools

from .child import Case

NUMBERS, PART = 2**31 + 4099, 2**26  # of bfloat16
REHEARSED = 2**17 + 4099, 2**14
BYTES = 9  # for each number: w, its gradient, the result, the incoming gradient, room


def cases(device):
    for name, check in (("soft_min_max", soft_min_max), ("lsq", lsq)):
        yield Case(f"{name} of more than 2^31 numbers", functools.partial(check, device), 150)


def tensor(device):
    """(the numbers, how many are compared at once); the last part has the outermost ones. MemoryError where the card
    has no room."""
    import torch

    n, part = NUMBERS, PART
    if device == "cpu":
        n, part = REHEARSED
    elif torch.cuda.mem_get_info()[0] < n * BYTES:
        raise MemoryError(f"{torch.cuda.mem_get_info()[0]:,} bytes are free, {n * BYTES:,} are needed")
    g = torch.Generator(device).manual_seed(0)
    w = torch.empty(n, dtype=torch.bfloat16, device=device)
    for piece in w.split(part):
        piece.normal_(0, 0.05, generator=g)
    w[-2], w[-1] = 0.5, -0.5
    return w.requires_grad_(), part


def soft_min_max(device):
    import torch

    import r2kernels

    w, part = tensor(device)
    alpha = 20.0
    loss = r2kernels.soft_min_max(w, alpha)
    loss.backward()
    extrema = []
    for sign in (-1, 1):
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for piece in w.detach().split(part):
            x = piece.double()
            e = (sign * alpha * x).exp()
            sums += torch.stack([e.sum(), (e * x).sum()])
        extrema.append((sums[1] / sums[0], sums[0]))
    (low, total_q), (high, total_p) = extrema
    exact = high - low + torch.tensor(-alpha, dtype=torch.float64).exp().item()
    error = abs(loss.item() - exact.item()) / abs(exact.item())
    assert error < 1e-5, f"the loss errs by {error:.3g}"
    worst = 0.0
    for piece, found in zip(w.detach().split(part), w.grad.split(part), strict=True):
        x = piece.double()
        p, q = (alpha * x).exp() / total_p, (-alpha * x).exp() / total_q
        expected = p * (1 + alpha * (x - high)) - q * (1 - alpha * (x - low))
        off = (found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        worst = max(worst, off.item())
    assert worst < torch.finfo(torch.bfloat16).eps, f"dL/dW of a part errs by {worst:.3g} of its RMS"
    return {"numbers": w.numel(), "of the loss": error, "of dL/dW": worst}


def lsq(device):
    import torch

    import r2kernels

    w, part = tensor(device)
    step = torch.full((), 0.02, device=device, requires_grad=True)
    y = r2kernels.lsq(w, step, 4)
    g = w.detach().cos()
    y.backward(g)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for i, piece in enumerate(w.detach().split(part)):
        at = slice(i * part, i * part + piece.numel())
        x, s = piece.clone().requires_grad_(), step.detach().clone().requires_grad_()
        result = r2kernels.lsq(x, s, 4)
        result.backward(g[at])
        assert torch.equal(y.detach()[at], result.detach()), f"results of part {i} differ"
        assert torch.equal(w.grad[at], x.grad), f"gradients of part {i} differ"
        total += s.grad.double() * piece.numel() ** 0.5
    exact = total.item() / w.numel() ** 0.5
    error = abs(step.grad.item() - exact) / abs(exact)
    assert error < 1e-3, f"dL/dstep is {step.grad.item()}, of the parts {exact}"
    return {"numbers": w.numel(), "of dL/dstep": error}
