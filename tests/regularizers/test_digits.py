"""digits on every backend, and the exact order statistics over shards that algorithms/rank.py finds by it."""

import pytest
import torch
from parametrize import every_dtype, first

from r2kernels import ops, reference
from r2kernels.algorithms import rank as ranks
from r2kernels.contract import RADIX
from r2kernels.reference.columns import accumulator
from r2kernels.reference.regularizers import BITS

pytestmark = pytest.mark.usefixtures("nan_filled", "one_thread")
CUTS = {"one": (), "even": (0.25, 0.5, 0.75), "uneven": (0.01, 0.9), "empty": (0.0, 0.0, 0.6, 0.6, 1.0)}


def numbers(n, dtype, device):
    """Normal ones, many alike, zeros of both signs, denormal, infinite, NaN of several kinds; in no order."""
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=g, dtype=torch.float64)
    kind = torch.randint(16, (n,), generator=g)
    least = torch.finfo(dtype).smallest_normal
    for at, value in (
        (1, (4 * x).round() / 4),
        (2, x.sign() * 0.0),
        (3, x * least / 8),
        (4, x.sign() * torch.inf),
        (5, x * 1e-3),
        (6, x * 100),
    ):
        x = torch.where(kind == at, value, x)
    x = x.to(dtype)
    bits = x.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize])
    infinite = torch.full((1,), torch.inf, dtype=dtype).view(bits.dtype)
    return torch.where(kind == 7, infinite | (bits & 7) | 1, bits).view(dtype).to(device)


def shards_of(w, cut):
    places = [int(part * len(w)) for part in CUTS[cut]]
    return list(w.tensor_split(places))


def of_all_shards(shards, rank, dtype):
    """theta, and the local ranks of every shard: `select` on each of these lists of weights."""
    asked = []  # of each place the prefix and the tables of all shards

    def tables(prefix, place):
        if place == len(asked):
            asked.append((prefix, [ops.call["digits_fwd"](ws, prefix, place) for ws in shards]))
        assert torch.equal(asked[place][0], prefix), "the same on all shards"
        return asked[place][1]

    results = []
    for i in range(len(shards)):
        places = iter(range(dtype.itemsize))
        merge = lambda _, places=places: sum(asked[next(places)][1])  # noqa: E731
        results.append(ranks.select(lambda prefix, place, i=i: tables(prefix, place)[i], merge, rank, dtype))
    thetas, local = zip(*results, strict=True)
    assert len(asked) == dtype.itemsize and all(torch.equal(a, thetas[0]) for a in thetas if not a.isnan().any())
    return thetas[0], torch.stack(local)


@every_dtype
def test_tables_are_those_of_the_reference(dtype, device, variants):
    """Also of what begins as nothing does, of tensors of several chunks, in any order of strides, empty."""
    ws = [numbers(n, dtype, device) for n in (1, 2, 33, 4097, 70_001)]
    ws += [ws[3][:4096].view(64, 64).t(), ws[3][::3], ws[3][1:], ws[0][:0]]
    for place in range(dtype.itemsize):
        values = [w.reshape(-1)[:1] if w.numel() else w.new_zeros(1) for w in ws]
        begins = [int(v.abs().contiguous().view(BITS[dtype.itemsize])) for v in values]
        prefix = torch.tensor([b >> 8 * (dtype.itemsize - place) for b in begins], device=device)
        prefix[4] += 1
        expected = reference.digits_fwd(ws, prefix, place)
        assert expected.shape == (len(ws), RADIX) and expected.dtype == torch.int64
        assert place or torch.equal(expected.sum(1), torch.tensor([w.numel() for w in ws], device=device))
        for variant in variants:
            with variant.chosen():
                assert torch.equal(ops.call["digits_fwd"](ws, prefix, place), expected), f"{variant}, place {place}"


@every_dtype
@first("cut", ["uneven", "empty"], CUTS)
def test_order_statistics_of_shards(cut, dtype, device, variant):
    """At 1, at N, at NaN, where numbers tie, below 1 and above N."""
    for n in (1, 7, 4097):
        w = numbers(n, dtype, device)
        wide = w.abs().to(accumulator(dtype)).sort().values
        asked = sorted({0, 1, min(2, n), n // 3 + 1, n // 2 + 1, 3 * n // 4 + 1, n, n + 5})
        shards = [[part] * len(asked) for part in shards_of(w, cut)]
        theta, local = of_all_shards(shards, torch.tensor(asked, device=device), dtype)
        assert theta.dtype == accumulator(dtype)
        assert theta[0].isnan() and local[:, 0].sum() == 0
        expected = wide[[min(r, n) - 1 for r in asked[1:]]]
        assert torch.equal(theta[1:].nan_to_num(-1), expected.nan_to_num(-1)), n
        for value, found, r in zip(expected, local[:, 1:].T, asked[1:], strict=True):
            if value.isnan():
                assert min(r, n) <= found.sum() <= n
            else:
                assert found.tolist() == [int((part[0].abs() <= value).sum()) for part in shards], (n, r)


@every_dtype
def test_a_list_in_one_search(dtype, device, variant):
    """A rank for each weight, of which one has nothing anywhere, and one only on the first shard."""
    ws = [numbers(n, dtype, device).nan_to_num(0.5) for n in (5000, 40, 300)]
    ws.append(torch.ones(0, dtype=dtype, device=device))
    pieces = [shards_of(ws[0], "even"), shards_of(ws[1], "even"), [ws[2], *[ws[2][:0]] * 3], [ws[3]] * 4]
    rank = torch.tensor([2500, 40, 7, 1], device=device)
    theta, local = of_all_shards([list(some) for some in zip(*pieces, strict=True)], rank, dtype)
    expected = [w.abs().to(theta.dtype).sort().values[r - 1] for w, r in zip(ws, rank.tolist(), strict=True) if len(w)]
    assert theta.tolist() == [*map(float, expected), 0]
    for t, parts in enumerate(pieces):
        assert local[:, t].tolist() == [int((p.abs().to(theta.dtype) <= theta[t]).sum()) for p in parts]


def test_whole_tensors_give_what_partial_l2_takes(device, variant):
    w = numbers(5000, torch.float32, device).nan_to_num()
    rank = torch.tensor([3000], device=device)
    theta, _ = of_all_shards([[w]], rank, w.dtype)
    assert torch.equal(theta, ops.call["partial_l2_fwd"]([w], rank)[1].reshape(-1))


def test_opcheck(device):
    ws = [numbers(n, torch.bfloat16, device) for n in (9, 5000)]
    torch.library.opcheck(ops.op["digits_fwd"], (ws, torch.tensor([63, 64], device=device), 1))
