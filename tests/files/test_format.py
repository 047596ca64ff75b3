"""Palettized files: what is saved comes back bit for bit, and nothing wrong is loaded."""

import itertools
import json
import math
import os
import zlib

import pytest
import torch
from files.stored import assert_same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

import r2kernels
from r2kernels.files import container
from r2kernels.files.checkpoint import Checkpoint
from r2kernels.files.clustered import Clustered, Form, Size, channel_scales
from r2kernels.files.format import ENTROPIES, Planned
from r2kernels.files.loading import Palettized, load_palettized
from r2kernels.files.saving import save_clustered, save_palettized, saving
from r2kernels.files.tables import quantized_lut
from r2kernels.nn.palettizer import Palettizer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.* stays dense", "ignore:centroids"),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def examples(count):
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


def draw(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).pow(3).to(dtype)


def centroids_for(w, form, seed=1):
    channels = w.shape[form.axis]
    groups = -(-channels // min(form.group_size or channels, channels))
    return draw((groups, 2**form.bits, form.cluster_dim), torch.promote_types(w.dtype, torch.float32), seed)


def clustered(shape, form=None, dtype=torch.float32, seed=0):
    form = form or Form(2)
    w = draw(shape, dtype, seed)
    return Clustered.of(w, centroids_for(w, form), form)


def by_hand(w, centroids, form):
    """W_hat, from the definition: group by group, row by row."""
    if form.axis:
        return by_hand(w.transpose(0, 1), centroids, form._replace(axis=0)).transpose(0, 1).contiguous()
    parts, d = [], form.cluster_dim
    scale = channel_scales(w).reshape(-1, *[1] * (w.dim() - 1)) if form.per_channel_scale else torch.ones_like(w[:1])
    for part, c in zip((w / scale).split(form.group_size or len(w)), centroids, strict=True):
        lut = quantized_lut(c, form.lut_dtype)
        turned = form.layout == "output" and d > 1
        flat = (part.transpose(0, -1) if turned else part).reshape(-1).clone()
        for i in range(len(flat) // d):
            row = flat[i * d : i * d + d].to(lut.dtype)
            flat[i * d : i * d + d] = lut[(lut - row).square().sum(1).argmin()].to(w.dtype)
        parts.append(flat.reshape(part.transpose(0, -1).shape).transpose(0, -1) if turned else flat.reshape(part.shape))
    return torch.cat(parts) * scale


FORMS = [
    Form(*options)
    for options in [
        (1,),
        (2,),
        (3,),
        (4, 2),
        (4, 2, "contiguous"),
        (2, 3, "output", 4),
        (2, 3, "contiguous", 4, True),
        (3, 1, "output", 3, False, "fp16"),
        (2, 4, "output", None, True, "int8"),
        (5, 5, "output", 2, True, "int8"),
        (8, 1, "output", None, True, "fp16"),
        (1, 64, "contiguous"),
        (2, 1, "output", 1, True),
        (2, 2, "output", 100),
        (2, 1, "output", 3, True, "fp32", 1),
        (3, 2, "output", None, True, "int8", 1),
        (2, 3, "contiguous", 4, False, "fp16", 1),
    ]
]


@pytest.mark.parametrize("entropy", [None, "huffman"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_round_trip(tmp_path, form, dtype, entropy):
    state = {"a": draw((10, 7, 5), dtype), "b.c": draw((9, 40), dtype, 2)}
    centroids = {name: centroids_for(w, form) for name, w in state.items()}
    save_clustered(
        {name: Clustered.of(w, centroids[name], form) for name, w in state.items()},
        state,
        tmp_path / "f",
        entropy=entropy,
    )
    found = load_palettized(tmp_path / "f")
    assert_same(found, {name: by_hand(w, centroids[name], form) for name, w in state.items()})
    with r2kernels.use_backend("reference"):
        assert_same(load_palettized(tmp_path / "f"), found)


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    bits=st.integers(1, 8),
    d=st.integers(1, 9),
    layout=st.sampled_from(["output", "contiguous"]),
    group=st.none() | st.integers(1, 9),
    scaled=st.booleans(),
    lut=st.sampled_from(["fp32", "fp16", "int8"]),
    axis=st.integers(0, 1),
    dtype=st.sampled_from(DTYPES),
    entropy=st.sampled_from(ENTROPIES),
    seed=st.integers(0, 9),
)
@examples(200)
def test_round_trip_of_anything(
    tmp_path_factory, shape, bits, d, layout, group, scaled, lut, axis, dtype, entropy, seed
):
    axis = min(axis, len(shape) - 1)
    form, path = (
        Form(bits, d, layout, group, scaled and len(shape) > 1, lut, axis),
        tmp_path_factory.mktemp("any") / "f",
    )
    channels, inner = shape[axis], math.prod(shape) // shape[axis]
    if min(group or channels, channels) * inner < d or (group and channels % group and channels % group * inner < d):
        return
    made = clustered(shape, form, dtype, seed)
    save_clustered({"w": made}, {"w": draw(shape, dtype, seed), "other": torch.arange(seed)}, path, entropy=entropy)
    assert_same(load_palettized(path), {"w": made.decoded(), "other": torch.arange(seed)})
    with Palettized(path) as file:
        again = file.clustered("w").unpacked()
    assert (
        torch.equal(again.codes, made.codes)
        and torch.equal(again.entries, made.entries)
        and again.size() == made.size()
    )


class Model(nn.Module):
    """Every kind of tensor that a state_dict has, shared ones too."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.conv, self.norm, self.embed, self.out = (
            nn.Conv2d(3, 10, 3),
            nn.BatchNorm2d(10),
            nn.Embedding(33, 10),
            nn.Linear(10, 33, bias=False),
        )
        self.out.weight = self.embed.weight
        self.tiny = nn.Linear(2, 3)
        self.to(dtype)
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("eight", torch.arange(3.0).to(torch.float8_e4m3fn))
        self.register_buffer("complex", torch.tensor([1 + 2j]))
        self.register_buffer("turned", torch.arange(6).reshape(2, 3).t())
        self.register_buffer("again", self.norm.running_mean)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"cluster_dim": 2, "lut_dtype": "int8"}, torch.bfloat16),
        ({"group_size": 4, "per_channel_scale": True}, torch.float16),
        ({"cluster_dim": 4, "layout": "contiguous", "lut_dtype": "fp16"}, torch.float64),
        (
            {"overrides": {"conv": {"bits": 1, "cluster_dim": 3, "per_channel_scale": True}, "embed": "skip"}},
            torch.float32,
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("entropy", [None, "huffman"])
def test_a_model(tmp_path, options, dtype, entropy):
    model = Model(dtype)
    palettizer = Palettizer(model, 3, **options)
    save_palettized(palettizer, tmp_path / "f", entropy=entropy)
    found = load_palettized(tmp_path / "f")
    palettizer.remove(bake=True)
    assert_same(found, dict(model.state_dict()))
    fresh = Model(dtype)
    fresh.load_state_dict(found)
    assert torch.equal(fresh.conv.weight, model.conv.weight) and fresh.out.weight is fresh.embed.weight
    assert found["out.weight"] is found["embed.weight"]
    with Palettized(tmp_path / "f") as file:
        assert file.aliases == {"out.weight": "embed.weight", "norm.running_mean": "again"}


def test_a_model_that_trains(tmp_path):
    """What is saved is what eval() runs on."""
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    palettizer, x = Palettizer(model, 2), torch.randn(5, 20)
    model(x).square().mean().backward()
    palettizer.step()
    model.eval()
    save_palettized(palettizer, tmp_path / "f")
    plain = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    plain.load_state_dict(load_palettized(tmp_path / "f"))
    assert torch.equal(plain(x), model(x))


def test_the_file(tmp_path):
    """Byte for byte, and as the safetensors package reads it."""
    w = torch.tensor([[0.0, 1, 3], [1, 0, 1]])
    form = Form(2)
    made = Clustered.of(w, torch.tensor([0.0, 1, 2, 3]).reshape(1, 4, 1), form)
    assert made.codes.tolist() == [0, 1, 3, 1, 0, 1]
    save_clustered(
        {"w": made},
        {"w": w, "v": w, "b": torch.tensor([7], dtype=torch.int16), "x": torch.tensor(2.0)},
        tmp_path / "f.safetensors",
    )
    data = (tmp_path / "f.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    parts = [
        torch.tensor([0.0, 1, 2, 3]).numpy().tobytes(),
        bytes([0b01110100, 0b0100, 0, 0, 0, 0, 0, 0]),
        torch.tensor(2.0).numpy().tobytes(),
        bytes([7, 0]),
    ]
    assert data[8 + length :] == b"".join(parts)
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert header == {
        "w:lut": {"dtype": "F32", "shape": [1, 4, 1], "data_offsets": [0, 16]},
        "w:codes": {"dtype": "U8", "shape": [8], "data_offsets": [16, 24]},
        "x": {"dtype": "F32", "shape": [], "data_offsets": [24, 28]},
        "b": {"dtype": "I16", "shape": [1], "data_offsets": [28, 30]},
    }
    assert (metadata["format"], metadata["version"], json.loads(metadata["aliases"])) == (
        "r2kernels.palettized",
        "1",
        {"v": "w"},
    )
    assert json.loads(metadata["weights"]) == {"w": {"shape": [2, 3], "dtype": "F32", "bits": 2}}
    assert metadata["checksums"] == "".join(f"{zlib.crc32(part):08x}" for part in parts)
    assert (
        metadata["checksum"]
        == f"{zlib.crc32(data[: 8 + length].replace(metadata['checksum'].encode(), b'00000000', 1)):08x}"
    )
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["b", "w:codes", "w:lut", "x"] and file.get_tensor(
            "w:lut"
        ).flatten().tolist() == [0, 1, 2, 3]
    file = Palettized(tmp_path / "f.safetensors")
    assert isinstance(file, Checkpoint) and [entry.name for entry in file.entries] == ["b", "v", "w", "x"]
    assert [entry.name for entry in file.weights] == ["v", "w"] and torch.equal(file.tensor("v"), w)


def test_every_tensor_is_aligned(tmp_path):
    forms = [
        Form(1, lut_dtype="int8"),
        Form(3, 3, lut_dtype="fp16", group_size=3),
        Form(2, 2, per_channel_scale=True, lut_dtype="int8"),
    ]
    made = {f"{i}{dtype}": clustered((11, 5 + i), form, dtype) for i, form in enumerate(forms) for dtype in DTYPES}
    others = {
        str(dtype): torch.ones(3, dtype=dtype) for dtype in (torch.bool, torch.float64, torch.float16, torch.int32)
    }
    state = {name: c.decoded() for name, c in made.items()} | others
    save_clustered(made, state, tmp_path / "f", entropy="huffman")
    reader = container.Reader(tmp_path / "f")
    assert reader.start % 8 == 0 and all(
        stored.begin % stored.dtype.itemsize == 0 for stored in reader.entries.values()
    )


def test_huffman_where_it_is_smaller(tmp_path):
    w = draw((300, 300))  # most codes are one of two
    form = Form(4)
    made = {
        "w": Clustered.of(w, torch.linspace(-20, 20, 16).reshape(1, 16, 1), form),
        "uniform": clustered((40, 40), Form(1)),
    }
    state = {name: c.decoded() for name, c in made.items()}
    sizes = {}
    for entropy in ENTROPIES:
        save_clustered(made, state, tmp_path / "f", entropy=entropy)
        assert_same(load_palettized(tmp_path / "f"), state)
        sizes[entropy] = (tmp_path / "f").stat().st_size
    with Palettized(tmp_path / "f") as file:
        assert {name: entropy for name, (*_, entropy) in file._weights.items()} == {"w": "huffman", "uniform": None}
    size = made["w"].size()
    assert isinstance(size, Size) and size.packed == 45_000 + 64 and sizes["huffman"] < 0.7 * sizes[None]
    assert size.coded < sizes["huffman"] < 1.1 * size.coded + 2000


def test_sizes():
    size = clustered((10, 7), Form(3, 4, "output", 4, True, "int8"), torch.bfloat16).size()
    # groups of 4, 4 and 2 channels: 7, 7 and 3 rows of 4, of which 2 weights are left over
    assert (size.dense, size.codes, size.luts, size.leftovers) == (140, 3 + 3 + 2, 3 * (8 * 4 + 4) + 10 * 2, 4)
    assert clustered((4, 4), Form(1), torch.float64).size()[:4] == (128, 2, 16, 0)
    codes = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.uint8)
    half = Clustered((2, 4), torch.float32, Form(1), codes, 8, torch.zeros(1, 2, 1), None, None, torch.empty(0)).size()
    assert half.entropy == 1 and half.coded == 9


def test_nothing_half_written(tmp_path, monkeypatch):
    path, made = tmp_path / "f", clustered((6, 6))
    path.write_text("old")
    for entropy, state in (
        ("zip", {"w": made.decoded()}),
        (None, {"w": made.decoded(), "x": torch.zeros(2).to_sparse()}),
        (None, {"w": 3}),
    ):
        with pytest.raises((ValueError, TypeError)):
            save_clustered({"w": made}, state, path, entropy=entropy)
    monkeypatch.setattr(container.Writer, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_clustered({"w": made}, {"w": made.decoded()}, path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f"]
    monkeypatch.undo()
    with pytest.raises(FileExistsError), saving(path, [Planned("x", (2,), torch.float32)], overwrite=False) as saver:
        saver.add("x", torch.ones(2))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize(
    ("form", "state", "message"),
    [
        (Form(1, 65), {}, "w has cluster_dim 65; at most 64"),
        (Form(2), {"w:lut": torch.ones(1)}, "w:lut cannot be stored"),
        (Form(2), {"__metadata__": torch.ones(1)}, "__metadata__ cannot be stored"),
        (Form(2), {"x": torch.empty([0] * 33)}, "x has 33 dimensions"),
        (Form(2), {"x": torch.ones(1, dtype=torch.complex128)}, "x has dtype torch.complex128"),
    ],
)
def test_what_cannot_be_saved(tmp_path, form, state, message):
    made = clustered((6, 70), form)
    with pytest.raises(ValueError, match=message):
        save_clustered({"w": made}, {"w": made.decoded(), **state}, tmp_path / "f")
    assert os.listdir(tmp_path) == []


def test_an_entropy_code_never_makes_a_file_larger(tmp_path):
    """Names, shapes and the places of more parts count too; nor does asking for it where it does not pay."""
    for count, rows in itertools.product((1, 5), (4, 10, 20, 40, 80, 200, 1000)):
        state = {f"layers.{i}.a/rather.long.name": draw((rows, 8), seed=i).pow(3) for i in range(count)}
        made = {name: Clustered.of(w, torch.linspace(-9, 9, 8).reshape(1, 8, 1), Form(3)) for name, w in state.items()}
        sizes = []
        for entropy in ENTROPIES[:2]:
            save_clustered(made, {**state, "bias": torch.ones(7)}, tmp_path / "f", entropy=entropy)
            sizes.append((tmp_path / "f").stat().st_size)
            assert_same(
                load_palettized(tmp_path / "f"),
                {name: c.decoded() for name, c in made.items()} | {"bias": torch.ones(7)},
            )
        assert sizes[1] <= sizes[0] and (sizes[1] < sizes[0] or rows < 1000)


def test_a_channel_of_zeros_is_zero():
    """Its scale is 0, along either axis."""
    for axis in (0, 1):
        w = draw((6, 5))
        w.select(axis, 2).zero_()
        made = Clustered.of(w, torch.tensor([-0.5, 0.5]).reshape(1, 2, 1), Form(1, per_channel_scale=True, axis=axis))
        assert made.scales[2] == 0 and (made.decoded().select(axis, 2) == 0).all()
        assert made.decoded().count_nonzero() == w.count_nonzero()
