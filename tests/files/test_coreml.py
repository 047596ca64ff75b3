"""Deployment: what coremltools palettized, and what we cluster, decode to the same weights on both sides."""

import re

import peers
import pytest
import torch
from torch import nn

from r2kernels.files.clustered import Clustered, Form
from r2kernels.files.coreml import from_coreml, indices, to_coreml, vector_axis
from r2kernels.files.loading import load_palettized
from r2kernels.files.saving import save_clustered
from r2kernels.files.tiles import Geometry

try:
    peers.load()
    from coremltools.optimize import _utils
    from coremltools.optimize.torch.palettization import DKMPalettizer, DKMPalettizerConfig, ModuleDKMPalettizerConfig
except ImportError as error:
    pytest.skip(
        f"coremltools cannot be imported ({error}); it is in the test extra where it has a wheel",
        allow_module_level=True,
    )

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


def finalized(**options):
    """The state_dict of a small network that coremltools' DKM trained for two steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 16))
    palettizer = DKMPalettizer(
        model, DKMPalettizerConfig(global_config=ModuleDKMPalettizerConfig(weight_threshold=0, milestone=0, **options))
    )
    prepared = palettizer.prepare().train()
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
    for _ in range(2):
        palettizer.step()
        prepared(torch.randn(2, 4, 8, 8)).square().mean().backward()
        optimizer.step()
    return palettizer.finalize().state_dict()


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({"n_bits": 2}, Form(2)),
        ({"n_bits": 2, "cluster_dim": 2}, Form(2, 2)),
        ({"n_bits": 3, "enable_per_channel_scale": True}, Form(3, 1, "output", None, True)),
        ({"n_bits": 1, "granularity": "per_grouped_channel", "group_size": 4}, Form(1, 1, "output", 4)),
    ],
    ids=str,
)
def test_a_state_dict_of_coremltools(tmp_path, options, form):
    state = finalized(**options)
    found = from_coreml(state)
    assert {name: c.form for name, c in found.items()} == {"0.weight": form, "2.weight": form}
    for name, c in found.items():
        assert torch.equal(c.decoded(), state[name])
        for key, tensor in to_coreml(name, c).items():
            assert tensor.dtype == state[key].dtype and torch.equal(tensor, state[key]), key
    save_clustered(found, state, tmp_path / "f", entropy="huffman")
    loaded = load_palettized(tmp_path / "f")
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


# tile -> groups along the dimensions of the weights below
BLOCKS = {(4, 3): (2, 4), (2, 4): (4, 3), (6, 2): (4, 2), (4, 18): (2, 2, 1, 1), (1, 3, 2): (4, 2, 4)}


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((8, 4, 3, 3), Form(3)),
        ((8, 6, 5), Form(2, 4)),
        ((8, 12), Form(2, 3, "contiguous")),
        ((8, 12), Form(2, 2, "output", 4)),
        ((8, 12), Form(2, 2, "contiguous", 4, True)),
        ((8, 4, 3, 3), Form(4, 1, "output", 2, True, "int8")),
        ((6, 2, 2, 3, 4), Form(1, 2, lut_dtype="fp16")),
        ((10, 4), Form(2, group_size=20)),
        ((12, 8), Form(2, 2, "output", 4, axis=1)),
        ((4, 8, 3, 3), Form(3, 1, "output", 2, True, axis=1)),
        ((8, 12), Form(3, granularity=(4, 3), lut_dtype="fp8")),
        ((8, 12), Form(2, granularity=(2, 4), per_channel_scale=True, lut_dtype="bf16")),
        ((8, 12), Form(2, axis=1, granularity=(6, 2))),
        ((8, 4, 3, 3), Form(2, granularity=(4, 18))),
        ((4, 6, 8), Form(2, granularity=(1, 3, 2))),
    ],
    ids=str,
)
def test_constexpr_lut_to_dense(shape, form):
    """What Core ML computes from our codes and tables, and the codes that coremltools finds for our weights."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=g)
    groups = Geometry(shape, form).groups
    c = Clustered.of(w, torch.randn(groups, 2**form.bits, form.cluster_dim, generator=g), form)
    entries, codes, axis = to_coreml("fc.weight", c), indices("fc.weight", c).numpy(), vector_axis("fc.weight", c)
    lut = entries["fc._COREML_/weight/lut"].numpy()
    scale = entries.get("fc._COREML_/weight/palettization_scale", torch.ones(())).numpy()
    blocks = BLOCKS.get(form.granularity) or [groups if i == form.axis else 1 for i in range(w.dim())]
    assert lut.shape == (*blocks, 2**form.bits, form.cluster_dim)
    dense = _utils.lut_to_dense(codes, lut, axis) * scale
    assert (dense == c.decoded().numpy()).all()
    if c.scales is None:
        found = _utils.find_indices_for_lut(dense, lut, axis)
        assert (_utils.lut_to_dense(found, lut, axis) == dense).all() and (found == codes).all()
    if len(form.granularity or ()) == 3:
        with pytest.raises(ValueError, match="groups of output channels, or of single weights of inputs too"):
            from_coreml(entries)
        return
    again = from_coreml(entries)["fc.weight"]
    assert torch.equal(again.decoded(), c.decoded()) and (indices("fc.weight", again).numpy() == codes).all()


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((9, 4), Form(1, 2)),
        ((8, 9), Form(1, 2, "contiguous")),
        ((9, 4), Form(1, group_size=4)),
        ((6, 4), Form(1, 2, group_size=3)),
        ((5, 3), Form(1, 4)),
        ((8, 10), Form(1, granularity=(4, 4))),
        ((9, 8), Form(1, granularity=(4, 4))),
    ],
    ids=str,
)
def test_what_the_layout_cannot_express(shape, form):
    w = torch.randn(shape)
    c = Clustered.of(w, torch.randn(Geometry(shape, form).groups, 2, form.cluster_dim), form)
    with pytest.raises(ValueError, match=re.escape(f"w has shape {shape}; coremltools' layout needs")):
        to_coreml("w", c)


@pytest.mark.parametrize(
    ("shape", "form"), [((8, 4, 3, 3), Form(1, granularity=(4, 4))), ((8, 8), Form(1, 2, granularity=(4, 4)))]
)
def test_tiles_that_the_layout_cannot_express(shape, form):
    c = Clustered.of(torch.randn(shape), torch.randn(Geometry(shape, form).groups, 2, form.cluster_dim), form)
    with pytest.raises(ValueError, match=r"w has tiles .* of whole inputs"):
        to_coreml("w", c)


def test_tables_of_any_length():
    """Entries to a power of two are added, which no code means."""
    w = torch.tensor([[1.0, 2, 3], [3, 1, 5]])
    c = from_coreml({"w": w, "_COREML_/w/lut": torch.tensor([5.0, 1, 2, 3, 4]).reshape(1, 1, 5, 1)})["w"]
    assert c.form.bits == 3 and torch.equal(c.decoded(), w) and int(c.codes.max()) == 3
    for lut, axis, message in (
        (torch.ones(2, 2, 2, 4, 1), None, "w has tables of shape"),
        (torch.ones(1, 1, 300, 1), None, "at most 256"),
        (torch.ones(1, 1, 1, 4, 2), 1, "w has rows along dimension 1"),
    ):
        state = {"w": torch.ones(lut.shape[:-2]), "_COREML_/w/lut": lut} | (
            {} if axis is None else {"_COREML_/w/vector_axis": torch.tensor(axis)}
        )
        with pytest.raises(ValueError, match=message):
            from_coreml(state)
