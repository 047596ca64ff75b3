"""Files of quantized weights: the bytes, round trips, and what is refused."""

import pytest
import torch
from files.stored import assert_same, parsed, put, refused, sealed, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from r2kernels.files.format import ENTROPIES
from r2kernels.files.loading import Palettized, load_palettized
from r2kernels.files.saving import save_clustered
from r2kernels.files.uniform import Grid, Uniform
from r2kernels.nn.clipping import coded

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_file(tmp_path):
    """Byte for byte."""
    w = torch.tensor([[0.0, 0.5, -1.0], [3.0, 0.0, -4.0]])
    made = Uniform.of(torch.tensor([[4.0, 5, 2], [7, 4, 0]]), torch.float32, Grid(3, 0), torch.tensor([0.5, 1.0]), 8)
    assert torch.equal(made.decoded(), w)
    save_clustered({"w": made}, {"w": w, "b": torch.tensor([7], dtype=torch.int16)}, tmp_path / "f")
    header, data = parsed((tmp_path / "f").read_bytes())
    assert header["__metadata__"]["weights"] == {
        "w": {"shape": [2, 3], "dtype": "F32", "bits": 3, "axis": 0, "kind": "uniform"}
    }
    codes = sum(code << 3 * i for i, code in enumerate([4, 5, 2, 7, 4, 0])).to_bytes(3, "little")
    at = {name: slice(*entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"}
    assert data[at["w:scale"]] == torch.tensor([0.5, 1.0]).numpy().tobytes() and data[at["w:codes"]][:3] == codes
    assert (
        data[at["w:zero"]] == bytes([8, 0, 8, 0])
        and header["w:zero"]["dtype"] == "I16"
        and set(at) == {"w:scale", "w:zero", "w:codes", "b"}
    )


def test_groups(tmp_path):
    """Of two numbers, along either axis of a matrix; the scales of the first channel come first."""
    codes, scale = torch.tensor([[1.0, 2, 3, 0], [3, 3, 1, 1]]), torch.tensor([1.0, 10, 100, 1000])
    rows = Uniform.of(codes, torch.float32, Grid(2, 0, 2), scale, torch.tensor([2, 2, 3, 0]))
    assert rows.decoded().tolist() == [[0, 1, 20, -10], [150, 150, 1000, 1000]]
    columns = Uniform.of(codes, torch.float32, Grid(2, 1, 1), torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]), 0)
    assert columns.decoded().tolist() == [[1, 6, 15, 0], [6, 12, 6, 8]]
    one = Uniform.of(codes, torch.float32, Grid(2, 0, 64), torch.tensor([1.0, 2]), 0)  # as large as a channel or larger
    assert one.decoded().tolist() == [[1, 2, 3, 0], [6, 6, 2, 2]]
    assert (rows.size().codes, rows.size().luts) == (2, 4 * 6)
    made = {"rows": rows, "columns": columns, "one": one}
    state = {name: u.decoded() for name, u in made.items()}
    save_clustered(made, state, tmp_path / "f")
    header, _ = parsed((tmp_path / "f").read_bytes())
    described = header["__metadata__"]["weights"]
    assert described["rows"] == {
        "shape": [2, 4], "dtype": "F32", "bits": 2, "axis": 0, "group_size": 2, "kind": "uniform"
    }  # fmt: skip
    assert_same(load_palettized(tmp_path / "f"), state)


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    bits=st.integers(1, 8),
    axis=st.none() | st.integers(0, 3),
    group_size=st.none() | st.integers(1, 12),
    seed=st.integers(0, 9),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    entropy=st.sampled_from(ENTROPIES),
)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_round_trip_of_anything(tmp_path_factory, shape, bits, axis, group_size, seed, dtype, entropy):
    form = Grid(bits, axis, group_size)
    if form.wrong(shape):
        return
    g, path = torch.Generator().manual_seed(seed), tmp_path_factory.mktemp("any") / "f"
    codes = torch.randint(2**bits, shape, generator=g).double()
    channels = (form.channels(shape),)
    made = Uniform.of(
        codes, dtype, form, torch.rand(channels, generator=g), torch.randint(2 ** (bits + 1), channels, generator=g)
    )
    save_clustered({"w": made}, {"w": made.decoded(), "other": torch.arange(seed)}, path, entropy=entropy)
    assert_same(load_palettized(path), {"w": made.decoded(), "other": torch.arange(seed)})
    with Palettized(path) as file:
        again = file.clustered("w").unpacked()
    assert torch.equal(again.codes[: codes.numel()], codes.reshape(-1).to(torch.uint8)) and again.size() == made.size()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "f"
    g = torch.Generator().manual_seed(0)
    state = {name: torch.randn(9, 400, generator=g).pow(3) for name in ("a", "g", "h")}
    forms = {"a": Grid(4, 0), "g": Grid(4, 0, 8), "h": Grid(4)}
    made = {name: coded(w, forms[name], "minmax", False) for name, w in state.items()}
    save_clustered(made, {**state, "s": torch.ones(3)}, path, entropy="huffman")
    return path.read_bytes()


EDITS = {
    "bits 0": (weight("a", "bits", 0), "a has bits 0, which is not allowed"),
    "bits 9": (weight("h", "bits", 9), "h has bits 9, which is not allowed"),
    "bits 5": (weight("a", "bits", 5), "a has .* does not agree"),
    "bits true": (weight("a", "bits", True), "a has bits True, which is not allowed"),
    "axis 2": (weight("a", "axis", 2), "a has axis 2, which is not allowed"),
    "axis -1": (weight("a", "axis", -1), "a has axis -1, which is not allowed"),
    "axis 1": (weight("a", "axis", 1), "a has a part 'scale' of .* does not agree"),
    "axis text": (weight("a", "axis", "0"), "a has axis '0', which is not allowed"),
    "axis true": (weight("a", "axis", True), "a has axis True, which is not allowed"),
    "no axis": (weight("a", "axis", None), "a has a part 'scale' of .* does not agree"),
    "group_size 0": (weight("g", "group_size", 0), "g has group_size 0, which is not allowed"),
    "group_size -8": (weight("g", "group_size", -8), "g has group_size -8, which is not allowed"),
    "group_size 7": (weight("g", "group_size", 7), "g has group_size 7, which is not allowed"),
    "group_size true": (weight("g", "group_size", True), "g has group_size True, which is not allowed"),
    "group_size 8.0": (weight("g", "group_size", 8.0), "list of weights is corrupt .*8.0 is not an int"),
    "group_size text": (weight("g", "group_size", "8"), "g has group_size '8', which is not allowed"),
    "group_size 4": (weight("g", "group_size", 4), "g has a part 'scale' of .* does not agree"),
    "group_size large": (weight("g", "group_size", 2**80), "g has a part 'scale' of .* does not agree"),
    "no group_size": (weight("g", "group_size", None), "g has a part 'scale' of .* does not agree"),
    "group_size of a tensor": (weight("h", "group_size", 8), "h has group_size 8, which is not allowed"),
    "groups without an axis": (weight("g", "axis", None), "g has group_size 8, which is not allowed"),
    "kind": (weight("a", "kind", "odd"), "a is not described as"),
    "kind list": (weight("a", "kind", []), "a is not described as"),
    "kind clustered": (weight("a", "kind", "clustered"), "a has no part 'lut'"),
    "kind gone": (weight("h", "kind", KeyError), "h has no part 'lut'"),
    "cluster_dim": (weight("a", "cluster_dim", 1), "a is not described as"),
    "shape": (weight("a", "shape", [9, 401]), "a has .* does not agree|a is corrupt"),
    "shape huge": (weight("h", "shape", [2**20, 2**20]), "h has .* does not agree"),
    "shape empty": (weight("h", "shape", [0, 3]), "h has shape"),
    "dtype": (weight("a", "dtype", "F64"), "a has a part 'scale' of torch.float32"),
    "zero of another dtype": (put("a:zero", "dtype", "F16"), "a has a part 'zero' of torch.float16"),
    "zero renamed": (lambda header: header.update({"a:one": header.pop("a:zero")}), "a has no part 'zero'"),
    "entropy": (weight("a", "entropy", "zip"), "a has entropy 'zip'"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_wrong_headers(tmp_path, small, kind):
    edit, message = EDITS[kind]
    header, data = parsed(small)
    edit(header)
    refused(tmp_path / "f", sealed(header, data), message)


def test_changed_and_truncated_files(tmp_path, small):
    for at in range(len(small) - 700, len(small), 7):
        refused(tmp_path / "f", small[:at] + bytes([small[at] ^ 4]) + small[at + 1 :])
        refused(tmp_path / "f", small[:at])
