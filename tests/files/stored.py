"""Palettized files as bytes: what is in them, and files with something wrong in them."""

import json
import zlib

import pytest

from r2kernels.files import container
from r2kernels.files.checkpoint import CheckpointError
from r2kernels.files.loading import load_palettized


def raw(tensor):
    return tensor.dtype, tensor.shape, bytes(container.as_bytes(tensor))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert raw(found[name]) == raw(tensor), name


def refused(path, data, match=": "):
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_palettized(path)
    assert (
        isinstance(caught.value, ValueError)
        and str(caught.value).startswith(f"{path}: ")
        and "\n" not in str(caught.value)
    )


def parsed(data, nested=("weights", "aliases")):
    """(header, data) of a file; nested: which texts of its metadata are parsed too, where they are there."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    for key in {*nested} & header["__metadata__"].keys():
        header["__metadata__"][key] = json.loads(header["__metadata__"][key])
    return header, data[end:]


def sealed(header, data):
    """A file with this header, which has its right checksum."""
    metadata = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in header["__metadata__"].items()
    }
    written = container.header({name: fields for name, fields in header.items() if name != "__metadata__"}, metadata)
    at = len(container.CHECKSUM_PREFIX)
    if written.startswith(container.CHECKSUM_PREFIX):
        plain = written[:at] + b"00000000" + written[at + 8 :]
        written = plain[:at] + f"{zlib.crc32(len(plain).to_bytes(8, 'little') + plain):08x}".encode() + plain[at + 8 :]
    return len(written).to_bytes(8, "little") + written + data


def put(*keys):
    """An edit: puts the last of `keys` at the place that the others lead to."""
    *path, last, value = keys

    def edit(header):
        for key in path:
            header = header[key]
        if value is KeyError:
            del header[last]
        else:
            header[last] = value

    return edit


def weight(*keys):
    return put("__metadata__", "weights", *keys)
