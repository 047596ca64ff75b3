"""Codes of 1 to 8 bits, packed.

The first code is in the lowest bits of the first byte, and each group of codes starts at a byte.
In the extension; where it was not built, or eager PyTorch was chosen, in numpy to the same bytes.
"""

from typing import NamedTuple

import numpy as np
import torch

from ..backends import chosen


class Groups(NamedTuple):
    """`rows` codes of `bits` bits, in groups of `each`; the last may have fewer."""

    rows: int
    each: int
    bits: int

    @property
    def nbytes(self):
        full, rest = divmod(self.rows, self.each)
        return full * -(-self.each * self.bits // 8) + -(-rest * self.bits // 8)

    def blocks(self):
        """(groups, codes of each, bytes of each) of those that are full, and of the last if it is not."""
        full, rest = divmod(self.rows, self.each)
        return [(count, n, -(-n * self.bits // 8)) for count, n in ((full, self.each), (1, rest)) if count and n]


def launchers():
    """The launchers of the extension on the CPU, or None."""
    if chosen() == "reference":
        return None
    from ..backends import native

    try:
        native.load("cpu")
    except (ImportError, OSError):
        if chosen() == "cpu":
            raise
        return None
    return native


def extension():
    """The function that calls the extension on codes, or None."""
    native = launchers()
    return native and native.on_codes


def pack(codes, groups):
    """(groups.nbytes,) uint8 of `codes`, (rows,) uint8 below 2**bits."""
    codes, call = checked(codes, groups.rows), extension()
    if int(codes.max()) >> groups.bits:
        raise ValueError(f"code {int(codes.max())} does not fit {groups.bits} bits")
    if call is None:
        return torch.from_numpy(_packed(codes.numpy(), groups))
    out = torch.empty(groups.nbytes, dtype=torch.uint8, device="cpu")
    call("pack", codes, tuple(groups), out)
    return out


def unpack(packed, groups):
    """The (rows,) uint8 that `pack` packed."""
    packed, call = checked(packed, groups.nbytes), extension()
    if call is None:
        return torch.from_numpy(_unpacked(packed.numpy(), groups))
    out = torch.empty(groups.rows, dtype=torch.uint8, device="cpu")
    call("unpack", packed, tuple(groups), out)
    return out


def look_up(packed, groups, tables):
    """The (rows, d) entries of `tables`, (number of groups, K, d), K a power of two; each code counts modulo K."""
    tables = tables.contiguous().resolve_neg()
    count, entries, d = tables.shape
    if count < -(-groups.rows // groups.each) or entries & (entries - 1) or entries >> groups.bits > 1:
        raise ValueError(f"tables of shape {tuple(tables.shape)} for {groups}")
    call = None if packed.device.type != "cpu" or torch.compiler.is_compiling() else extension()
    if call is None:
        return _looked_up(packed, groups, tables)
    out = torch.empty(groups.rows, d, dtype=tables.dtype, device="cpu")
    call(
        "look_up",
        checked(packed, groups.nbytes),
        tuple(groups),
        tables,
        entries.bit_length() - 1,
        d * tables.element_size(),
        out,
    )
    return out


def checked(numbers, count):
    """uint8 on the CPU, one after the other and at least so many."""
    if numbers.dtype != torch.uint8 or numbers.numel() < count:
        raise ValueError(f"{numbers.numel()} numbers of {numbers.dtype}; needed are {count} of torch.uint8")
    return numbers.cpu().contiguous()


def _looked_up(packed, groups, tables):
    codes = packed if groups.bits == 8 else torch.from_numpy(_unpacked(checked(packed, groups.nbytes).numpy(), groups))
    entries, d = tables.shape[1:]
    index = codes[: groups.rows].to(tables.device).long() & (entries - 1)
    if len(tables) > 1:
        index += torch.arange(groups.rows, device=index.device) // groups.each * entries
    return tables.reshape(-1, d)[index]


def _packed(codes, groups):
    out, done, at = np.empty(groups.nbytes, np.uint8), 0, 0
    for count, n, size in groups.blocks():
        eights = np.zeros((count, -(-n // 8) * 8), np.uint8)
        eights[:, :n] = codes[done : done + count * n].reshape(count, n)
        joined = _joined(eights.view(np.uint64), groups.bits).view(np.uint8).reshape(count, -1, 8)[..., : groups.bits]
        out[at : at + count * size] = joined.reshape(count, -1)[:, :size].reshape(-1)
        done, at = done + count * n, at + count * size
    return out


def _unpacked(packed, groups):
    out, done, at = np.empty(groups.rows, np.uint8), 0, 0
    for count, n, size in groups.blocks():
        eights = np.zeros((count, -(-n // 8) * groups.bits), np.uint8)
        eights[:, :size] = packed[at : at + count * size].reshape(count, size)
        wide = np.zeros((count, -(-n // 8), 8), np.uint8)
        wide[..., : groups.bits] = eights.reshape(count, -1, groups.bits)
        parted = _parted(wide.view(np.uint64), groups.bits).view(np.uint8)
        out[done : done + count * n] = parted.reshape(count, -1)[:, :n].reshape(-1)
        done, at = done + count * n, at + count * size
    return out


def _fields(width, bits):
    """`bits` ones at the bottom of every `width` bits."""
    return sum((2**bits - 1) << at for at in range(0, 64, width))


def _joined(x, bits):
    """Eight codes in each uint64, from a byte each to `bits` each: neighbours are joined three times."""
    for width, have in ((16, bits), (32, 2 * bits), (64, 4 * bits)):
        mask = _fields(width, have)
        x = (x & np.uint64(mask)) | (x >> np.uint64(width // 2 - have) & np.uint64(mask << have))
    return x


def _parted(x, bits):
    for width, have in ((64, 4 * bits), (32, 2 * bits), (16, bits)):
        mask = _fields(width, have)
        x = (x & np.uint64(mask)) | (x & np.uint64(mask << have)) << np.uint64(width // 2 - have)
    return x
