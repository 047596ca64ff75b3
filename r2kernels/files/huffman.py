"""Canonical Huffman codes of at most 11 bits, in blocks of 65,536 symbols that are decoded on their own.

A code is stored as the length of each symbol's word (0: it has none). Among words of one length the symbols are in
order; the first bit of a word is the lowest of a byte. In the extension, or in numpy to the same bytes.
"""

import numpy as np
import torch

from .packing import checked, extension

LONGEST = 11
AT_ONCE = 5
BLOCK = 65536
_REASONS = {1: "holds a word that is none", 2: "has a block outside of its bytes", 3: "is too short", 4: "is too long"}


def code_lengths(counts):
    """The lengths of the words for symbols that occur so often: those of the least total up to LONGEST.

    By package-merge (Larmore and Hirschberg 1990).
    """
    leaves = [(count, (symbol,)) for symbol, count in enumerate(counts) if count]
    lengths, packages = [0] * len(counts), []
    for _ in range(LONGEST):
        merged = sorted(leaves + packages, key=lambda package: package[0])
        packages = [(a + b, first + second) for (a, first), (b, second) in zip(merged[::2], merged[1::2], strict=False)]
    for _, symbols in packages[: len(leaves) - 1] or leaves:
        for symbol in symbols:
            lengths[symbol] += 1
    return lengths


def encode(codes, lengths):
    """(stream, bytes of each block as int32) of `codes`, (rows,) uint8."""
    words, codes, call = _words(lengths), checked(codes, 1), extension()
    rows, known = len(codes), np.zeros(256, np.uint8)
    known[: len(lengths)] = lengths
    if call is None:
        blocks = [_encoded(block, words, known) for block in np.split(codes.numpy(), range(BLOCK, rows, BLOCK))]
        return torch.from_numpy(np.concatenate(blocks)), torch.tensor(
            [len(block) for block in blocks], dtype=torch.int32, device="cpu"
        )
    known, words = torch.from_numpy(known), torch.from_numpy(words)
    sizes = torch.empty(-(-rows // BLOCK), dtype=torch.int32, device="cpu")
    _check(call("coded_sizes", codes, rows, BLOCK, known, sizes))
    offsets = _offsets(sizes)
    stream = torch.empty(int(offsets[-1]), dtype=torch.uint8, device="cpu")
    _check(call("encode", codes, rows, BLOCK, words, known, offsets, stream))
    return stream, sizes


def decode(stream, sizes, rows, lengths):
    """The (rows,) uint8 that `encode` coded; ValueError where that cannot be. Each is below len(lengths)."""
    table, call = _table(lengths), extension()
    if len(sizes) != -(-rows // BLOCK) or (sizes < 0).any():
        raise ValueError("the stream has blocks of wrong sizes")
    offsets, stream = _offsets(sizes), checked(stream, 0)
    if offsets[-1] > len(stream):
        _check(2)
    if call is None:
        ends, data, counts = offsets.tolist(), stream.numpy(), [min(BLOCK, rows - at) for at in range(0, rows, BLOCK)]
        return torch.from_numpy(
            np.concatenate([_decoded(data[a:b], n, table) for a, b, n in zip(ends[:-1], ends[1:], counts, strict=True)])
        )
    out = torch.empty(rows, dtype=torch.uint8, device="cpu")
    _check(call("decode", stream, len(stream), offsets, rows, BLOCK, torch.from_numpy(table), out))
    return out


def _check(status):
    if status:
        raise ValueError(f"the stream {_REASONS[status]}")


def _offsets(sizes):
    return torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), sizes.long().cumsum(0)])


def _ordered(lengths):
    """(symbol, length, word with its first bit lowest) of every symbol that has one.

    ValueError for lengths that no code has.
    """
    if not any(lengths) or max(lengths) > LONGEST or sum(2 ** (LONGEST - n) for n in lengths if n) > 2**LONGEST:
        raise ValueError("the lengths of the code words are those of no code")
    word, before = 0, 0
    for length, symbol in sorted((n, symbol) for symbol, n in enumerate(lengths) if n):
        word <<= length - before
        yield symbol, length, int(f"{word:0{length}b}"[::-1], 2)
        word, before = word + 1, length


def _words(lengths):
    words = np.zeros(256, np.uint16)
    for symbol, _, word in _ordered(lengths):
        words[symbol] = word
    return words


def _table(lengths):
    """By the next LONGEST bits of the stream, as csrc/huffman.h has it: as many symbols as they hold whole."""
    table, bits = np.zeros(2**LONGEST, np.uint64), np.arange(2**LONGEST, dtype=np.uint64)
    for symbol, length, word in _ordered(lengths):
        table[word :: 2**length] = symbol | length << 40 | length << 48 | 1 << 56
    first = table.copy()
    for i in range(1, AT_ONCE):
        total = table >> np.uint64(48) & np.uint64(15)
        more = first[bits >> total]
        length = more >> np.uint64(48) & np.uint64(15)
        fits = (table >> np.uint64(56) == i) & (length > 0) & (total + length <= LONGEST)
        table[fits] += (
            ((more & np.uint64(255)) << np.uint64(8 * i))[fits] + (length[fits] << np.uint64(48)) + np.uint64(1 << 56)
        )
    return table


def _encoded(codes, words, lengths):
    long, word = lengths[codes].astype(np.int64), words[codes]
    if not long.all():
        _check(1)
    starts = long.cumsum() - long
    bits = np.zeros(long.sum(), np.uint8)
    for j in range(long.max()):
        here = long > j
        bits[starts[here] + j] = word[here] >> j & 1
    return np.packbits(bits, bitorder="little")


def _decoded(data, count, table):
    """One block: the word that would begin at every bit, then where each leads, twice as far in every round."""
    end = 8 * len(data)
    at = np.arange(end)
    near = np.concatenate([data, np.zeros(2, np.uint8)]).astype(np.uint32)
    near = near[:-2] | near[1:-1] << 8 | near[2:] << 16
    entries = table[near[at >> 3] >> (at & 7).astype(np.uint32) & (2**LONGEST - 1)]
    long = (entries >> np.uint64(40) & np.uint64(15)).astype(np.int64)
    lost = end + 1  # after a word that is none, or that is cut off
    step = np.append(np.where((long == 0) | (at + long > end), lost, at + long), [lost, lost])
    where = np.zeros(1, np.int64)
    while len(where) <= count:
        where, step = np.concatenate([where, step[where]]), step[step]
    if where[count] > end:
        _check(3)
    if -(-where[count] // 8) < len(data):
        _check(4)
    return entries[where[:count]].astype(np.uint8)
