"""Bad input: every call says which argument is wrong, what it was and what is allowed, before any work.

The public functions and the reference alike.
"""

import importlib
import re
import threading

import pytest
import torch
import torch.distributed as dist

import r2kernels
from r2kernels import reference
from r2kernels.reference import parameters

served = importlib.import_module("r2kernels.backends")  # the package; r2kernels.backends is the function
W = torch.randn(4, 6)
LAYERS = pytest.mark.parametrize("layer", [r2kernels, reference], ids=["r2kernels", "reference"])


class Subclass(torch.Tensor):
    pass


def subclass():
    return W.as_subclass(Subclass)


def sparse():
    return W.to_sparse()


def lazy():
    return torch.nn.LazyLinear(3).weight


# W, error, what it says
WEIGHTS = [
    (None, TypeError, "W must be a floating-point tensor or a sequence of them, got NoneType"),
    (3.0, TypeError, "W must be a floating-point tensor or a sequence of them, got float"),
    ("W", TypeError, "W must be a floating-point tensor or a sequence of them, got str"),
    ({"a": W}, TypeError, "W must be a floating-point tensor or a sequence of them, got dict"),
    ([], ValueError, "W is an empty sequence; it must hold at least one tensor"),
    ([W, 3.0], TypeError, "W[1] must be a floating-point tensor, got float"),
    ([W, W.numpy()], TypeError, "W[1] must be a floating-point tensor, got ndarray"),
    ([None, W], TypeError, "W[0] must be a floating-point tensor, got NoneType"),
    (W.int(), TypeError, "W has dtype torch.int32; allowed are float64, float32, bfloat16 and float16"),
    (W > 0, TypeError, "W has dtype torch.bool; allowed are"),
    (W.to(torch.complex64), TypeError, "W has dtype torch.complex64; allowed are"),
    (W.to(torch.float8_e4m3fn), TypeError, "W has dtype torch.float8_e4m3fn; allowed are"),
    ([W, W.long()], TypeError, "W[1] has dtype torch.int64; allowed are"),
    (
        [W, W, W.half()],
        TypeError,
        "W[2] has dtype torch.float16 but W[0] has torch.float32; a sequence must have one dtype",
    ),
    ([W, W.to("meta")], ValueError, "W[1] is on meta but W[0] is on cpu; a sequence must be on one device"),
    (torch.empty(0, 3), ValueError, "W is empty (shape (0, 3)); it must have at least one element"),
    (sparse, TypeError, "W has layout torch.sparse_coo; only dense (strided) tensors are supported"),
    (subclass, TypeError, "W is a Subclass; only plain tensors and parameters are supported"),
    (lambda: [W, subclass()], TypeError, "W[1] is a Subclass; only plain tensors and parameters are supported"),
    (lazy, TypeError, "W is an uninitialized parameter; run the model once before its weights are used"),
]
CALLS = {
    "l_inf": {},
    "margin": {"M": 0.1},
    "soft_min_max": {"alpha": 0.1},
    "soft_extrema": {"alpha": 0.1},
    "kure": {},
    "weight_stats": {},
}


@LAYERS
@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize(("w", "error", "message"), WEIGHTS, ids=[message[:48] for _, _, message in WEIGHTS])
def test_weights(function, w, error, message, layer):
    with pytest.raises(error, match=re.escape(message)):
        getattr(layer, function)(w() if callable(w) else w, **CALLS[function])


# options, error, what it says
GEOMETRIES = [
    ({"cluster_dim": 0}, ValueError, "cluster_dim must be an int >= 1, got 0"),
    ({"cluster_dim": -2}, ValueError, "cluster_dim must be an int >= 1, got -2"),
    ({"cluster_dim": 2.0}, TypeError, "cluster_dim must be an int >= 1, got 2.0"),
    ({"cluster_dim": True}, TypeError, "cluster_dim must be an int >= 1, got True"),
    ({"cluster_dim": None}, TypeError, "cluster_dim must be an int >= 1, got None"),
    ({"cluster_dim": 25}, ValueError, "W[0] has 24 elements, fewer than cluster_dim=25"),
    ({"layout": "input"}, ValueError, "layout must be one of ('output', 'contiguous'), got 'input'"),
    ({"layout": None}, ValueError, "layout must be one of ('output', 'contiguous'), got None"),
]


@LAYERS
@pytest.mark.parametrize("function", ["l_inf", "margin", "soft_min_max", "soft_extrema"])
@pytest.mark.parametrize(("options", "error", "message"), GEOMETRIES, ids=[message for _, _, message in GEOMETRIES])
def test_geometry(function, options, error, message, layer):
    with pytest.raises(error, match=re.escape(message)):
        getattr(layer, function)([W, W], **CALLS[function], **options)


NAN, INF = float("nan"), float("inf")
LEARNED = torch.tensor(1.0, requires_grad=True)


def numbers(name):
    """For every parameter: how W is given, value, error, what it says."""
    return [
        ("one", "0.1", TypeError, f"{name} must be a number or a tensor, got str"),
        ("one", None, TypeError, f"{name} must be a number or a tensor, got NoneType"),
        ("one", True, TypeError, f"{name} must be a number or a tensor, got bool"),
        ("one", 1j, TypeError, f"{name} must be a number or a tensor, got complex"),
        ("one", [0.1], ValueError, f"{name} has 1 values; allowed is a number or a tensor"),
        ("list", [0.5], ValueError, f"{name} has 1 values; allowed is one number, or 2, one for each tensor of W"),
        ("list", [0.5, "a"], TypeError, f"{name}[1] must be a number or a tensor, got str"),
        (
            "one",
            torch.tensor(1),
            TypeError,
            f"{name} has dtype torch.int64; allowed are float64, float32, bfloat16 and float16",
        ),
        ("one", torch.tensor([0.5]), None, None),
        ("one", torch.tensor([0.5, 0.5]), ValueError, f"{name} has shape (2,); allowed are (), (1,)"),
        ("list", torch.tensor([0.5, 0.5, 0.5]), ValueError, f"{name} has shape (3,); allowed are (), (2,), (2, 1)"),
        ("one", torch.tensor(0.5, device="meta"), ValueError, f"{name} is on meta but W is on cpu"),
    ]


PARAMETERS = [
    *[("soft_min_max", "alpha", *row) for row in numbers("alpha")],
    *[("soft_extrema", "alpha", *row) for row in numbers("alpha")],
    *[("margin", "M", *row) for row in numbers("M")],
    *[("margin", "k", *row) for row in numbers("k")],
    *[("kure", "target", *row) for row in numbers("target")],
    *[
        (function, name, "one", value, ValueError, f"{name} must be a finite number, got {value:g}")
        for value in (NAN, INF, -INF)
        for function, name in (
            ("soft_min_max", "alpha"),
            ("soft_extrema", "alpha"),
            ("margin", "M"),
            ("kure", "target"),
        )
    ],
    *[
        ("margin", "k", "one", value, ValueError, f"k must be an int >= 1, or a fraction in (0, 1), got {value:g}")
        for value in (0, -1, 1.5, 2.5, NAN, INF)
    ],
    ("margin", "k", "list", [1, 0], ValueError, "k[1] must be an int >= 1, or a fraction in (0, 1), got 0"),
    ("soft_min_max", "alpha", "list", [0.5, INF], ValueError, "alpha[1] must be a finite number, got inf"),
    (
        "margin",
        "k",
        "one",
        LEARNED,
        ValueError,
        "k requires grad, but no gradient is defined for it; pass k.detach() or a number",
    ),
    ("kure", "target", "one", LEARNED, ValueError, "target requires grad, but no gradient is defined for it"),
]


@LAYERS
@pytest.mark.parametrize(
    ("function", "name", "given", "value", "error", "message"), PARAMETERS, ids=lambda x: str(x)[:40]
)
def test_parameters(function, name, given, value, error, message, layer):
    call = {**CALLS[function], name: value}
    w = W if given == "one" else [W, W]
    if error is None:
        getattr(layer, function)(w, **call)
        return
    with pytest.raises(error, match=re.escape(message)):
        getattr(layer, function)(w, **call)


# how a parameter may be given: W, cluster_dim, the value, the (L, d) numbers that it means
ALLOWED = [
    ("one", 1, 2, [[2.0]]),
    ("one", 1, torch.tensor(2.0), [[2.0]]),
    ("one", 3, 2.0, [[2.0] * 3]),
    ("one", 3, torch.tensor([1.0, 2, 3]), [[1.0, 2, 3]]),
    ("list", 1, 2.0, [[2.0], [2.0]]),
    ("list", 1, [1, 2.5], [[1.0], [2.5]]),
    ("list", 1, (1, 2), [[1.0], [2.0]]),
    ("list", 1, torch.tensor([1.0, 2]), [[1.0], [2.0]]),
    ("list", 1, torch.tensor([[1.0], [2]]), [[1.0], [2.0]]),
    ("list", 2, [3, 4], [[3.0, 3], [4.0, 4]]),
    ("list", 2, torch.tensor([[1.0, 2], [3, 4]]), [[1.0, 2], [3.0, 4]]),
    ("list", 2, torch.tensor(5.0, dtype=torch.float64), [[5.0, 5], [5.0, 5]]),
    ("list", 3, torch.tensor([3.0, 4]), [[3.0] * 3, [4.0] * 3]),
]


@pytest.mark.parametrize(("given", "d", "value", "expected"), ALLOWED, ids=lambda x: str(x)[:30])
def test_forms_of_a_parameter(given, d, value, expected):
    for dtype, wide in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        like = W.to(dtype)
        p = parameters.parameter("alpha", value, len(expected), given == "one", d, like)
        assert p.dtype == wide and p.is_contiguous() and p.tolist() == expected
        w = like if given == "one" else [like, like]
        assert torch.equal(
            r2kernels.soft_min_max(w, value, cluster_dim=d),
            r2kernels.soft_min_max(w, p[0] if given == "one" else p, cluster_dim=d),
        )


def test_sequences_that_are_no_lists():
    expected = r2kernels.l_inf([W, 2 * W])
    for w in ((W, 2 * W), (x for x in (W, 2 * W)), torch.nn.ParameterList([W, 2 * W]), dict(a=W, b=2 * W).values()):
        assert torch.equal(r2kernels.l_inf(w), expected)


def test_the_reference_rejects_dtensors():
    """Their data_ptr() is 0, without an error; the kernels run on their shards (tests/sharding)."""
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        w = DTensor.from_local(W, init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(TypeError, match=r"W is a DTensor; .*pass the local shard"):
            r2kernels.reference.soft_min_max(w, 0.1)
        with pytest.raises(TypeError, match=re.escape("W[1] is a DTensor")):
            r2kernels.reference.l_inf([W, w])
        assert torch.equal(r2kernels.l_inf([W, w]), r2kernels.l_inf([W, W]))
    finally:
        dist.destroy_process_group()


@pytest.fixture
def fresh():
    """The caches of backends/__init__.py emptied before and after."""
    caches = served._load, served._default, served._environment
    for cache in caches:
        cache.cache_clear()
    yield served
    for cache in caches:
        cache.cache_clear()


def test_backends_lists_all_with_reasons():
    found = r2kernels.backends()
    assert list(found) == ["triton", "cuda", "cpu", "reference"] and found["reference"] is None
    assert all(reason is None or (isinstance(reason, str) and reason) for reason in found.values())


@pytest.mark.parametrize("name", ["Triton", "numpy", "", 3])
def test_unknown_backend(name):
    message = re.escape(f"backend {name!r} is unknown; allowed are ('triton', 'cuda', 'cpu', 'reference')")
    with pytest.raises(ValueError, match=message), r2kernels.use_backend(name):
        pass


def test_environment(fresh, monkeypatch):
    monkeypatch.setenv("R2KERNELS_BACKEND", "fast")
    with pytest.raises(
        ValueError,
        match=re.escape("R2KERNELS_BACKEND='fast' is unknown; allowed are ('triton', 'cuda', 'cpu', 'reference')"),
    ):
        r2kernels.l_inf(W)
    fresh._environment.cache_clear()
    monkeypatch.setenv("R2KERNELS_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=r"backend 'cuda' was chosen explicitly but cannot be used: .+"):
        r2kernels.l_inf(W)
    with r2kernels.use_backend("reference"):  # the nearer choice wins
        assert r2kernels.l_inf(W) == W.abs().max()


def test_explicit_choice_never_falls_back(fresh, monkeypatch):
    monkeypatch.setattr(served, "_load", lambda name: (None, "it is broken"))
    with (
        pytest.raises(RuntimeError, match="backend 'cpu' was chosen explicitly but cannot be used: it is broken"),
        r2kernels.use_backend("cpu"),
    ):
        r2kernels.l_inf(W)
    monkeypatch.setattr(served, "_load", lambda name: (type("Backend", (), {"devices": ("cuda",)}), None))
    with (
        pytest.raises(RuntimeError, match="cannot be used: it serves cuda tensors, W is on cpu"),
        r2kernels.use_backend("triton"),
    ):
        r2kernels.l_inf(W)


def test_automatic_fall_back_warns_once(fresh, monkeypatch, recwarn):
    monkeypatch.setattr(served, "_native", lambda name: (_ for _ in ()).throw(ImportError("no such thing")))
    for _ in range(3):
        assert r2kernels.l_inf(W) == W.abs().max()
    messages = [str(w.message) for w in recwarn if "r2kernels" in str(w.message)]
    assert len(messages) == 1 and "backend 'cpu' is not usable (no such thing)" in messages[0]


def test_a_choice_is_of_one_thread_and_nests():
    seen = []
    with r2kernels.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(served.chosen()))
        thread.start()
        thread.join()
        with r2kernels.use_backend(None):
            seen.append(served.chosen())
        seen.append(served.chosen())
        with pytest.raises(KeyError), r2kernels.use_backend("cpu"):
            raise KeyError
        seen.append(served.chosen())
    assert seen == [None, None, "reference", "reference"] and served.chosen() is None
