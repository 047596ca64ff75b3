"""Codes and errors of weights with tables of scalars, in one pass of the extension, are those of the plain formulas."""

import math

import pytest
import torch

from r2kernels import assign
from r2kernels.files import scalars
from r2kernels.files.clustered import Clustered, Form, divided, squares
from r2kernels.files.packing import launchers

pytestmark = [
    pytest.mark.skipif(launchers() is None, reason="the extension was not built"),
    pytest.mark.filterwarnings("ignore:centroids.* clusters for"),
]

FORMS = {
    "tensor": Form(8),
    "channels": Form(4, group_size=1, lut_dtype="fp16"),
    "last group smaller": Form(3, group_size=4, lut_dtype="int8"),
    "other axis": Form(2, group_size=2, axis=1),
    "tiles": Form(3, granularity=(2, 16), lut_dtype="fp8"),
    "scaled": Form(2, group_size=3, per_channel_scale=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_as_the_formulas(form, dtype, monkeypatch):
    """With ties, outliers and equal entries."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(11, 70, generator=generator)
    w[3] = w[3].round()
    w[5, 5] = 1000
    w = w.to(dtype)
    groups = len(divided(w, form)[0])
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    centroids = torch.randn(groups, 2**form.bits, 1, generator=generator).mul(2).round().div(2).sort(1).values
    found = Clustered.of(w, centroids.to(accumulated), form)
    energies, counts = found.errors(w)
    expected = squares(w, found.decoded())
    assert all(math.isclose(a, b, rel_tol=1e-12) for a, b in zip(energies, expected, strict=True))
    assert torch.equal(counts, found.counts())
    pieces, luts = divided(w, form)[0], found.luts()[..., 0]
    assert torch.equal(found.codes, torch.cat(assign(pieces, list(luts))))
    monkeypatch.setattr(scalars, "launchers", lambda: None)
    without = Clustered.of(w, centroids.to(accumulated), form)
    assert torch.equal(without.codes, found.codes) and torch.equal(without.leftovers, found.leftovers)
    assert torch.equal(without.decoded(), found.decoded())
    assert without.errors(w)[0] == expected
