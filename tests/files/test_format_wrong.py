"""Palettized files that are wrong: each is refused in one line that names the file, and the tensor where it is one."""

import itertools
import json
import zlib

import pytest
import torch
from files.stored import parsed, put, refused, sealed, weight

import r2kernels
from r2kernels.files import container
from r2kernels.files.checkpoint import CheckpointError
from r2kernels.files.clustered import Clustered, Form
from r2kernels.files.loading import Palettized, is_palettized, load_palettized
from r2kernels.files.saving import save_clustered

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).pow(3)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file of every kind of part, and its bytes."""
    path = tmp_path_factory.mktemp("small") / "f"
    made = {
        "a": Clustered.of(
            draw(5, 7).half(), torch.linspace(-1, 1, 16).reshape(2, 4, 2), Form(2, 2, "output", 3, True, "int8")
        ),
        "h": Clustered.of(draw(40, 40), torch.linspace(-15, 15, 8).reshape(1, 8, 1), Form(3)),
    }
    state = {name: c.decoded() for name, c in made.items()}
    save_clustered(
        made,
        {**state, "t": state["h"], "m": torch.tensor([True, False]), "s": torch.tensor(3)},
        path,
        entropy="huffman",
    )
    assert load_palettized(path).keys() == {"a", "h", "t", "m", "s"} and b"huffman" in path.read_bytes()
    return path.read_bytes()


def test_every_changed_byte_is_seen(tmp_path, small):
    for i, change in itertools.product(range(len(small)), (1, 0x20, 0xFF)):
        refused(tmp_path / "f", small[:i] + bytes([small[i] ^ change]) + small[i + 1 :])


def test_every_truncation_and_addition_is_seen(tmp_path, small):
    for end in range(len(small)):
        refused(tmp_path / "f", small[:end])
    for more in (b"\0", b" " * 8, small):
        refused(tmp_path / "f", small + more, "bytes of data where its header says")


def test_a_file_that_is_written_again(tmp_path, small):
    (tmp_path / "f").write_bytes(sealed(*parsed(small)))
    assert len(load_palettized(tmp_path / "f")) == 5


def renamed(weight, name):
    """An edit: another name for a clustered weight."""

    def edit(header):
        weights = header["__metadata__"]["weights"]
        weights[name] = weights.pop(weight)
        for part in [key for key in header if key.startswith(f"{weight}:")]:
            header[part.replace(weight, name, 1)] = header.pop(part)

    return edit


EDITS = {
    "another format": (put("__metadata__", "format", "other"), "is not a palettized file"),
    "no format": (put("__metadata__", "format", KeyError), "is not a palettized file"),
    "another version": (
        put("__metadata__", "version", "3"),
        "has version '3' of the format; this version of r2kernels reads '1' and '2'",
    ),
    "no version": (put("__metadata__", "version", KeyError), "has version None"),
    "more metadata": (put("__metadata__", "more", "x"), "has metadata other than"),
    "fewer checksums": (put("__metadata__", "checksums", "00000000"), "has checksums that are not those of 11 tensors"),
    "no hexadecimal": (put("__metadata__", "checksums", "0000000G" * 11), "has checksums that are not"),
    "wrong checksums": (put("__metadata__", "checksums", "01234567" * 11), r"is corrupt \(its checksum differs\)"),
    "weights": (put("__metadata__", "weights", []), "its list of weights is corrupt"),
    "weights cut off": (put("__metadata__", "weights", '{"a"'), "its list of weights is corrupt"),
    "aliases": (put("__metadata__", "aliases", "[" * 100_000), "its list of aliases is corrupt"),
    "a weight twice": (
        put("__metadata__", "weights", '{"a":1,"a":2}'),
        "its list of weights is corrupt .*occurs twice",
    ),
    "an alias of nothing": (put("__metadata__", "aliases", "t", "nothing"), "t is another name of nothing"),
    "an alias of an alias": (put("__metadata__", "aliases", "u", "t"), "u is another name of nothing"),
    "an alias of a number": (put("__metadata__", "aliases", "t", 3), "t is another name of nothing"),
    "an alias that exists": (
        put("__metadata__", "aliases", "s", "h"),
        "s is another name of nothing, or a name that occurs twice",
    ),
    "an alias of the metadata": (
        put("__metadata__", "aliases", "__metadata__", "h"),
        "__metadata__ cannot be stored: a part of the file has this name",
    ),
    "an alias of a part": (
        put("__metadata__", "aliases", "a:lut", "h"),
        "a:lut cannot be stored: a part of the file has this name",
    ),
    "a weight of the metadata": (
        renamed("a", "__metadata__"),
        "__metadata__ cannot be stored: a part of the file has this name",
    ),
    "many aliases": (
        put("__metadata__", "aliases", {f"{i}": "h" for i in range(20_000)}),
        r"its tensors would take 128,006,480 bytes \(the largest, h, 6,400\) but share 6,480; allowed are 64 times",
    ),
    "no description": (weight("a", 3), "a is not described"),
    "less described": (weight("a", "bits", KeyError), "a is not described"),
    "more described": (weight("a", "more", 1), "a is not described"),
    "undescribed": (weight("a", KeyError), "has checksums|is corrupt|nothing|wrong|other"),
    "bits 0": (weight("a", "bits", 0), "a has bits 0, which is not allowed"),
    "bits 9": (weight("a", "bits", 9), "a has bits 9, which is not allowed"),
    "bits 3": (weight("a", "bits", 3), "a has a part 'lut' of .* which does not agree"),
    "bits true": (weight("a", "bits", True), "a has bits True"),
    "bits text": (weight("a", "bits", "2"), "a has bits '2'"),
    "bits 2.0": (put("__metadata__", "weights", '{"a":{"shape":[5,7],"dtype":"F16","bits":2.0}}'), "2.0 is not an int"),
    "cluster_dim 0": (weight("a", "cluster_dim", 0), "a has cluster_dim 0"),
    "cluster_dim 65": (weight("a", "cluster_dim", 65), "a has cluster_dim 65"),
    "cluster_dim 3": (weight("a", "cluster_dim", 3), "a has a part 'lut'"),
    "layout": (weight("a", "layout", "input"), "a has layout 'input'"),
    "layout list": (weight("a", "layout", ["output"]), "a has layout"),
    "group_size 0": (weight("a", "group_size", 0), "a has group_size 0"),
    "group_size 2": (weight("a", "group_size", 2), "a has a part 'lut'"),
    "group_size huge": (weight("a", "group_size", 10**30), "a has group_size"),
    "granularity text": (weight("h", "granularity", "channel"), "h has granularity 'channel', which is not allowed"),
    "granularity true": (weight("h", "granularity", [True, 8]), r"h has granularity \(True, 8\)"),
    "granularity 0": (weight("h", "granularity", [0, 8]), r"h has granularity \(0, 8\)"),
    "granularity huge": (weight("h", "granularity", [8, 10**30]), "h has granularity"),
    "granularity of lists": (weight("h", "granularity", [[8], 8]), "h has granularity"),
    "granularity of one": (weight("h", "granularity", [8]), "h has granularity"),
    "granularity of four": (weight("h", "granularity", [8, 8, 8, 8]), "h has granularity"),
    "granularity of groups": (weight("h", "granularity", [8, None]), "h has granularity"),
    "granularity and groups": (weight("a", "granularity", [2, 2]), "a has granularity"),
    "granularity of many tables": (weight("h", "granularity", [1, 1]), "h has a part 'lut' of .* which does not agree"),
    "lut_dtype fp8": (weight("h", "lut_dtype", "fp8"), "h has a part 'lut' of torch.float32"),
    "lut_dtype bf16": (weight("h", "lut_dtype", "bf16"), "h has a part 'lut' of torch.float32"),
    "per_channel_scale": (weight("a", "per_channel_scale", 1), "a has per_channel_scale 1"),
    "scale missing": (weight("h", "per_channel_scale", True), "h has no part 'scale'"),
    "lut_dtype": (weight("a", "lut_dtype", {}), "a has lut_dtype"),
    "lut_dtype fp16": (weight("a", "lut_dtype", "fp16"), "a has a part 'lut' of torch.int8"),
    "entropy": (weight("h", "entropy", "zip"), "h has entropy 'zip'"),
    "entropy without parts": (weight("a", "entropy", "huffman"), "a has no part 'lengths'"),
    "dtype": (weight("a", "dtype", "I8"), "a has dtype 'I8'"),
    "dtype of the weight": (weight("a", "dtype", "BF16"), "a has a part 'scale' of torch.float16"),
    "shape": (weight("a", "shape", [5, 8]), "a has .* which does not agree"),
    "shape negative": (weight("a", "shape", [-5, -7]), "a has a shape or offsets that are not ints >= 0"),
    "shape of nothing": (weight("a", "shape", []), r"a has shape \[\]"),
    "shape empty": (weight("a", "shape", [0, 7]), "a has shape"),
    "shape text": (weight("a", "shape", "57"), "a has a shape or offsets"),
    "shape true": (weight("a", "shape", [True, 35]), "a has a shape or offsets"),
    "shape of 33": (weight("a", "shape", [1] * 33), "a has a shape that is too large"),
    "shape huge": (weight("h", "shape", [2**20, 2**20]), "h has .* does not agree"),
    "shape overflowing": (weight("h", "shape", [2**32, 2**32]), "h has a shape that is too large"),
    "shape beyond 64 bits": (weight("h", "shape", [10**4000]), "h has a shape that is too large"),
    "shape less than a row": (weight("a", "shape", [1, 1]), "a has .* of less than a row"),
    "part missing": (put("a:lut", KeyError), "does not begin where"),
    "part renamed": (lambda header: header.update({"a:tul": header.pop("a:lut")}), "a has no part 'lut'"),
    "part of another shape": (put("a:lut", "shape", [8, 2, 1]), "a has a part 'lut'"),
    "part of another dtype": (put("h:lengths", "dtype", "I8"), "h has a part 'lengths' of torch.int8"),
    "offsets negative": (put("a:codes", "data_offsets", [-1, 5]), "a:codes has a shape or offsets"),
    "offsets swapped": (put("a:codes", "data_offsets", [5, 1]), "a:codes has -4 bytes"),
    "offsets of 3": (put("a:codes", "data_offsets", [5, 1, 2]), "a:codes has a shape or offsets"),
    "overlap": (lambda header: header.update({"x": header["a:lut"]}), "does not begin where the tensor before it ends"),
    "unknown dtype": (put("s", "dtype", "Q9"), "s has dtype 'Q9'; allowed are"),
    "dtype list": (put("s", "dtype", ["F32"]), "s has dtype"),
    "entry": (put("s", 3), "s is not described by dtype"),
    "metadata of numbers": (put("__metadata__", {"format": 3}), "has metadata that is not text"),
    "metadata of text": (put("__metadata__", "text"), "has metadata that is not text"),
}


@pytest.mark.parametrize("kind", [kind for kind in EDITS if kind != "undescribed"])
def test_wrong_headers(tmp_path, small, kind, monkeypatch):
    """All are seen before anything is read that would be as large as they say."""
    edit, message = EDITS[kind]
    header, data = parsed(small)
    edit(header)
    if "checksum differs" not in message:
        monkeypatch.setattr(container.Reader, "read", lambda *args: pytest.fail("read"))
    if header["__metadata__"] in ({"format": 3}, "text"):
        written = json.dumps(header).encode()
        refused(tmp_path / "f", len(written).to_bytes(8, "little") + written + data, message)
    else:
        refused(tmp_path / "f", sealed(header, data), message)


def test_a_weight_that_is_not_described_is_its_parts(tmp_path, small):
    header, data = parsed(small)
    EDITS["undescribed"][0](header)
    (tmp_path / "f").write_bytes(sealed(header, data))
    assert {"a:lut", "a:codes"} < load_palettized(tmp_path / "f").keys()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"{} x",
        b'{"a":1,"a":1}',
        b'{"\xff":1}',
        b'{"\\ud800":1}',
        b'{"a":NaN}',
        b"[" * 10**5,
        b'{"a":' + b"9" * 5000 + b"}",
    ],
    ids=range(11),
)
def test_headers_that_are_none(tmp_path, text):
    refused(tmp_path / "f", len(text).to_bytes(8, "little") + text)


@pytest.mark.parametrize("length", [0, 1, 100, 2**31, 2**63, 2**64 - 1])
def test_lengths_of_headers(tmp_path, small, length):
    refused(tmp_path / "f", length.to_bytes(8, "little") + small[8:])


def test_other_files(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match=r"No such file|is a directory"):
            load_palettized(path)
    torch.save({"w": torch.ones(2, 2)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_palettized(tmp_path / "a.pt")
    assert not is_palettized(tmp_path / "a.pt") and not is_palettized(tmp_path / "none")


def rewritten(small, name, change):
    """The file with other bytes in one tensor, all checksums right."""
    header, data = parsed(small)
    names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    parts = {n: data[slice(*header[n]["data_offsets"])] for n in names}
    parts[name] = change(parts[name])
    header["__metadata__"]["checksums"] = "".join(f"{zlib.crc32(parts[n]):08x}" for n in names)
    return sealed(header, b"".join(parts[n] for n in names))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("h:lengths", lambda b: bytes(len(b)), "h is corrupt .*no code"),
        ("h:lengths", lambda b: b"\1" * len(b), "h is corrupt .*no code"),
        ("h:lengths", lambda b: b"\x0c" + b[1:], "h is corrupt"),
        ("h:blocks", lambda b: b"\xff" * len(b), "h is corrupt"),
        ("h:blocks", lambda b: bytes(len(b)), "h is corrupt"),
        ("h:blocks", lambda b: bytes([b[0] - 1]) + b[1:], "h is corrupt .*too short"),
        ("h:codes", lambda b: b"\xff" * len(b), "h is corrupt"),
        ("h:codes", lambda b: bytes(len(b)), "h is corrupt"),
        ("m", lambda b: b"\2\1", "m has values"),
    ],
)
def test_wrong_contents(tmp_path, small, name, change, message):
    data = rewritten(small, name, change)
    refused(tmp_path / "f", data, message)
    with r2kernels.use_backend("reference"):
        refused(tmp_path / "f", data, message)


def test_packed_codes_all_have_an_entry(tmp_path, small):
    """Whatever the bytes are."""
    (tmp_path / "f").write_bytes(rewritten(small, "a:codes", lambda b: b"\xff" * len(b)))
    with Palettized(tmp_path / "f") as file:
        found = file.clustered("a")
        assert found.unpacked().codes.tolist() == [3] * len(found.unpacked().codes)
    assert load_palettized(tmp_path / "f")["a"].shape == (5, 7)
