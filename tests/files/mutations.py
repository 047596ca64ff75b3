"""Palettized files that are changed at random: small ones of every kind, what is done to them, and what must hold.

Checksums are made anew after most changes, so that what they guard is reached.
"""

import json
import zlib

import torch
from files.stored import parsed, raw, sealed

import r2kernels
from r2kernels.files.checkpoint import CheckpointError
from r2kernels.files.clustered import Clustered, Form
from r2kernels.files.format import Planned
from r2kernels.files.integers import IntegerInput
from r2kernels.files.loading import load_palettized
from r2kernels.files.saving import saving
from r2kernels.files.uniform import Grid
from r2kernels.nn.clipping import coded

NUMBERS = (-1, 0, 1, 2, 3, 7, 8, 9, 64, 255, 256, 65536, 2**31, 2**32, 2**62, 2**63, 2**64, 10**40)
NESTED = ("weights", "aliases", "inputs", "user")  # texts of the metadata that are JSON
VALUES = (*NUMBERS, 0.5, True, None, "", "F32", "output", "uniform", "a", "0x1p-3", [], {})
SMALL = [
    ((10, 7, 3), Form(2), Grid(2), torch.float32, None),
    ((10, 7, 3), Form(3, 2, "output", 3, True, "int8"), Grid(4, 0), torch.bfloat16, None),
    ((7, 10, 3), Form(1, 4, "output", 4, True, "fp32", 1), Grid(3, 1), torch.float16, None),
    ((9, 20, 5), Form(4, 2, "contiguous", None, False, "fp16"), Grid(5, 0, 20), torch.float64, "huffman"),
    ((30, 30), Form(3, 1, "output", 7, True), Grid(8), torch.float32, "huffman"),
    ((10, 7, 3), Form(2, 3, granularity=(4, 6), lut_dtype="fp8"), Grid(2), torch.float32, None),
    ((4, 9, 6), Form(2, granularity=(1, 3, 4), lut_dtype="bf16"), Grid(6), torch.bfloat16, "huffman"),
]
BLOCKS = ((4, 16386), Form(3), Grid(2), torch.float32, "huffman")  # two of a Huffman stream, the last of 8 codes


def seed(path, shape, form, grid, dtype, entropy):
    """The bytes of a file with a weight of either kind, tensors of neither, other names and metadata."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).pow(5).to(dtype)
    table = torch.linspace(-0.5, 3, 2**form.bits * form.cluster_dim, dtype=torch.promote_types(dtype, torch.float32))
    groups = form.parts(shape, dtype)["lut"][1][0]
    centroids = table.reshape(1, -1, form.cluster_dim).expand(groups, -1, -1).contiguous()
    values = {
        "a": Clustered.of(w, centroids, form),
        "b.u": coded(w, grid, "minmax", False),
        "w": w[:2, :2].contiguous(),
        "e": torch.empty(0, 2),
        "t": torch.tensor([True, False]),
    }
    planned = [Planned(name, tuple(v.shape), v.dtype, getattr(v, "form", None)) for name, v in values.items()]
    inputs = {"b": IntegerInput(4, 0.5, 3, False)} if grid.axis == 0 else None
    with saving(path, planned, {"c": "a"}, entropy=entropy, user={"license": "MIT"}, inputs=inputs) as saver:
        for name, value in values.items():
            saver.add(name, value)
    return path.read_bytes()


def changed(value, rng):
    """A copy of JSON with one place in it changed."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.93:
        copy = dict(value) if isinstance(value, dict) else list(value)
        key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
        what = rng.random()
        if what < 0.05:
            del copy[key]
        elif what < 0.1 and isinstance(copy, dict):
            copy[rng.choice(("a:lut", "a", "__metadata__", "x", "axis", "group_size", "granularity", "kind"))] = copy[
                key
            ]
        else:
            copy[key] = changed(copy[key], rng)
        return copy
    if type(value) is int and rng.random() < 0.7:
        return value + rng.choice((-8, -1, 1, 2, 8))
    return rng.choice(VALUES)


def with_changed_header(header, data, rng):
    """In a description more often than elsewhere: most of what is elsewhere is seen at once."""
    metadata = header["__metadata__"]
    nested = rng.choice([key for key in metadata if key in NESTED])
    if rng.random() < 0.6 and isinstance(metadata[nested], dict):
        return {**header, "__metadata__": {**metadata, nested: changed(metadata[nested], rng)}}, data
    return changed(header, rng), data


def with_changed_part(header, data, rng):
    """Other bytes in one tensor: some of them, all, or more or fewer of those of a part of any length."""
    name = rng.choice([name for name in header if name != "__metadata__"])
    begin, end = header[name]["data_offsets"]
    part, what = bytearray(data[begin:end]), rng.random()
    if what < 0.4 and part:
        for _ in range(rng.randint(1, 3)):
            part[rng.randrange(len(part))] = rng.choice((0, 1, 11, 12, 127, 128, 255, rng.randrange(256)))
    elif what < 0.7:
        part = bytearray(rng.randbytes(len(part)))
    elif what < 0.8:
        part = bytearray(rng.choice((b"\0", b"\1", b"\xff")) * len(part))
    elif header[name]["dtype"] == "U8" and len(header[name]["shape"]) == 1:
        part = (part + bytes(9))[: max(0, len(part) + rng.randint(-9, 9))]
    longer = len(part) - (end - begin)
    header = json.loads(json.dumps(header))
    for other, fields in header.items():
        if other == name:
            fields["shape"] = [len(part)] if longer else fields["shape"]
            fields["data_offsets"] = [begin, end + longer]
        elif other != "__metadata__" and fields["data_offsets"][0] >= end and fields["data_offsets"] != [begin, end]:
            fields["data_offsets"] = [at + longer for at in fields["data_offsets"]]
    return header, data[:begin] + bytes(part) + data[end:]


def with_checksums(header, data):
    """The header with the checksums of the data, where it still says where those are."""
    try:
        places = sorted(fields["data_offsets"] for name, fields in header.items() if name != "__metadata__")
        sums = "".join(f"{zlib.crc32(data[begin:end]):08x}" for begin, end in places)
        return {**header, "__metadata__": {**header["__metadata__"], "checksums": sums}}
    except (TypeError, KeyError, ValueError):
        return header


def resealed(data):
    """The file with the checksums that it would have if it were meant, where there is a header to put them into."""
    try:
        header, content = parsed(data, NESTED)
        return sealed(with_checksums(header, content), content)
    except (TypeError, LookupError, ValueError, AttributeError, RecursionError):
        return data


def changed_bytes(data, rng):
    """Bytes changed, cut off, put in or left out anywhere."""
    at, count = rng.randrange(len(data)), rng.choice((1, 2, 8, 100))
    return rng.choice(
        (
            data[:at],
            data[:at] + rng.randbytes(count) + data[at:],
            data[:at] + data[at + count :],
            data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
        )
    )


def mutated(data, rng):
    """A file that is like this one, but for a change or two."""
    if rng.random() < 0.1:
        return changed_bytes(data, rng)
    header, content = parsed(data, NESTED)
    try:
        for _ in range(rng.choice((1, 1, 1, 2))):
            header, content = rng.choice((with_changed_header, with_changed_part))(header, content, rng)
    except (TypeError, LookupError, ValueError, AttributeError):
        pass  # the second of two changes, where the first has left nothing of what it would change
    try:
        return sealed(with_checksums(header, content) if rng.random() < 0.95 else header, content)
    except (TypeError, AttributeError, KeyError):  # without metadata to put a checksum into
        written = json.dumps(header).encode()
        return len(written).to_bytes(8, "little") + written + content


def outcome(path):
    """What `load_palettized` makes of a file: name -> bytes of each tensor, or the reason for which it is refused."""
    try:
        return {name: raw(tensor) for name, tensor in load_palettized(path).items()}
    except CheckpointError as error:
        assert "\n" not in str(error) and str(error).startswith(f"{path}: ")
        return str(error)


def checked_outcome(path, data):
    """The same in the extension, where there is one, and in numpy; anything but a CheckpointError is a finding.

    Neither has a part in what is refused before the contents of a tensor are read.
    """
    path.write_bytes(data)
    found = outcome(path)
    if isinstance(found, dict) or " is corrupt (" in found:
        with r2kernels.use_backend("reference"):
            plain = outcome(path)
        assert found == plain or (isinstance(found, str) and isinstance(plain, str))
    return found
