"""Packed and Huffman-coded codes: the bytes, in the extension and in numpy, and what neither accepts."""

import heapq
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import r2kernels
from r2kernels.backends import native
from r2kernels.files import huffman, packing
from r2kernels.files.packing import Groups

pytestmark = pytest.mark.usefixtures("one_thread")
IMPLEMENTATIONS = ("cpu", "reference")
SHAPES = [
    (1, 1),
    (7, 7),
    (8, 8),
    (9, 9),
    (64, 64),
    (100, 33),
    (1000, 9),
    (999, 8),
    (65536, 65536),
    (65545, 65545),
    (131079, 65537),
]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    if r2kernels.backends()[request.param] is not None:
        pytest.skip(r2kernels.backends()[request.param])
    with r2kernels.use_backend(request.param):
        yield request.param


def examples(count):
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


def random_codes(rows, symbols, seed=0):
    return torch.randint(symbols, (rows,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def skewed(rows, symbols, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.multinomial(torch.rand(symbols, generator=g) ** 4 + 1e-9, rows, True, generator=g).to(torch.uint8)


def packed_by_hand(codes, groups):
    """One large number for each group."""
    parts = [codes[i : i + groups.each].tolist() for i in range(0, groups.rows, groups.each)]
    return b"".join(
        sum(c << i * groups.bits for i, c in enumerate(part)).to_bytes(-(-len(part) * groups.bits // 8), "little")
        for part in parts
    )


# codes, bits, codes of a group, bytes
LITERALS = [
    ([1, 0, 1, 1, 0, 0, 0, 1, 1], 1, 9, [0b10001101, 1]),
    ([1, 0, 1, 1, 0, 0, 0, 1, 1], 1, 2, [0b01, 0b11, 0b00, 0b10, 0b1]),
    ([3, 0, 1, 2, 3], 2, 5, [0b10010011, 0b11]),
    ([5, 2, 7], 3, 3, [0b11010101, 0b1]),
    ([0, 1, 2, 3, 4, 5, 6, 7], 3, 8, [0b10001000, 0b11000110, 0b11111010]),
    ([15, 1, 2], 4, 3, [0x1F, 2]),
    ([255, 7], 8, 2, [255, 7]),
    ([127], 7, 1, [127]),
]


@pytest.mark.parametrize(("codes", "bits", "each", "expected"), LITERALS, ids=str)
def test_literals(codes, bits, each, expected, implementation):
    groups = Groups(len(codes), each, bits)
    found = packing.pack(torch.tensor(codes, dtype=torch.uint8), groups)
    assert found.tolist() == expected and groups.nbytes == len(expected)
    assert packing.unpack(found, groups).tolist() == codes


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width(bits, implementation):
    for rows, each in SHAPES:
        groups, codes = Groups(rows, each, bits), random_codes(rows, 2**bits)
        found = packing.pack(codes, groups)
        if rows <= 1000:
            assert bytes(found.numpy()) == packed_by_hand(codes, groups)
        with r2kernels.use_backend("reference"):
            assert torch.equal(found, packing.pack(codes, groups))
        assert torch.equal(packing.unpack(found, groups), codes)
        assert torch.equal(packing.unpack(torch.cat([found, found.new_full((3,), 255)]), groups), codes)


@given(bits=st.integers(1, 8), values=st.lists(st.integers(0, 255), min_size=1, max_size=80), each=st.integers(1, 90))
@examples(150)
def test_round_trip(bits, values, each):
    codes = torch.tensor(values, dtype=torch.uint8) & (2**bits - 1)
    groups = Groups(len(codes), min(each, len(codes)), bits)
    found = packing.pack(codes, groups)
    assert bytes(found.numpy()) == packed_by_hand(codes, groups) and torch.equal(packing.unpack(found, groups), codes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 8])
def test_look_up(d, dtype, implementation):
    for bits in (1, 3, 4, 8):
        for rows, each in ((1, 1), (100, 33), (65545, 65545) if d == 1 else (999, 999)):
            codes, count = random_codes(rows, 2**bits), -(-rows // each)
            tables = torch.randn(count, 2**bits, d, generator=torch.Generator().manual_seed(1)).to(dtype)
            expected = tables[torch.arange(rows) // each, codes.long()]
            assert torch.equal(
                packing.look_up(packing.pack(codes, Groups(rows, each, bits)), Groups(rows, each, bits), tables),
                expected,
            )
            assert torch.equal(packing.look_up(codes, Groups(rows, each, 8), tables), expected)


def test_threads():
    """They share the work, and the bytes are the same."""
    codes, lengths, found = skewed(300_001, 16), [4] * 16, []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        packed = packing.pack(codes, Groups(300_001, 100_000, 5))
        stream, sizes = huffman.encode(codes, lengths)
        assert torch.equal(packing.unpack(packed, Groups(300_001, 100_000, 5)), codes)
        assert torch.equal(huffman.decode(stream, sizes, 300_001, lengths), codes)
        found.append((packed, stream, sizes))
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))


def test_no_code_reaches_past_its_table(implementation):
    codes = torch.tensor([0, 3, 4, 7, 255], dtype=torch.uint8)
    assert packing.look_up(codes, Groups(5, 5, 8), torch.arange(4.0).reshape(1, 4, 1))[:, 0].tolist() == [0, 3, 0, 3, 3]


def test_strides(implementation):
    codes = random_codes(200, 8)
    groups = Groups(100, 100, 3)
    found = packing.pack(codes[::2], groups)
    assert torch.equal(packing.unpack(found, groups), codes[::2])
    table = torch.randn(8, 2).t()[None].transpose(1, 2)
    assert torch.equal(packing.look_up(found, groups, table), table[0][codes[::2].long()])


def test_refuses(implementation):
    with pytest.raises(ValueError, match="code 4 does not fit 2 bits"):
        packing.pack(torch.tensor([1, 4], dtype=torch.uint8), Groups(2, 2, 2))
    short, groups = torch.zeros(2, dtype=torch.uint8), Groups(9, 9, 2)
    with pytest.raises(ValueError, match="needed are 3 of"):
        packing.unpack(short, groups)
    with pytest.raises(ValueError, match="needed are 3 of"):
        packing.look_up(short, groups, torch.zeros(1, 4, 1))
    for call in (packing.pack, packing.unpack):
        with pytest.raises(ValueError, match="numbers of torch"):
            call(torch.zeros(9, dtype=torch.int64), groups)
    with pytest.raises(ValueError, match="8 numbers of torch"):
        packing.pack(torch.zeros(8, dtype=torch.uint8), groups)
    with pytest.raises(ValueError, match="numbers of torch"):
        huffman.encode(torch.zeros(9, dtype=torch.int32), [1, 1])
    for shape in ((1, 8, 1), (1, 3, 1), (0, 4, 1)):
        with pytest.raises(ValueError, match="tables of shape"):
            packing.look_up(torch.zeros(9, dtype=torch.uint8), groups, torch.zeros(shape))
    with pytest.raises(ValueError, match="tables of shape"):
        packing.look_up(torch.zeros(9, dtype=torch.uint8), Groups(9, 3, 2), torch.zeros(2, 4, 1))


def test_without_the_extension(monkeypatch):
    def missing(name):
        raise ImportError("not built")

    monkeypatch.setattr(native, "load", missing)
    assert packing.extension() is None
    assert packing.pack(torch.tensor([1, 2], dtype=torch.uint8), Groups(2, 2, 2)).tolist() == [9]
    monkeypatch.setattr(packing, "chosen", lambda: "cpu")
    with pytest.raises(ImportError, match="not built"):
        packing.extension()


def test_code_lengths():
    assert huffman.code_lengths([5]) == [1]
    assert huffman.code_lengths([0, 3, 0, 0]) == [0, 1, 0, 0]
    assert huffman.code_lengths([1, 1]) == [1, 1]
    assert huffman.code_lengths([8, 4, 2, 1, 1]) == [1, 2, 3, 4, 4]
    assert huffman.code_lengths([1] * 8) == [3] * 8
    assert huffman.code_lengths([1] * 256) == [8] * 256
    lengths = huffman.code_lengths([2**i for i in range(40)])
    assert (
        max(lengths) == huffman.LONGEST
        and sum(2.0**-n for n in lengths) == 1
        and lengths == sorted(lengths, reverse=True)
    )


def least_total(counts):
    """Of all prefix codes, by Huffman's own algorithm."""
    heap, total = [c for c in counts if c], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        total += both
        heapq.heappush(heap, both)
    return total


@given(counts=st.lists(st.integers(0, 1000) | st.integers(0, 10**9), min_size=1, max_size=256).filter(any))
@examples(120)
def test_code_lengths_are_optimal(counts):
    lengths = huffman.code_lengths(counts)
    used = [n for n in lengths if n]
    assert [n > 0 for n in lengths] == [c > 0 for c in counts] and max(used) <= huffman.LONGEST
    total = sum(n * c for n, c in zip(lengths, counts, strict=True))
    assert total <= sum(counts) * max(math.ceil(math.log2(len(used))), 1)
    if len(used) > 1:
        assert sum(2.0**-n for n in used) == 1 and total >= least_total(counts)
        if max(used) < huffman.LONGEST:
            assert total == least_total(counts)


def test_a_stream_by_hand(implementation):
    """Words 0, 01, 11 from their first bit: symbols 1, 0, 2, 1 are 0 01 11 0, the first bit lowest."""
    stream, sizes = huffman.encode(torch.tensor([1, 0, 2, 1], dtype=torch.uint8), [2, 1, 2])
    assert (stream.tolist(), sizes.tolist()) == ([0b0_11_01_0], [1])
    assert huffman.decode(stream, sizes, 4, [2, 1, 2]).tolist() == [1, 0, 2, 1]


@pytest.mark.parametrize("symbols", [1, 2, 3, 16, 256])
def test_coded(symbols, implementation):
    for rows in (1, 2, 39, 40, 41, 1000, huffman.BLOCK, huffman.BLOCK + 1, 2 * huffman.BLOCK, 150_000):
        codes = skewed(rows, symbols)
        counts = torch.bincount(codes, minlength=symbols).tolist()
        lengths = huffman.code_lengths(counts)
        stream, sizes = huffman.encode(codes, lengths)
        assert len(sizes) == -(-rows // huffman.BLOCK) and sizes.sum() == len(stream)
        assert len(stream) <= sum(n * c for n, c in zip(lengths, counts, strict=True)) / 8 + len(sizes)
        with r2kernels.use_backend("reference"):
            other = huffman.encode(codes, lengths)
        assert torch.equal(stream, other[0]) and torch.equal(sizes, other[1])
        assert torch.equal(huffman.decode(stream, sizes, rows, lengths), codes)


@given(values=st.lists(st.integers(0, 40).map(lambda v: v * v // 8), min_size=1, max_size=200))
@examples(80)
def test_coded_round_trip(values):
    codes = torch.tensor(values, dtype=torch.uint8)
    lengths = huffman.code_lengths(torch.bincount(codes, minlength=256).tolist())
    assert huffman.decode(*huffman.encode(codes, lengths), len(codes), lengths).tolist() == values


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([0, 0], "no code"),
        ([1, 1, 1], "no code"),
        ([12, 12], "no code"),
        ([255, 1], "no code"),
        ([2, 1], "holds a word that is none|too short|too long"),
    ],
)
def test_wrong_lengths(lengths, message, implementation):
    with pytest.raises(ValueError, match=message):
        huffman.decode(torch.full((1,), 255, dtype=torch.uint8), torch.tensor([1]), 4, lengths)


def test_wrong_streams(implementation):
    codes, lengths = skewed(70_000, 16), [4] * 16
    stream, sizes = huffman.encode(codes, lengths)
    for sizes_2, stream_2, message in [
        (sizes[:1], stream, "wrong sizes"),
        (sizes * torch.tensor([1, -1]), stream, "wrong sizes"),
        (sizes + 1, stream, "outside of its bytes"),
        (sizes, stream[:-1], "outside of its bytes"),
        (sizes - torch.tensor([0, 1]), stream, "too short"),
        (sizes + torch.tensor([-1, 1]), stream, "too short|too long"),
        (sizes - torch.tensor([1, 0]), stream, "too short"),
        (sizes + torch.tensor([0, 1]), torch.cat([stream, stream[:1]]), "too long"),
    ]:
        with pytest.raises(ValueError, match=message):
            huffman.decode(stream_2, sizes_2.int(), 70_000, lengths)
    with pytest.raises(ValueError, match="word that is none"):
        huffman.encode(torch.tensor([0, 1], dtype=torch.uint8), [1, 0, 1])


LENGTHS = [[4] * 16, [1, 2, 3, 4, 5, 5], [2, 2, 2], [11, 1]]


@given(
    data=st.binary(min_size=1, max_size=60),
    rows=st.integers(1, 120),
    cut=st.integers(0, 60),
    kind=st.sampled_from(LENGTHS),
)
@examples(200)
def test_any_stream_gives_codes_or_an_error(data, rows, cut, kind):
    """And the same of both in the extension and in numpy."""
    stream = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    outcomes = []
    for implementation in (None, "reference"):
        with r2kernels.use_backend(implementation):
            try:
                found = huffman.decode(stream, torch.tensor([min(cut, len(data))], dtype=torch.int32), rows, kind)
                assert found.shape == (rows,) and int(found.max()) < len(kind)
                outcomes.append(found.tolist())
            except ValueError:
                outcomes.append(None)
    assert outcomes[0] == outcomes[1]
