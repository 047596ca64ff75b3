"""safetensors files, written and read tensor by tensor, with checksums.

A file is the length of its header in eight bytes, the header (JSON: name -> dtype, shape and offsets; `__metadata__`:
strings), and the data. Checksums are CRC-32: `Writer.add` gives that of a tensor, `Writer.finish` puts that of the
header into the header; `Reader.read` and `Reader.check_header` compare them.
"""

import json
import math
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import torch

from .checkpoint import CheckpointError
from .paths import open_regular

DTYPES = {
    name: getattr(torch, dtype)
    for name, dtype in {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
        "C64": "complex64",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "BOOL": "bool",
    }.items()
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # the limit of the safetensors package
MOST_DIMENSIONS = 32
MOVED = 2**24  # bytes at once
NO_CHECKSUM = "0" * 8
CHECKSUM_PREFIX = b'{"__metadata__":{"checksum":"'  # how a header that has a checksum begins


def checksum(data, before=0):
    """CRC-32 of bytes, that of the bytes `before` them taken on."""
    return zlib.crc32(data, before)


def as_bytes(tensor):
    """The memory of a tensor, which is copied only where it is not contiguous or not on the CPU."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def header(entries, metadata):
    """The bytes of a header. `metadata` comes first, so that its first entry lies where `CHECKSUM_PREFIX` says."""
    return json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()


def entry(dtype, shape, begin, end):
    return {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}


def check_storable(name, shape, dtype):
    """An error for a tensor that `Reader` would not take back."""
    if dtype not in NAMES:
        raise CheckpointError(f"{name} has dtype {dtype}; allowed are {', '.join(str(dtype) for dtype in NAMES)}")
    if len(shape) > MOST_DIMENSIONS:
        raise CheckpointError(f"{name} has {len(shape)} dimensions; at most {MOST_DIMENSIONS} can be stored")


class Writer:
    """Writes tensors to `file`, behind a header that is written last and needs at most `room` bytes."""

    def __init__(self, file, room):
        self.file, self.room, self.entries, self.size = file, room + -room % 8, {}, 0
        file.seek(8 + self.room)

    def add(self, name, tensor):
        """Writes a tensor; its checksum."""
        data = as_bytes(tensor)
        self.entries[name] = entry(tensor.dtype, tensor.shape, self.size, self.size + len(data))
        self.file.write(data)
        self.size += len(data)
        return checksum(data)

    def restore(self, entries, checksums):
        """Goes on behind tensors that were added before; CheckpointError unless the file has them, unchanged."""
        for (name, fields), expected in zip(entries.items(), checksums, strict=True):
            begin, end = fields["data_offsets"]
            self.file.seek(8 + self.room + begin)
            found = 0
            for at in range(begin, end, MOVED):
                found = checksum(self.file.read(min(MOVED, end - at)), found)
            if found != expected:
                raise CheckpointError(f"{name} is not in the file as it was written (its checksum differs)")
            self.size = end
        self.entries = dict(entries)
        self.file.seek(8 + self.room + self.size)
        self.file.truncate()

    def finish(self, metadata, tight=False):
        """Writes the header; where `metadata` begins with the checksum NO_CHECKSUM, with its checksum. tight: the data
        are written once more, behind a header as long as it has to be."""
        written = header(self.entries, metadata)
        room = len(written) + -len(written) % 8 if tight else self.room
        written = written.ljust(room)
        if len(written) > self.room:
            raise AssertionError(f"a header of {len(written)} bytes in a room of {self.room}")
        self._move_data(room)
        if written.startswith(CHECKSUM_PREFIX):
            written = _with_checksum(written, f"{_header_checksum(written):08x}")
        self.file.seek(0)
        self.file.write(len(written).to_bytes(8, "little") + written)

    def _move_data(self, room):
        """Puts the data behind a header of so many bytes, which is not longer than it has room for."""
        if room == self.room:
            return
        for at in range(0, self.size, MOVED):
            self.file.seek(8 + self.room + at)
            data = self.file.read(min(MOVED, self.size - at))
            self.file.seek(8 + room + at)
            self.file.write(data)
        self.file.truncate(8 + room + self.size)


def _with_checksum(written, digits):
    """A header with these digits in the place of its checksum."""
    return written[: len(CHECKSUM_PREFIX)] + digits.encode() + written[len(CHECKSUM_PREFIX) + len(digits) :]


def _header_checksum(written):
    """The checksum of a header's length and of the header, with zeros in the place of the checksum itself."""
    return checksum(_with_checksum(written, NO_CHECKSUM), checksum(len(written).to_bytes(8, "little")))


class Stored(NamedTuple):
    """A tensor of a file, and where its bytes lie in the data."""

    dtype: torch.dtype
    shape: tuple
    begin: int
    end: int


class Reader:
    """`entries`: name -> `Stored`, in the order of the data; `metadata`; `read` gives the tensors.

    Nothing in the file is trusted: CheckpointError names the file, and the tensor where it is one. No more memory is
    asked for than the file has bytes.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            self.file = open_regular(self.path)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
        try:
            self._open()
        except BaseException:
            self.file.close()
            raise

    def _open(self):
        size = os.fstat(self.file.fileno()).st_size
        length = int.from_bytes(self.file.read(8), "little")
        if size < 10 or not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise self.error("is truncated or not a safetensors file")
        self.written, self.start = self.file.read(length), 8 + length
        if len(self.written) < length:
            raise self.error("is truncated")
        found = self.json("header", self.written)
        self.metadata = found.pop("__metadata__", {})
        if not isinstance(self.metadata, dict) or not all(isinstance(value, str) for value in self.metadata.values()):
            raise self.error("has metadata that is not text")
        entries = {name: self._stored(name, fields) for name, fields in found.items()}
        self.entries = dict(sorted(entries.items(), key=lambda pair: (pair[1].begin, pair[1].end)))
        at = 0
        for name, stored in self.entries.items():
            if stored.begin != at:
                raise self.error(f"{name} does not begin where the tensor before it ends")
            at = stored.end
        if at != size - self.start:
            raise self.error(f"has {size - self.start} bytes of data where its header says {at}")

    def error(self, reason):
        return CheckpointError(f"{self.path}: {reason}")

    def json(self, what, text):
        """A dictionary, without a name that occurs twice, nor numbers that are not ints."""

        def unique(pairs):
            found = dict(pairs)
            if len(found) < len(pairs):
                raise ValueError("a name occurs twice")
            "".join(found).encode()
            return found

        def refuse(number):
            raise ValueError(f"{number[:20]} is not an int")

        try:
            text = text.decode() if isinstance(text, bytes) else text
            found = json.loads(text, object_pairs_hook=unique, parse_float=refuse, parse_constant=refuse)
        except (ValueError, RecursionError) as error:
            raise self.error(f"its {what} is corrupt ({type(error).__name__}: {str(error)[:80]})") from error
        if not isinstance(found, dict):
            raise self.error(f"its {what} is corrupt")
        return found

    def _stored(self, name, fields):
        if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
            raise self.error(f"{name} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = (fields[key] for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self.error(f"{name} has dtype {dtype!r:.40}; allowed are {', '.join(DTYPES)}")
        shape, (begin, end) = self.shape(name, shape), self._ints(name, offsets, 2)
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise self.error(f"{name} has {end - begin} bytes for shape {shape} of {dtype}")
        return Stored(DTYPES[dtype], shape, begin, end)

    def shape(self, name, value):
        """A shape whose numbers of elements and bytes no arithmetic overflows."""
        shape = tuple(self._ints(name, value))
        if len(shape) > MOST_DIMENSIONS or math.prod(n or 1 for n in shape) * 16 >= 2**63:
            raise self.error(f"{name} has a shape that is too large")
        return shape

    def _ints(self, name, value, count=None):
        if (
            not isinstance(value, list)
            or len(value) != (len(value) if count is None else count)
            or not {*map(type, value)} <= {int}
            or min(value, default=0) < 0
        ):
            raise self.error(f"{name} has a shape or offsets that are not ints >= 0")
        return value

    def check_header(self):
        """An error unless the header has the checksum that it holds."""
        at = len(CHECKSUM_PREFIX)
        if (
            not self.written.startswith(CHECKSUM_PREFIX)
            or self.written[at : at + 8] != f"{_header_checksum(self.written):08x}".encode()
        ):
            raise self.error("its header is corrupt (its checksum differs)")

    def read(self, name, expected=None):
        """The tensor; an error where its checksum is not the one expected."""
        stored = self.entries[name]
        data = torch.empty(stored.end - stored.begin, dtype=torch.uint8, device="cpu")
        self.file.seek(self.start + stored.begin)
        if self.file.readinto(memoryview(data.numpy())) < len(data):
            raise self.error(f"{name} is truncated")
        if expected is not None and checksum(data.numpy()) != expected:
            raise self.error(f"{name} is corrupt (its checksum differs)")
        if stored.dtype is torch.bool and (data > 1).any():
            raise self.error(f"{name} has values that are neither true nor false")
        return data.view(stored.dtype).reshape(stored.shape)

    def close(self):
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()
