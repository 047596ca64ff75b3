"""create_graph=True: a first derivative is part of the graph, and an error where it is differentiated."""

import contextlib

import pytest
import torch
from torch import nn
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

import r2kernels as r2

pytestmark = pytest.mark.usefixtures("one_thread")
TERMS = {"soft_min_max": {"alpha": 2.0}, "kure": {}}
CALLS = {
    "l_inf": lambda ws: r2.l_inf(ws),
    "margin": lambda ws: r2.margin(ws, 0.3),
    "soft_min_max": lambda ws: r2.soft_min_max(ws, 2.0),
    "soft_extrema": lambda ws: sum(r2.soft_extrema(ws, 2.0)),
    "kure": lambda ws: r2.kure(ws),
    "bin_reg": lambda ws: r2.bin_reg(ws, 0.3, 3),
    "msqe": lambda ws: r2.msqe(ws, 0.3, 3),
    "partial_l2": lambda ws: r2.partial_l2(ws, 0.7),
    "weight_terms": lambda ws: sum(r2.weight_terms(ws, TERMS).values()),
    "lsq": lambda ws: torch.stack([y.sum() for y in r2.lsq(ws, 0.3, 3)]),
    "ewgs": lambda ws: torch.stack([y.sum() for y in r2.ewgs(ws, -1.0, 1.0, 3)]),
    "pact": lambda ws: torch.stack([y.sum() for y in r2.pact(ws, 1.0, 3)]),
    "dorefa": lambda ws: torch.stack([y.sum() for y in r2.dorefa(ws, 3)]),
    "dkm": lambda ws: torch.stack([y.sum() for y in r2.dkm(ws, r2.kmeans(ws, 2), 0.3)[0]]),
}
every_call = pytest.mark.parametrize("name", CALLS)


def weights(device):
    g = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=g).to(device).requires_grad_() for shape in ((5, 3), (7,))]


@pytest.mark.parametrize("outer", [lambda x: x, torch.square], ids=["sum", "square"])
@every_call
def test_a_penalty_beside_it(name, outer, device):
    """sum w^2 v, penalized by its gradient in v: to the bit what it is without the term, whose gradient is constant."""
    ws = weights(device)
    vs = [torch.full_like(w, 0.7).requires_grad_() for w in ws]
    loss = sum((w.square() * v).sum() for w, v in zip(ws, vs, strict=True))
    term = outer(CALLS[name](ws)).sum()
    alone, of_term = grad(loss, ws, create_graph=True), grad(term, ws, retain_graph=True)
    first = grad(loss + term, [*ws, *vs], create_graph=True)
    for found, a, b in zip(first, alone, of_term, strict=False):
        torch.testing.assert_close(found, a + b)
    penalty = sum(g.square().sum() for g in first[2:])
    for found, w in zip(grad(penalty, ws, retain_graph=True), ws, strict=True):
        torch.testing.assert_close(found, 4 * w**3)
    hessian = grad(sum(g.sum() for g in first[:2]), vs, retain_graph=True)
    for found, w in zip(hessian, ws, strict=True):
        torch.testing.assert_close(found, 2 * w)


@pytest.mark.parametrize("outer", [lambda x: x, torch.square], ids=["sum", "square"])
@every_call
def test_through_it_raises_one_line(name, outer, device):
    """Also where the gradient of the loss is a constant, which `once_differentiable` lets pass with a wrong result."""
    ws = weights(device)
    first = grad(outer(CALLS[name](ws)).sum(), ws, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"^{name} has no second derivative, [^\n]*$"):
        grad(first[1].sum(), ws[1], retain_graph=True)
    with pytest.raises(RuntimeError, match=rf"^{name} has no second derivative, [^\n]*$"):
        sum(g.sum() for g in first).backward()


def test_through_a_parameter_raises(device):
    ws, alpha = weights(device), torch.tensor(2.0, device=device, requires_grad=True)
    (first,) = grad(r2.soft_min_max(ws, alpha).sum(), alpha, create_graph=True)
    for source in (alpha, ws[0]):
        with pytest.raises(RuntimeError, match=r"^soft_min_max has no second derivative"):
            grad(first, source, retain_graph=True)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_only_what_needs_a_gradient_is_part_of_the_graph(device):
    """Without create_graph nothing is; and a backward of plain gradients leaves no graph."""
    ws = weights(device)
    ws[0].requires_grad_(False)
    loss = r2.soft_min_max(ws, 2.0).sum()
    assert not grad(loss, ws[1], retain_graph=True)[0].requires_grad
    loss.backward(create_graph=True)
    assert ws[0].grad is None and ws[1].grad.requires_grad


@contextlib.contextmanager
def offloaded():
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        yield


@pytest.mark.parametrize("way", ["reentrant", "checkpoint", "hooks"])
@every_call
def test_checkpoints_and_hooks(name, way, device):
    """The same gradients; those of a checkpoint with its tensors computed again can be differentiated beside it."""
    ws, scale = weights(device), torch.ones((), device=device, requires_grad=True)

    def run(*ws):
        return CALLS[name](list(ws)).sum() + scale * sum(w.square().sum() for w in ws)

    expected = grad(run(*ws), ws)
    with offloaded() if way == "hooks" else contextlib.nullcontext():
        loss = run(*ws) if way == "hooks" else checkpoint(run, *ws, use_reentrant=way == "reentrant")
    if way == "reentrant":  # which takes no inputs and no create_graph
        loss.backward()
        found = [w.grad for w in ws]
    else:
        *found, of_scale = grad(loss, [*ws, scale], create_graph=True)
        for second, w in zip(grad(of_scale, ws), ws, strict=True):
            torch.testing.assert_close(second, 2 * w)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_gradient_penalty_of_a_model(device):
    """WGAN-GP on a critic whose weights have a range loss in the same total."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).to(device)
    regularizer, x = r2.RangeRegularizer(model), torch.randn(5, 4, device=device, requires_grad=True)
    found = []
    for term in (0.0, regularizer()):
        (g,) = grad(model(x).sum() + term, x, create_graph=True)
        found.append(grad((g.norm(dim=1) - 1).square().mean(), list(model.parameters()), allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own use of it
@every_call
def test_transforms_of_torch_func_raise_one_line(name, device):
    w = weights(device)[0]
    call = lambda w: CALLS[name]([w]).sum()  # noqa: E731
    inner = {"weight_terms": "weight_terms", "dkm": "kmeans"}.get(name, name)  # whichever is called first
    line = rf"^{inner} cannot run inside of vmap, grad, jvp .* r2kernels\.reference\.{inner}$"
    for transformed in (torch.func.grad(call), torch.func.vmap(call), lambda w: torch.func.jvp(call, (w,), (w,))):
        with pytest.raises(RuntimeError, match=line):
            transformed(w.detach())


@every_call
def test_many_gradients_at_once_raise_one_line(name, device):
    ws = weights(device)
    losses = CALLS[name](ws)
    line, eye = rf"^{name} takes one gradient at a time; is_grads_batched=True[^\n]*$", torch.eye(2, device=device)
    with pytest.raises(RuntimeError, match=line):
        grad(losses, ws, eye, is_grads_batched=True, retain_graph=True)
    with pytest.raises(RuntimeError, match=line):
        torch.func.vmap(lambda g: grad(losses, ws, g))(eye)
