"""The format of palettized files: a model with its weights as codes and look-up tables, in a safetensors file.

A clustered weight NAME is the tensors `NAME:lut` (groups, K, d), `NAME:codes` (bytes, group by group in the order of
`tiles.Geometry`) and where it has them `NAME:lut_scale` (of each table, or of all), `NAME:scale` (of channels),
`NAME:leftovers`; a weight on uniform levels is `NAME:codes`, `NAME:scale` and `NAME:zero` (twice the zero point), one
for the tensor, or for each channel or group. Huffman-coded both also have `NAME:lengths` (of the code words) and
`NAME:blocks` (bytes of each). Every other tensor is under its own name. The metadata holds

    format, version     `FORMAT` and `VERSION`
    weights             what is known of the clustered and quantized weights (`describe`)
    aliases             other names of the same tensors
    checksums           CRC-32 of all tensors, eight hexadecimal digits each, in the order of the data
    user                where there is any: the metadata of the checkpoint that was compressed, name -> text
    checksum            CRC-32 of the header, with zeros in this place
    inputs              in version `WITH_INPUTS` alone: the levels of quantized activations (`describe_input`)

`saving` writes such a file and `loading` reads it; `container` makes both kinds of checksums and checks them.
"""

import math
from typing import NamedTuple

import torch

from . import container, huffman
from .checkpoint import too_repeated
from .clustered import Form
from .integers import IntegerInput
from .uniform import Grid

FORMAT, VERSION, WITH_INPUTS = "r2kernels.palettized", "1", "2"
ENTROPIES = (None, "huffman")
PARTS = ("lut", "codes", "lut_scale", "scale", "zero", "leftovers", "lengths", "blocks")
KINDS = {"clustered": Form, "uniform": Grid}


class Planned(NamedTuple):
    """A tensor that a file will hold; with a form, a clustered or quantized weight."""

    name: str
    shape: tuple
    dtype: torch.dtype
    form: Form | Grid | None = None

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize


def wrong_names(planned, aliases):
    """Why a file cannot hold tensors and other names of them like these, or None.

    Names may not be those of a part of the file, and not occur twice; aliases may not make more of the tensors than
    `too_repeated` allows, for a file without aliases, as `expand` writes it, has a copy for each.
    """
    coded, seen = {p.name for p in planned if p.form}, {"__metadata__"}
    for name in (*aliases, *[p.name for p in planned]):
        weight, _, part = name.rpartition(":")
        if name in seen or (part in PARTS and weight in coded):
            return f"{name} cannot be stored: a part of the file has this name"
        seen.add(name)
    known = {p.name: p for p in planned}
    copies = [known[other]._replace(name=name) for name, other in aliases.items() if other in known]
    held = sum(p.nbytes for p in planned)
    return too_repeated([*planned, *copies], held) if copies else None


def describe(shape, dtype, form, entropy):
    """What the metadata says of a clustered weight; what is as usual is left out."""
    kind = next(kind for kind, of in KINDS.items() if isinstance(form, of))
    usual, fields = usual_fields(kind), form._asdict() | {"kind": kind, "entropy": entropy}
    unusual = {key: value for key, value in fields.items() if key not in usual or value != usual[key]}
    return {"shape": list(shape), "dtype": container.NAMES[dtype], **unusual}


def describe_input(levels):
    """What the metadata says of an `IntegerInput`: numbers that are not ints in hexadecimal, which is exact."""
    return {**levels._asdict(), "scale": levels.scale.hex(), "offset": levels.offset.hex()}


def restored_input(fields):
    """The `IntegerInput` so described; an error for what does not describe one."""
    if fields.keys() != set(IntegerInput._fields):
        raise ValueError(f"it has the fields {', '.join(fields)}")
    levels = IntegerInput(**{**fields, **{name: float.fromhex(fields[name]) for name in ("scale", "offset")}})
    wrong = levels.wrong()
    if wrong:
        raise ValueError(f"it has {wrong[0]} {wrong[1]!r:.40}")
    return levels


def usual_fields(kind):
    """The fields that a description leaves out where they have these values."""
    return {**KINDS[kind]._field_defaults, "kind": "clustered", "entropy": None}


def parts_of(shape, dtype, form, entropy):
    """part -> (dtype, shape) of the tensors that a clustered weight is stored as.

    None in a shape for a number that is not known before the weight is coded.
    """
    parts = {**form.parts(shape, dtype), "codes": (torch.uint8, (None,))}
    if entropy == "huffman":
        parts["lengths"] = torch.uint8, (2**form.bits,)
        parts["blocks"] = torch.int32, (-(-form.groups(shape, form.bits).rows // huffman.BLOCK),)
    return parts
