"""Tables of tiles, channels and rows: what is saved comes back bit for bit, and as the definition says."""

import itertools

import pytest
import torch
from files.stored import assert_same

from r2kernels.files.clustered import Clustered, Form, joined
from r2kernels.files.clustered import divided as pieces_of
from r2kernels.files.integers import palette_weight
from r2kernels.files.loading import Palettized, load_palettized
from r2kernels.files.saving import save_clustered
from r2kernels.files.tables import quantized_lut, restored_lut, stored_lut
from r2kernels.files.tiles import Geometry
from r2kernels.nn.clustering import ClusteringOptions, clustered_weight

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:centroids")]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).pow(3).to(dtype)


def cuts(size, most):
    """The ends of pieces, those that are full first: [(those, (start, end))]"""
    most = min(most or size, size)
    full = [(at, at + most) for at in range(0, size - most + 1, most)]
    return [full, [(size - size % most, size)]] if size % most else [full]


def tiles(shape, tile):
    """Where the groups lie in the matrix, in the order of their tables."""
    last = len(tile) - 1
    view = (*shape[:last], torch.Size(shape[last:]).numel())
    for block in itertools.product(*[cuts(size, most) for size, most in zip(view, tile, strict=True)]):
        for ends in itertools.product(*block):
            yield view, tuple(slice(*end) for end in ends)


def by_hand(w, luts, form, scales=None):
    """W_hat tile by tile and row by row."""
    if scales is not None:
        divided = w / scales.reshape([-1 if i == form.axis else 1 for i in range(w.dim())])
        hat = by_hand(divided, luts, form)
        return hat * scales.reshape([-1 if i == form.axis else 1 for i in range(w.dim())])
    if form.axis:
        return by_hand(w.transpose(0, 1), luts, form._replace(axis=0)).transpose(0, 1).contiguous()
    out, d = w.clone().contiguous(), form.cluster_dim
    for (view, place), lut in zip(tiles(w.shape, form.granularity), luts, strict=True):
        tile = out.view(view)[place]
        if tile.shape[-1] == view[-1]:  # whole rows are clustered as the kernels that they are
            tile = tile.unflatten(-1, w.shape[len(view) - 1 :])
        turned = form.layout == "output" and d > 1
        flat = (tile.transpose(0, -1) if turned else tile).reshape(-1).clone()
        for i in range(len(flat) // d):
            row = flat[i * d : i * d + d].to(lut.dtype)
            flat[i * d : i * d + d] = lut[(lut - row).square().sum(1).argmin()].to(w.dtype)
        shape = tile.transpose(0, -1).shape if turned else tile.shape
        tile.copy_(flat.reshape(shape).transpose(0, -1) if turned else flat.reshape(shape))
    return out


FORMS = [
    Form(3, granularity=(4, 8)),
    Form(2, granularity=(None, 6), lut_dtype="bf16"),
    Form(2, granularity=(1, 5), lut_dtype="fp8"),
    Form(1, granularity=(20, 7), lut_dtype="int8"),
    Form(3, 2, granularity=(4, 7), per_channel_scale=True),
    Form(2, 3, "contiguous", granularity=(3, 8), lut_dtype="fp8"),
    Form(2, 1, axis=1, granularity=(4, 6), per_channel_scale=True, lut_dtype="fp16"),
    Form(2, 2, axis=1, granularity=(3, 4), lut_dtype="fp8"),
    Form(2, granularity=(1, 3, 2)),
    Form(2, 2, granularity=(1, 1, None), lut_dtype="fp8"),
    Form(8, 1, granularity=(2, None, 4), per_channel_scale=True, lut_dtype="bf16"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_round_trip(tmp_path, form, dtype):
    """Sizes that tiles divide, and others: matrices, and kernels."""
    shapes = [(12, 16), (10, 7, 5), (9, 3, 2, 4)][len(form.granularity) - 2 :]
    state = {f"w{i}": draw(shape, dtype, i) for i, shape in enumerate(shapes)}
    made = {}
    for name, w in state.items():
        assert form.wrong(tuple(w.shape)) is None
        groups = Geometry(w.shape, form).groups
        wide = torch.promote_types(dtype, torch.float32)
        c = draw((groups, 2**form.bits, form.cluster_dim), wide, 7)
        made[name] = Clustered.of(w, c, form)
        expected = by_hand(w, quantized_lut(c, form.lut_dtype), form, made[name].scales)
        assert torch.equal(made[name].decoded(), expected)
        assert torch.equal(made[name].packed().decoded(), expected)
    for entropy in (None, "huffman"):
        save_clustered(made, state, tmp_path / "f", entropy=entropy)
        assert_same(load_palettized(tmp_path / "f"), {name: c.decoded() for name, c in made.items()})
    with Palettized(tmp_path / "f") as file:
        for name, c in made.items():
            again = file.clustered(name)
            assert again.form == form and torch.equal(again.unpacked().codes, c.codes) and again.size() == c.size()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_groups_of_a_weight_and_back(form):
    for shape in ((12, 16), (10, 7, 5), (8, 12, 3)):
        w = draw(shape)
        pieces, scales = pieces_of(w, form)
        assert len(pieces) == Geometry(shape, form).groups
        torch.testing.assert_close(joined(pieces, w, form, scales), w)


@pytest.mark.parametrize(
    ("granularity", "group_size", "tile"),
    [
        (None, None, (None, None)),
        ("tensor", None, (None, None)),
        ("channel", None, (1, None)),
        ("row", None, (1, None)),
        ("group", 3, (3, None)),
        (None, 3, (3, None)),
        ((2, None), None, (2, None)),
        ((None, None), None, (None, None)),
        ((None, 4), None, (None, 4)),
        ([2, 4], None, (2, 4)),
    ],
)
def test_what_granularity_says(granularity, group_size, tile):
    """All of them in a few numbers; what old files hold is as it was."""
    options = ClusteringOptions(2, granularity=granularity, group_size=group_size).checked("w")
    form = Form.of(options)
    assert (form.granularity or (form.group_size, None)) == tile and Form.of(form) == form
    assert (form.granularity is None) == (tile[1] is None) and form.wrong((8, 12)) is None
    c = clustered_weight(draw((8, 12)), form)[1]
    rows, columns = (size if n is None else n for size, n in zip((8, 12), tile, strict=True))
    assert len(c.entries) == -(-8 // rows) * (12 // columns)
    places = [place for _, place in tiles((8, 12), tile)]
    assert all(len(c.decoded()[place].unique()) <= 4 for place in places)


def test_three_bits_and_an_eighth(tmp_path):
    """8 entries of e4m3 for every 8 x 64 weights, and one scale for all: in the file too."""
    w = 0.02 * draw((64, 256)).clamp(-3, 3)
    c = clustered_weight(w, Form(3, lut_dtype="fp8", granularity=(8, 64)))[1]
    size = c.size()
    assert 8 * (size.codes + size.luts - 4) == 3.125 * w.numel() and size.leftovers == 0
    assert c.entries.dtype == torch.float8_e4m3fn and c.lut_scales.shape == (1, 1, 1)
    save_clustered({"w": c}, {"w": w}, tmp_path / "f")
    with Palettized(tmp_path / "f") as file:
        stored = sum(part.end - part.begin for part in file.reader.entries.values())
    assert size.packed <= stored < size.packed + 8  # the tensor after them is aligned
    assert torch.equal(load_palettized(tmp_path / "f")["w"], c.decoded())
    assert (c.decoded() - w).norm() < 0.15 * w.norm()


@pytest.mark.parametrize("unit", [1e-20, 2.0**-9, 1.0, 448.0, 449.0, 1e30])
def test_tables_in_eight_bits_float(unit):
    """Everywhere within a sixteenth, or the smallest step of the scale, which is a power of two and the least."""
    lut = unit * torch.cat([torch.tensor([-1.0, 1.0]), torch.linspace(-1, 1, 62)]).reshape(2, 32, 1)
    entries, scale = stored_lut(lut, "fp8")
    assert scale.log2().frac() == 0 and scale * 448 >= lut.max() > scale * 224
    found = restored_lut(entries, scale, torch.float32)
    assert ((found - lut).abs() <= torch.maximum(lut.abs() / 16, scale * 2.0**-10)).all()
    assert torch.equal(quantized_lut(found, "fp8"), found)
    zeros = torch.zeros(2, 4, 1)
    assert torch.equal(quantized_lut(zeros, "fp8"), zeros)


def test_tables_in_bfloat16():
    lut = torch.tensor([1.0, 1 + 2**-9, -3.4e38, 3.4028234e38]).reshape(1, 4, 1)
    assert quantized_lut(lut, "bf16").flatten().tolist() == [
        1,
        1,
        *[s * torch.finfo(torch.bfloat16).max for s in (-1, 1)],
    ]


def test_palette_weights_of_tiles():
    """Codes in the weight's shape, and which table is whose."""
    w, form = draw((10, 12)), Form(2, granularity=(4, 5))
    p = palette_weight(clustered_weight(w, form)[1])
    decoded = torch.empty_like(w)
    for (_, place), lut in zip(tiles(w.shape, p.granularity), p.lut, strict=True):
        decoded[place] = lut[p.codes[place].long(), 0]
    assert p.codes.shape == w.shape and torch.equal(decoded, clustered_weight(w, form)[1].decoded())


def outliers(scales, seed=0):
    """Channels with a weight that is a hundred times the others, of equal or of different scales."""
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed))
    w[::8, 3] *= 188 / w[::8, 3].abs()
    return w * torch.logspace(-scales, scales, 64)[:, None]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("scales", [0, 1])
def test_scales_of_channels_are_never_worse_than_none(scales, bits):
    w = outliers(scales)
    w[5] = 0
    found = {}
    for scaled in (False, True):
        c = clustered_weight(w, Form(bits, per_channel_scale=scaled))[1]
        found[scaled] = (c.decoded() - w).norm().item()
    assert (c.decoded()[5] == 0).all() and c.scales[5] == 0
    assert found[True] <= found[False] and (not scales or found[True] < 0.9 * found[False])


def test_scales_of_channels_with_importances():
    """What decides between them is the error that counts."""
    w, h = outliers(1), torch.rand(64, 256, generator=torch.Generator().manual_seed(1)) ** 4
    errors = [
        (h * (clustered_weight(w, Form(2, per_channel_scale=s), weight=h)[1].decoded() - w).square()).sum()
        for s in (False, True)
    ]
    assert errors[1] < errors[0]
