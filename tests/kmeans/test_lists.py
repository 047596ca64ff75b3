"""Many groups in one call: each as it is alone, at the optimum, whatever its numbers are like."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from points import DRAWS, cost_of, generator, inertia, normal, prefix, student

import r2kernels

public = importlib.import_module("r2kernels.functional.kmeans")
tuned = importlib.import_module("r2kernels.algorithms.kmeans")
kmeans = r2kernels.kmeans


@pytest.fixture(autouse=True)
def native():
    return public._native() or pytest.skip("the extension is not usable")


def rough(kind, n, draw):
    """Numbers that no smooth density has: modes of all widths, tails, ties, outliers."""
    u, z = torch.rand(n, generator=draw), torch.randn(n, generator=draw)
    modes = torch.randn(40, generator=draw)
    which = torch.randint(int(torch.randint(1, 40, (), generator=draw)), (n,), generator=draw)
    return {
        "modes": modes[which] + (3 * modes.flip(0)[which]).exp() * 0.02 * z,
        "tails": z / (u + 1e-3),
        "power": u.pow(8),
        "lognormal": (4 * z).exp(),
        "grid": (200 * z).round() + 0.3 * modes[which],
        "few": modes[which],
        "zeros": torch.where(u < 0.99, 0.0, 20 * z) + (u > 0.5).float() + 1e-3 * z.flip(0),
    }[kind]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["modes", "tails", "power", "lognormal", "grid", "few", "zeros"]),
    n=st.integers(1, 6000),
    clusters=st.sampled_from([1, 2, 3, 5, 8, 16, 40]),
    weighted=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_stages_end_at_the_optimum(kind, n, clusters, weighted, seed):
    """As the programme over all numbers at once does."""
    values, _ = rough(kind, n, generator(seed)).sort()
    weight = torch.rand(n, generator=generator(seed)) + 0.01 if weighted else None
    if n < clusters:
        return
    sums = prefix(values, weight)
    best = cost_of(sums, public._native().partition(sums.contiguous(), clusters)) if clusters < n else 0.0
    found = inertia(values, kmeans(values, clusters, weight=weight), 1.0 if weight is None else weight)
    # float32 centroids, and sums of squares around their mean
    assert found <= best * (1 + 1e-6) + 1e-12 * sums[2, -1].item()


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("n", [5000, 70_000])
def test_no_more_than_one_stage_and_lloyd_leave(draw, n):
    """What there was before, which is what runs on other devices."""
    values = DRAWS[draw](n)
    for clusters in (4, 16):
        other = tuned.fit(values[:, None].clone(), clusters, None, 100)
        assert inertia(values, kmeans(values, clusters)) <= inertia(values, other) * (1 + 1e-7)


def test_groups_of_a_list_are_as_they_are_alone():
    ws = [student(n).reshape(-1, 1) for n in (1, 2, 7, 100, 1023, 1024, 5000, 40_000, 70_000)]
    counts = [1, 3, 7, 16, 8, 4, 16, 3, 5]
    weights = [None if i % 2 else torch.rand(len(w), generator=generator(i)) for i, w in enumerate(ws)]
    for some in (None, weights):
        with pytest.warns(UserWarning, match="will be repeated"):
            found = kmeans(ws, counts, weight=some)
        for i, (w, k, c) in enumerate(zip(ws, counts, found, strict=True)):
            alone = kmeans(w, k, weight=some and some[i]) if i != 1 else c
            assert torch.equal(alone, c) and (c.diff() >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("zeros", [False, True])
def test_rows_of_a_block(dtype, zeros):
    block = student(40 * 300).view(40, 300).to(dtype)
    block[:, ::7] = 0
    weight = torch.rand(40, 300, generator=generator()) + 0.1
    for mass in (None, weight):
        options = {"preserve_zeros": zeros}
        listed = kmeans(list(block), 8, weight=None if mass is None else list(mass), **options)
        found = public.grouped(block, 8, weight=mass, **options)
        assert torch.equal(found, torch.stack(listed)) and (not zeros or (found == 0).any(1).all())
        with r2kernels.use_backend("reference"):
            other = public.grouped(block, 8, weight=mass, **options)
        for w, c, o, m in zip(block, found, other, weight, strict=True):
            m = 1.0 if mass is None else m
            assert inertia(w, c, m) <= inertia(w, o, m) * (1 + 1e-5)


@pytest.mark.parametrize("n", [900, 30_000, 200_000])
def test_numbers_of_16_and_8_bits(n):
    """Counted by value, or sorted: what their float32 copies give; and 8 bits."""
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        values, weight = student(n).to(dtype), torch.rand(n, generator=generator(1))
        for mass in (None, weight):
            found, wide = (kmeans(v, 8, weight=mass) for v in (values, values.float()))
            torch.testing.assert_close(found, wide, rtol=1e-6, atol=1e-7)
    values[n // 2] = torch.nan
    assert kmeans(values, 3).isnan().all()


def test_against_scikit_learn():
    """Never above its best of ten starts."""
    cluster = pytest.importorskip("sklearn.cluster")
    for seed, (n, clusters) in enumerate([(512, 8), (4096, 16)] * 3):
        values = (normal if seed % 2 else student)(n, seed=seed)
        theirs = cluster.KMeans(clusters, n_init=10, random_state=seed).fit(values[:, None].numpy())
        centroids = torch.from_numpy(theirs.cluster_centers_[:, 0])
        assert inertia(values, kmeans(values, clusters)) <= inertia(values, centroids) * (1 + 1e-6)


def test_every_instruction_set():
    cpu = importlib.import_module("r2kernels._C").cpu
    values, before, found = [student(n) for n in (60, 500, 6000, 90_000)], cpu.isa(), []
    try:
        for isa in cpu.isas():
            cpu.set_isa(isa)
            found.append([inertia(w, c) for w, c in zip(values, kmeans(values, 12), strict=True)])
    finally:
        cpu.set_isa(before)
    assert len(found) > 0 and all(other == pytest.approx(found[0], rel=1e-6) for other in found)
