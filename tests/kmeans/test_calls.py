"""What kmeans takes: every form of its arguments, every edge and error; the public function and the reference alike."""

import importlib
import math
import re
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from points import generator, inertia, normal, prefix, student, textbook

public = importlib.import_module("r2kernels.functional.kmeans")
reference = importlib.import_module("r2kernels.reference.kmeans")
kmeans = public.kmeans
LAYERS = pytest.mark.parametrize("layer", [public, reference], ids=["r2kernels", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
NAN, INF = math.nan, math.inf


def examples(count):
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


# W, K, centroids
LITERALS = [
    ([5.0], 1, [5]),
    ([0.0, 10, 0, 10], 2, [0, 10]),
    ([12.0, 1, 11, 2, 10, 3], 2, [2, 11]),
    ([0.0, 1, 2, 3], 2, [0.5, 2.5]),
    ([3.0, 1, 2], 3, [1, 2, 3]),
    ([1.0, 2, 3, 6], 1, [3]),
    ([4.0, 4, 4], 1, [4]),
    ([4.0, 4, 4], 3, [4, 4, 4]),
    ([7.0, 7, -1, -1, -1], 4, [-1, 7, 7, 7]),
    ([-0.0, 0.0, 1], 3, [0, 1, 1]),
    ([0.0, 1, 1, 1, 3, 1000], 3, [0.75, 3, 1000]),
]


@LAYERS
@DTYPES
@pytest.mark.parametrize(("w", "clusters", "expected"), LITERALS, ids=str)
def test_literals(w, clusters, expected, dtype, layer):
    found = layer.kmeans(torch.tensor(w, dtype=dtype), clusters)
    assert found.dtype == torch.promote_types(dtype, torch.float32) and found.tolist() == pytest.approx(
        expected, rel=1e-7
    )


@pytest.mark.parametrize("layout", ["output", "contiguous"])
@pytest.mark.parametrize("d", [2, 3, 4, 8])
def test_rows_are_read_as_everywhere(d, layout):
    """Layouts, leftovers and strides."""
    for w in (
        normal(37, 11),
        normal(10, 6, 3, 3),
        normal(37, 22)[:, ::2],
        normal(11, 37).t(),
        normal(8, 4, 3, 3).to(memory_format=torch.channels_last),
    ):
        flat = (w.transpose(0, -1) if layout == "output" else w).reshape(-1)
        rows = flat[: w.numel() // d * d].reshape(-1, d)
        found = kmeans(w, 5, cluster_dim=d, layout=layout)
        assert found.shape == (5, d) and torch.equal(found, kmeans(rows.clone(), 5, cluster_dim=d, layout="contiguous"))


@pytest.mark.parametrize("scale", [1e-41, 1e-30, 1e30, 1e37])
def test_extreme_scales(scale):
    values = (normal(20_000) * scale).clamp(-3.4e38, 3.4e38)
    found = kmeans(values, 8)
    assert found.isfinite().all() and (found.diff() > 0).all()
    rows = kmeans(values, 8, cluster_dim=2)
    assert rows.isfinite().all() and len(rows.unique(dim=0)) == 8
    double = normal(20_000).double()
    torch.testing.assert_close(kmeans(double * scale**7, 8) / scale**7, kmeans(double, 8))


@LAYERS
@pytest.mark.parametrize("d", [1, 2])
def test_more_clusters_than_rows(d, layer):
    w = torch.tensor([[3.0, 1.0], [4.0, 1.0]])
    with pytest.warns(
        UserWarning, match=re.escape(f"kmeans: 7 clusters, but W has {4 // d} rows; centroids will be repeated")
    ) as caught:
        found = layer.kmeans(w, 7, cluster_dim=d, layout="contiguous")
    assert caught[0].filename == __file__
    if d == 1:
        assert found.tolist() == [1, 3, 4, 4, 4, 4, 4]
    else:
        assert found.shape == (7, 2) and found.unique(dim=0).tolist() == w.tolist()
    weight = (torch.arange(4 // d) >= 2 // d).float()
    with pytest.warns(
        UserWarning, match=re.escape(f"kmeans: 3 clusters, but W[1] has {2 // d} rows of positive weight")
    ):
        layer.kmeans([w, w], [1, 3], cluster_dim=d, layout="contiguous", weight=[None, weight])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_few_distinct_rows(d, distinct):
    """No warning, no endless rounds; every distinct row is a centroid."""
    rows = normal(distinct, d)[torch.arange(20_000) % distinct]
    for clusters in (1, distinct, distinct + 3, 300):
        for dtype in (torch.float32, torch.float64):
            found = kmeans(rows.to(dtype), clusters, cluster_dim=d, layout="contiguous").reshape(-1, d)
            assert len(found) == clusters
            if clusters >= distinct:
                assert torch.equal(found.unique(dim=0), rows.to(dtype).unique(dim=0))


@LAYERS
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("d", [1, 2])
def test_not_finite(bad, d, layer):
    w = normal(50, 4)
    w[3, 2] = bad
    for weight in (None, torch.ones(200 // d), torch.zeros(200 // d).index_fill(0, torch.arange(5), 1)):
        found, fine = layer.kmeans(
            [w, normal(50, 4)], 3, cluster_dim=d, weight=None if weight is None else [weight, weight * 0 + 1]
        )
        assert found.isnan().all() and found.shape == fine.shape and fine.isfinite().all()


@LAYERS
def test_sequences(layer):
    ws = [normal(40, 3), student(77), normal(4, 4, 3, 3)]
    found = layer.kmeans(ws, [2, 5, 8])
    assert isinstance(found, list) and [f.shape for f in found] == [(2,), (5,), (8,)]
    for f, w, k in zip(found, ws, (2, 5, 8), strict=True):
        assert torch.equal(f, layer.kmeans(w, k))
    assert all(
        torch.equal(a, b) for a, b in zip(layer.kmeans(iter(ws), 4), layer.kmeans(tuple(ws), (4, 4, 4)), strict=True)
    )
    weight = [None, torch.rand(77, generator=generator()), torch.rand(4, 36, generator=generator())]
    for f, w, m in zip(layer.kmeans(ws, 4, weight=weight), ws, weight, strict=True):
        assert torch.equal(f, layer.kmeans(w, 4, weight=m))


@DTYPES
@pytest.mark.parametrize("d", [1, 2])
def test_dtypes(dtype, d):
    w = torch.nn.Parameter(normal(60, 40).to(dtype))
    before, wide = w.detach().clone(), torch.promote_types(dtype, torch.float32)
    found = kmeans(w, 8, cluster_dim=d, weight=torch.ones(2400 // d, requires_grad=True))
    assert found.dtype == wide and not found.requires_grad and torch.equal(w, before)
    torch.testing.assert_close(found, kmeans(w.detach().to(wide), 8, cluster_dim=d))
    with torch.inference_mode():
        torch.testing.assert_close(kmeans(w * 1, 8, cluster_dim=d), found)


NUMBERS = st.integers(-5, 5) | (st.floats(-1, 1) | st.floats(-1e30, 1e30)).map(lambda x: x if abs(x) > 1e-200 else 0.0)


@given(
    values=st.lists(NUMBERS, min_size=1, max_size=40),
    clusters=st.integers(1, 12),
    weights=st.none() | st.integers(0, 10**6),
)
@examples(250)
def test_properties_of_single_numbers(values, clusters, weights):
    w = torch.tensor(values, dtype=torch.float64)
    weight = None if weights is None else torch.rand(len(w), generator=generator(weights), dtype=torch.float64) + 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, other, twice = (kmeans(times * w, clusters, weight=weight) for times in (1, -1, 2.0**70))
    assert found.shape == (clusters,) and (found.diff() >= 0).all() and found[0] >= w.min() and found[-1] <= w.max()
    assert torch.equal(twice, found * 2.0**70)
    mass = 1.0 if weight is None else weight
    size = (mass * (w - w.mean()).square()).sum().item()
    ordered, order = w.sort()
    least = textbook(prefix(ordered, None if weight is None else weight[order]), min(clusters, len(w)))[-1]
    assert inertia(w, found, mass) == pytest.approx(least, rel=1e-6, abs=1e-12 * size)
    assert inertia(w, -other, mass) == pytest.approx(least, rel=1e-6, abs=1e-12 * size)


@given(
    n=st.integers(1, 60),
    d=st.integers(2, 5),
    clusters=st.integers(1, 9),
    levels=st.integers(1, 4),
    seed=st.integers(0, 99),
    weighted=st.booleans(),
)
@examples(120)
def test_properties_of_rows(n, d, clusters, levels, seed, weighted):
    """Few distinct numbers: ties and repeated rows."""
    rows = torch.randint(levels, (n, d), generator=generator(seed)).float()
    weight = torch.randint(1, 4, (n,), generator=generator(seed)).float() if weighted else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, once, twice = (
            kmeans(times * rows, clusters, cluster_dim=d, layout="contiguous", weight=weight) for times in (1, 1, 4.0)
        )
    assert torch.equal(found, once) and torch.equal(twice, 4 * found)
    assert found.shape == (clusters, d) and (found >= rows.amin(0)).all() and (found <= rows.amax(0) + 1e-6).all()
    mass = 1.0 if weight is None else weight
    one = (rows.double() * (weight[:, None] if weighted else 1)).sum(0) / (weight.double().sum() if weighted else n)
    assert inertia(rows, found, mass) <= inertia(rows, one[None], mass) + 1e-6
    if clusters >= len(rows.unique(dim=0)):
        assert inertia(rows, found, mass) <= 1e-9


W = normal(4, 6)
ERRORS = [
    ((W, 4.0), {}, TypeError, "clusters must be an int >= 1, got 4.0"),
    ((W, True), {}, TypeError, "clusters must be an int >= 1, got True"),
    ((W, None), {}, TypeError, "clusters must be an int >= 1, got None"),
    ((W, [4]), {}, TypeError, "clusters must be an int >= 1, got [4]"),
    ((W, 0), {}, ValueError, "clusters must be an int >= 1, got 0"),
    (([W, W], -3), {}, ValueError, "clusters must be an int >= 1, got -3"),
    (([W, W], [2, 0]), {}, ValueError, "clusters[1] must be an int >= 1, got 0"),
    (([W, W], [2, "a"]), {}, TypeError, "clusters[1] must be an int >= 1, got 'a'"),
    (
        ([W, W], [2]),
        {},
        ValueError,
        "clusters has 1 values; allowed is an int >= 1, or 2 of them, one for each tensor of W",
    ),
    ((W, 2), {"max_iter": 0}, ValueError, "max_iter must be an int >= 1, got 0"),
    ((W, 2), {"max_iter": True}, TypeError, "max_iter must be an int >= 1, got True"),
    ((W, 2), {"max_iter": 1e2}, TypeError, "max_iter must be an int >= 1, got 100.0"),
    ((W, 2), {"cluster_dim": 0}, ValueError, "cluster_dim must be an int >= 1, got 0"),
    ((W, 2), {"cluster_dim": 25}, ValueError, "W has 24 elements, fewer than cluster_dim=25"),
    ((W, 2), {"layout": "input"}, ValueError, "layout must be one of ('output', 'contiguous'), got 'input'"),
    (([], 2), {}, ValueError, "W is an empty sequence"),
    ((W.int(), 2), {}, TypeError, "W has dtype torch.int32; allowed are"),
    (([W, W.half()], 2), {}, TypeError, "W[1] has dtype torch.float16 but W[0] has torch.float32"),
    ((W, 2), {"weight": 1.0}, TypeError, "weight must be a tensor of one non-negative number per row, got float"),
    ((W, 2), {"weight": [1.0] * 24}, TypeError, "weight must be a tensor of one non-negative number per row, got list"),
    (
        (W, 2),
        {"weight": torch.ones(24, dtype=torch.int64)},
        TypeError,
        "weight has dtype torch.int64; allowed are float64, float32, bfloat16 and float16",
    ),
    ((W, 2), {"weight": torch.ones(24, device="meta")}, ValueError, "weight is on meta but W is on cpu"),
    (
        (W, 2),
        {"weight": torch.ones(23)},
        ValueError,
        "weight has 23 numbers (shape (23,)); allowed are 24, one for each row",
    ),
    (
        (W, 2),
        {"weight": torch.ones(4, 6), "cluster_dim": 5},
        ValueError,
        "weight has 24 numbers (shape (4, 6)); allowed are 4, one for each row",
    ),
    (
        (W, 2),
        {"weight": torch.arange(24.0) - 1},
        ValueError,
        "weight must be finite and >= 0, got values from -1 to 22",
    ),
    (
        (W, 2),
        {"weight": torch.full((24,), NAN)},
        ValueError,
        "weight must be finite and >= 0, got values from nan to nan",
    ),
    (
        (W, 2),
        {"weight": torch.full((24,), INF)},
        ValueError,
        "weight must be finite and >= 0, got values from inf to inf",
    ),
    ((W, 2), {"weight": torch.zeros(24)}, ValueError, "weight is 0 for every row; at least one must be positive"),
    (
        ([W, W], 2),
        {"weight": torch.ones(2, 24)},
        TypeError,
        "weight must be a sequence of tensors, as W is, got Tensor",
    ),
    (
        ([W, W], 2),
        {"weight": [torch.ones(24)]},
        ValueError,
        "weight has 1 tensors; allowed are 2, one for each tensor of W",
    ),
    (
        ([W, W], 2),
        {"weight": [None, torch.ones(2)]},
        ValueError,
        "weight[1] has 2 numbers (shape (2,)); allowed are 24, one for each row",
    ),
]


@LAYERS
@pytest.mark.parametrize(
    ("args", "options", "error", "message"), ERRORS, ids=[f"{i} {e[3]}"[:60] for i, e in enumerate(ERRORS)]
)
def test_errors(args, options, error, message, layer):
    with pytest.raises(error, match=re.escape(message)):
        layer.kmeans(*args, **options)
