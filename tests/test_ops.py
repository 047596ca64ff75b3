"""The ops as torch sees them: schemas, compilation, autograd, modes and threads."""

import contextlib
import itertools
import threading
import warnings

import budget
import cases
import pytest
import torch
from parametrize import one_each
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import r2kernels as r2
from r2kernels import contract, ops


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def weights(device, shapes=((8, 3, 3), (130,), (5, 7))):
    g = torch.Generator().manual_seed(5)
    return [(torch.randn(s, generator=g) * cases.SCALE).to(device).requires_grad_() for s in shapes]


def total(loss):
    """One number of whatever a loss function returns."""
    return sum((i + 1) * x.sum() for i, x in enumerate(loss if isinstance(loss, tuple) else (loss,)))


def test_every_op_has_a_row():
    """A new op is covered by being in the tables of the contract and of the cases."""
    # no gradient; several of the others; a part of `Quantizer`, in quantizers/test_sizes.py
    elsewhere = {"weight_stats", "sampled_std", "digits", "terms", "rescale"}
    assert {op.function for op in cases.OPS} == {op.name for op in contract.OPS} - elsewhere


@pytest.mark.parametrize("geometry", [(1, "output"), (2, "output"), (3, "contiguous")], ids=str)
@one_each
def test_opcheck(op, geometry, device):
    geometry = geometry if op.columns else (1, "output")
    for dtype, name in (
        (torch.float32, "mixed list"),
        (torch.float16, "channels last"),
        (torch.float64, "every second"),
    ):
        one = budget.draw(op, name, dtype, device, geometry=geometry)
        if name == "mixed list":
            one = one._replace(
                weights=one.weights[:2],
                grad=one.grad[:, :2] if op.function == "soft_extrema" else one.grad[:2],
                parameter=None if one.parameter is None else one.parameter[:2],
            )
        taken, of_saved = budget.for_ops(one)
        forward, backward = ops.op[op.function + "_fwd"], ops.op[op.function + "_bwd"]
        torch.library.opcheck(forward, taken)
        torch.library.opcheck(backward, of_saved(forward(*taken)[1]))


def test_opcheck_weight_stats(device):
    torch.library.opcheck(ops.op["weight_stats_fwd"], (cases.make("mixed list", torch.bfloat16, device),))


KINDS = [(op, kind) for op in cases.ONE_EACH for kind in ("number", "learned") if op.parameter or kind == "number"] + [
    (cases.BY_LABEL["soft_min_max"], "tensor")
]


@pytest.mark.parametrize(("op", "kind"), KINDS, ids=[f"{op.function}-{kind}" for op, kind in KINDS])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("single", [True, False], ids=["single", "list"])
def test_compiled_equals_eager(op, single, dynamic, kind, device):
    """The parameter is a number, a tensor, or a tensor that is learned; for other shapes there is another compilation,
    with dynamic=True there is none."""
    given = op.arguments(cases.SCALE)
    if kind != "number":
        given[op.parameter] = torch.tensor(given[op.parameter], device=device, requires_grad=kind == "learned")

    def step(ws, given):
        return total(getattr(r2, op.function)(ws, **given)) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for shapes in (((8, 3, 3), (130,), (5, 7)), ((9, 3, 3), (131,), (6, 8))):
        ws = weights(device, shapes)
        inputs = [*ws, given[op.parameter]] if kind == "learned" else ws
        inputs = [inputs[0], *inputs[3:]] if single else inputs
        results = []
        with warnings.catch_warnings(), torch._dynamo.config.patch(error_on_recompile=dynamic):
            warnings.filterwarnings("error", message=".*autograd kernel was not registered.*")
            for function in (step, compiled):
                loss = function(ws[0] if single else ws, given)
                results.append([loss, *torch.autograd.grad(loss, inputs)])
        for eager, fused in zip(*results, strict=True):
            torch.testing.assert_close(fused, eager)


def test_no_recompilation_for_another_alpha(device):
    compiled = torch.compile(lambda ws, alpha: r2.soft_min_max(ws, alpha).sum(), fullgraph=True, backend="aot_eager")
    ws = weights(device)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for alpha in (0.1, 0.0, -3.0):
            alpha = torch.tensor(alpha, device=device)
            torch.testing.assert_close(compiled(ws, alpha), r2.soft_min_max(ws, alpha).sum())


@pytest.mark.parametrize("count", [1, 2, 3])
@one_each
def test_compiled_without_gradients(op, count, device):
    """Without grad, or under no_grad: torch.compile traces the forward of an autograd.Function in another way then."""
    given, ws = op.arguments(cases.SCALE), weights(device)[:count]
    compiled = torch.compile(
        lambda ws: total(getattr(r2, op.function)(ws, **given)), fullgraph=True, backend="aot_eager"
    )
    expected = total(getattr(r2, op.function)(ws, **given))
    torch.testing.assert_close(compiled([w.detach() for w in ws]), expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ws), expected)


def test_compiled_columns_and_stats(device):
    def step(ws):
        loss = (
            r2.soft_min_max(ws, [1.0, 2.0, 3.0], cluster_dim=2).sum()
            + r2.margin(ws, 0.05, k=0.1, cluster_dim=3, layout="contiguous").sum()
        )
        return loss, r2.weight_stats(ws)

    ws = weights(device)
    (loss, stats), (expected, expected_stats) = torch.compile(step, fullgraph=True)(ws), step(ws)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(stats[:6], expected_stats[:6])
    for a, b in zip(torch.autograd.grad(loss, ws), torch.autograd.grad(expected, ws), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "options", [{}, {"alpha_unit": "std", "alpha": 4.0}, {"loss": "margin", "k": 0.01}, {"loss": "kure"}], ids=str
)
def test_regularizer_in_a_compiled_function(options, device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).to(device)
    reg, x = r2.RangeRegularizer(model, **options), torch.randn(3, 6, device=device)
    inputs = [*model.parameters(), *reg.parameters()]

    def step(x):
        return model(x).square().mean() + reg()

    compiled = torch.compile(step, fullgraph=True)
    for _ in range(2):
        a, b = compiled(x), step(x)
        torch.testing.assert_close(a, b)
        for g, e in zip(torch.autograd.grad(a, inputs), torch.autograd.grad(b, inputs), strict=True):
            torch.testing.assert_close(g, e)
        with torch.no_grad():
            for p in inputs:
                p += 0.01


@one_each
def test_autocast_leaves_full_precision(op, device):
    ws, given = weights(device), op.arguments(cases.SCALE)
    expected = total(getattr(r2, op.function)(ws, **given))
    with torch.autocast(device, torch.bfloat16):
        loss = getattr(r2, op.function)(ws, **given)
    assert all(x.dtype == torch.float32 for x in (loss if isinstance(loss, tuple) else (loss,)))
    assert torch.equal(total(loss), expected)
    for a, b in zip(torch.autograd.grad(total(loss), ws), torch.autograd.grad(expected, ws), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("alpha_learned", [False, True])
@pytest.mark.parametrize("frozen", [f for n in range(4) for f in itertools.combinations(range(3), n)], ids=str)
def test_only_what_needs_a_gradient_gets_one(frozen, alpha_learned, device):
    ws, alpha = weights(device), torch.tensor([10.0, 20.0, -5.0], device=device, requires_grad=alpha_learned)
    expected = torch.autograd.grad(r2.soft_min_max(ws, alpha).sum(), [*ws, alpha] if alpha_learned else ws)
    for i in frozen:
        ws[i].requires_grad_(False)
    loss = r2.soft_min_max(ws, alpha).sum()
    assert loss.requires_grad == (alpha_learned or len(frozen) < 3)
    if loss.requires_grad:
        loss.backward()
    for i, p in enumerate([*ws, alpha]):
        assert torch.equal(p.grad, expected[i]) if p.requires_grad else p.grad is None


@one_each
def test_no_grad_and_inference_mode_give_the_same_value(op, device):
    ws, given = weights(device), op.arguments(cases.SCALE)
    expected = total(getattr(r2, op.function)(ws, **given))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = total(getattr(r2, op.function)(ws, **given))
        assert torch.equal(loss, expected) and not loss.requires_grad


@pytest.mark.parametrize("mode", ["inference", "fake"])
def test_constants_of_a_mode_do_not_leak(mode, device):
    """A number first met in a mode is used after it: in training, on real tensors."""
    number = {"inference": 0.123, "fake": 0.456}[mode]
    with torch.inference_mode() if mode == "inference" else FakeTensorMode(allow_non_fake_inputs=True):
        r2.soft_min_max(torch.ones(3, device=device), number)
        r2.margin(torch.ones(3, device=device), number, k=7)
    (w,) = weights(device, [(9,)])
    (r2.soft_min_max(w, number) + r2.margin(w, number, k=7)).backward()
    assert type(w.grad) is torch.Tensor and w.grad.isfinite().all()


@one_each
def test_meta_and_fake_tensors(op, device):
    given = op.arguments(cases.SCALE)
    ws = weights(device)
    expected = getattr(r2, op.function)(ws, **given)
    shape = (
        (lambda x: [(y.shape, y.dtype) for y in x]) if isinstance(expected, tuple) else (lambda x: (x.shape, x.dtype))
    )
    for fakes, mode in (([w.detach().to("meta").requires_grad_() for w in ws], None), (None, FakeTensorMode())):
        fakes = fakes or [mode.from_tensor(w.detach()).requires_grad_() for w in ws]
        with mode or contextlib.nullcontext():
            loss = getattr(r2, op.function)(fakes, **given)
            assert shape(loss) == shape(expected)
            grads = torch.autograd.grad(total(loss), fakes)
            assert [(g.shape, g.dtype) for g in grads] == [(w.shape, w.dtype) for w in ws]


def test_backward_in_another_thread(device):
    ws = weights(device)
    expected = torch.autograd.grad(r2.soft_min_max(ws, 10.0).sum(), ws)
    loss = r2.soft_min_max(ws, 10.0).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert all(torch.equal(w.grad, e) for w, e in zip(ws, expected, strict=True))


def test_many_threads_at_once(device):
    """The GIL is released in the kernels of the extension; every thread gets its own result."""
    sizes = range(4000, 4000 + 8)
    expected = [r2.soft_min_max(torch.arange(n, device=device) / n, 3.0) for n in sizes]
    found, barrier = {}, threading.Barrier(8)

    def work(n):
        barrier.wait()
        found[n] = [r2.soft_min_max(torch.arange(n, device=device) / n, 3.0) for _ in range(50)]

    threads = [threading.Thread(target=work, args=(n,)) for n in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(loss, e) for n, e in zip(sizes, expected, strict=True) for loss in found[n])


def test_backward_keeps_the_backend_of_the_forward(device, monkeypatch, variants):
    """Also outside the block, and in a thread where nothing was chosen."""
    called, kind = [], type(ops.select(torch.device(device)))
    original = kind.soft_min_max_bwd
    monkeypatch.setattr(
        kind, "soft_min_max_bwd", lambda *args, **options: called.append(1) or original(*args, **options)
    )
    (w,) = weights(device, [(9, 9)])
    with r2.use_backend("reference"):
        first, second = r2.soft_min_max(w, 10.0), r2.soft_min_max(w, 10.0)
    first.backward()
    thread = threading.Thread(target=second.backward)
    thread.start()
    thread.join()
    assert not called
    r2.soft_min_max(w, 10.0).backward()
    assert called == [1]


@one_each
def test_deterministic(op, device):
    ws, given = weights(device, [(64, 65, 3), (4097,), (3,)]), op.arguments(cases.SCALE)
    results = []
    for _ in range(3):
        loss = total(getattr(r2, op.function)(ws, **given))
        results.append([loss, *torch.autograd.grad(loss, ws)])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@one_each
def test_inputs_are_not_written(op, device):
    ws, given = weights(device), op.arguments(cases.SCALE)
    before, versions = [w.detach().clone() for w in ws], [w._version for w in ws]
    total(getattr(r2, op.function)(ws, **given)).backward()
    assert all(torch.equal(w, b) for w, b in zip(ws, before, strict=True)) and versions == [w._version for w in ws]


def test_weights_changed_between_forward_and_backward(device):
    ws = weights(device)
    loss = r2.soft_min_max(ws, 10.0).sum()
    with torch.no_grad():
        ws[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
