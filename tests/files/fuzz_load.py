"""Coverage-guided fuzzing of the loader of palettized files, run by hand where atheris is installed.

A folder keeps what was found interesting:

    python tests/files/fuzz_load.py CORPUS -max_total_time=600 -max_len=20000 -rss_limit_mb=4096

The first byte of an input says whether checksums count, so that what they guard is reached too. Anything but a
CheckpointError is a finding, and so is a difference between the extension and numpy.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["r2kernels"]):
    from r2kernels import use_backend
    from r2kernels.files import container
    from r2kernels.files.checkpoint import CheckpointError
    from r2kernels.files.clustered import Clustered, Form
    from r2kernels.files.loading import load_palettized
    from r2kernels.files.saving import save_clustered
    from r2kernels.files.uniform import Grid
    from r2kernels.nn.clipping import coded

CHECKED = container.Reader.check_header, container.Reader.read
NUMBERS = (
    -1,
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    64,
    255,
    256,
    65536,
    2**31,
    2**32,
    2**62,
    2**63,
    2**64,
    10**40,
    0.5,
    True,
    None,
    "",
    "F32",
    "output",
    [],
    {},
)
folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "a.safetensors"


def load(data):
    path.write_bytes(data)
    try:
        return load_palettized(path)
    except CheckpointError:
        return None


def same(a, b):
    if a is None or b is None:
        return a is b
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and raw(a[k]) == raw(b[k]) for k in a
    )


def raw(tensor):
    return bytes(container.as_bytes(tensor))


def test_one_input(data):
    if len(data) < 1:
        return
    if data[0] & 1:
        container.Reader.check_header, container.Reader.read = CHECKED
    else:
        container.Reader.check_header, container.Reader.read = (
            lambda reader: None,
            lambda reader, name, expected=None: CHECKED[1](reader, name),
        )
    found = load(data[1:])
    if data[0] & 2:
        with use_backend("reference"):
            assert same(found, load(data[1:]))


def changed(value, rng):
    """A copy of JSON with one place in it changed; JSON in strings is JSON too."""
    if isinstance(value, str) and value[:1] == "{":
        return json.dumps(changed(json.loads(value), rng), separators=(",", ":"))
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        copy = dict(value) if isinstance(value, dict) else list(value)
        key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
        if rng.random() < 0.1:
            del copy[key]
        else:
            copy[key] = changed(copy[key], rng)
        return copy
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice((-8, -1, 1, 8))
    return rng.choice(NUMBERS)


def mutate(data, most, seed):
    rng = random.Random(seed)
    if rng.random() < 0.5:
        return atheris.Mutate(data, most)
    try:
        end = 9 + int.from_bytes(data[1:9], "little")
        header = json.dumps(changed(json.loads(data[9:end]), rng), separators=(",", ":")).encode()
        return (data[:1] + len(header).to_bytes(8, "little") + header + data[end:])[:most]
    except (ValueError, RecursionError, OverflowError):
        return atheris.Mutate(data, most)


def seeds():
    for shape, bits, d, layout, group, scaled, lut, dtype, entropy in (
        ((10, 7, 3), 2, 1, "output", None, False, "fp32", torch.float32, None),
        ((10, 7, 3), 3, 2, "output", 3, True, "int8", torch.bfloat16, None),
        ((10, 7, 3), 1, 4, "output", 4, True, "fp32", torch.float16, None),
        ((9, 40, 5), 4, 2, "contiguous", None, False, "fp16", torch.float64, "huffman"),
        ((300, 300), 2, 1, "output", 70, True, "fp32", torch.float32, "huffman"),
    ):
        w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).pow(5).to(dtype)
        form = Form(bits, d, layout, group, scaled, lut)
        groups = -(-len(w) // (group or len(w)))
        centroids = torch.linspace(
            -0.5, 3, groups * 2**bits * d, dtype=torch.promote_types(dtype, torch.float32)
        ).reshape(groups, -1, d)
        state = {"a.weight": w, "b": torch.arange(3), "c": w, "e": torch.empty(0, 2)}
        save_clustered({"a.weight": Clustered.of(w, centroids, form)}, state, path, entropy=entropy)
        yield path.read_bytes()
        save_clustered(
            {"a.weight": coded(w, Grid(bits, len(w.shape) - 1 if scaled else None), "minmax", layout == "output")},
            state,
            path,
            entropy=entropy,
        )
        yield path.read_bytes()


if __name__ == "__main__":
    torch.set_num_threads(1)
    corpus = Path(next(argument for argument in sys.argv[1:] if argument[0] != "-"))
    corpus.mkdir(exist_ok=True)
    for i, seed in enumerate(seeds()):
        for first in (1, 2):
            (corpus / f"seed{i}{first}").write_bytes(bytes([first]) + seed)
    atheris.Setup(sys.argv, test_one_input, custom_mutator=mutate)
    atheris.Fuzz()
