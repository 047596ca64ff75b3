"""Clustered weights as coremltools has them in a state_dict: the hard weight, and beside it what its converter reads.

For a parameter `fc.weight`: `fc._COREML_/weight/lut`, (groups, 1, ..., K, d) of two more dimensions than the weight,
the groups in the dimension of its output channels, of tiles of single weights (groups, groups of inputs, 1, ..., K, 1);
for d > 1 `.../vector_axis`, along which its rows lie; for divided channels `.../palettization_scale`, (C, 1, ...);
`.../compression_type`.
"""

import math

import torch

from .clustered import Clustered, Form, assembled, is_turned

PREFIX, PALETTIZATION = "_COREML_", 2


def to_coreml(name, clustered):
    """name -> tensor: the weight and what coremltools keeps beside it.

    ValueError where its layout cannot express how the weight is clustered.
    """
    axis = vector_axis(name, clustered)
    ones, d = [1] * (len(clustered.shape) - 1), clustered.form.cluster_dim
    found = {
        "lut": turned(clustered.luts().reshape(*_blocks(name, clustered), 2**clustered.form.bits, d), clustered.form),
        "compression_type": torch.tensor([PALETTIZATION], device="cpu"),
    }
    if d > 1:
        found["vector_axis"] = torch.tensor(axis, device="cpu")
    if clustered.scales is not None:
        found["palettization_scale"] = turned(clustered.scales.reshape(-1, *ones), clustered.form)
    return {name: clustered.decoded()} | {_beside(name, key): tensor for key, tensor in found.items()}


def indices(name, clustered):
    """The codes as `constexpr_lut_to_dense` takes them.

    Shaped like the weight, but along the vector axis one for each row.
    """
    form, d = clustered.form, clustered.form.cluster_dim
    codes, axis = clustered.unpacked().codes, _swapped(vector_axis(name, clustered), form)
    if d == 1:
        return turned(assembled(codes, clustered.leftovers, clustered.shape, form), form)
    shape, groups = list(form.channels_first(clustered.shape)), clustered.geometry.groups
    shape[axis] //= d
    if is_turned(shape, d, form.layout):
        codes = codes.reshape(groups, shape[-1], *shape[1:-1], shape[0] // groups).transpose(1, -1)
    return turned(codes.reshape(shape), form)


def _blocks(name, clustered):
    """How many groups lie along each dimension of the weight with its output channels first."""
    form, geometry = clustered.form, clustered.geometry
    (*first, last), beyond = geometry.blocks[0].counts, geometry.shape[len(geometry.view) :]
    if last > 1 and (form.cluster_dim > 1 or geometry.blocks[0].tile[-1] % math.prod(beyond)):
        raise ValueError(
            f"{name} has tiles {form.granularity} of rows of {form.cluster_dim}; coremltools' layout needs single "
            f"weights, and tiles of whole inputs, {math.prod(beyond)} numbers each"
        )
    return [*first, last, *[1] * len(beyond)][: len(clustered.shape)]


def turned(tensor, form):
    """A tensor with the output channels first as one that has them where the weight does, or the other way round."""
    return tensor.transpose(0, 1) if form.axis else tensor


def _swapped(axis, form):
    """The same of an axis."""
    return 1 - axis if form.axis and axis < 2 else axis


def vector_axis(name, clustered):
    """The dimension along which rows lie."""
    form, shape = clustered.form, clustered.form.channels_first(clustered.shape)
    axis = 0 if form.cluster_dim == 1 or is_turned(shape, form.cluster_dim, form.layout) else len(shape) - 1
    blocks = clustered.geometry.blocks
    length = blocks[0].tile[0] if axis == 0 else shape[axis]
    if len(blocks) > 1 or length % form.cluster_dim:
        raise ValueError(
            f"{name} has shape {clustered.shape}; "
            "coremltools' layout needs groups of equal size, and rows that end with a group or dimension"
        )
    return _swapped(axis, form)


def from_coreml(state):
    """name -> `Clustered` of every palettized weight in the state_dict of a model that coremltools finalized."""
    return {name: _clustered(name, state) for name in state if _beside(name, "lut") in state}


def _clustered(name, state):
    beside = (_beside(name, key) for key in ("lut", "vector_axis", "palettization_scale"))
    weight, lut, axis, scale = (state.get(key) for key in (name, *beside))
    whole, side = weight, Form(1, axis=int(any(t is not None and t.shape[0] == 1 < t.shape[1] for t in (lut, scale))))
    weight, lut = turned(weight, side), turned(lut, side)
    counts, (entries, d) = lut.shape[:2], lut.shape[-2:]
    groups, inner = math.prod(lut.shape[:-2]), weight[0].numel()
    across = groups // counts[0]  # groups of inputs
    if (
        math.prod(counts) != groups
        or len(weight) % counts[0]
        or (across > 1 and (weight.shape[1] % across or d > 1))
        or entries > 256
    ):
        raise ValueError(
            f"{name} has tables of shape {tuple(lut.shape)}; "
            "allowed are at most 256 entries, and groups of output channels, or of single weights of inputs too"
        )
    axis = 0 if axis is None else _swapped(int(axis) % weight.dim(), side)
    if axis not in (0, weight.dim() - 1):
        raise ValueError(f"{name} has rows along dimension {axis}; allowed are the first and the last one")
    bits = max((entries - 1).bit_length(), 1)
    tables = lut.reshape(groups, entries, d)
    tables = torch.cat([tables, tables[:, -1:].expand(-1, 2**bits - entries, -1)], 1)
    size = None if counts[0] == 1 else len(weight) // counts[0]
    form = Form(bits, d, "contiguous" if axis else "output", None, scale is not None, axis=side.axis)
    form = form._replace(granularity=(size, inner // across)) if across > 1 else form._replace(group_size=size)
    return Clustered.of(whole, tables, form, None if scale is None else scale.reshape(-1))


def _beside(name, key):
    module, dot, parameter = name.rpartition(".")
    return f"{module}{dot}{PREFIX}/{parameter}/{key}"
