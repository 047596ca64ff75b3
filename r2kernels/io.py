"""Palettized files: a model with its weights as codes and look-up tables, in a safetensors file.

A clustered weight NAME is the tensors `NAME:lut` (groups, K, d), `NAME:codes` (bytes) and where it has them `NAME:lut_scale`, `NAME:scale` (of channels),
`NAME:leftovers`; Huffman-coded also `NAME:lengths` (of the code words) and `NAME:blocks` (bytes of each). Every other tensor is under its own name. The
metadata holds `format`, `version`, what is known of the clustered weights (`weights`), other names of the same tensors (`aliases`), and CRC-32 checksums: of
all tensors in the order of the data (`checksums`), and of the header with `checksum` as zeros.
"""
import contextlib
import json
import math
from collections import Counter
from typing import NamedTuple

import torch

from . import container, huffman
from .arguments import DTYPES, LAYOUTS
from .checkpoint import Checkpoint, CheckpointError, Entry, natural, same_tensors
from .codes import LUT_DTYPES, Clustered, Form, Geometry

FORMAT, VERSION = "r2kernels.palettized", "1"
MOST_DIM = 64           # of a row; with the bytes of the codes it bounds the size of a weight
ENTROPIES = (None, "huffman")
PARTS = ("lut", "codes", "lut_scale", "scale", "leftovers", "lengths", "blocks")
DEFAULTS = {field: value for field, value in Form._field_defaults.items()} | {"entropy": None}


class Planned(NamedTuple):
    """A tensor that a file will hold; with a form, a clustered weight."""
    name: str
    shape: tuple
    dtype: torch.dtype
    form: Form | None = None


def save_palettized(palettizer, path, *, entropy=None):
    """Writes the model of a `Palettizer` with its weights as codes and look-up tables; `load_palettized` reads them back, bit for bit as `remove(bake=True)`
    leaves them.

    All other parameters and buffers of the model's state_dict are kept as they are; a tensor with several names is stored once. entropy: None packs codes into
    `bits` bits each; "huffman" codes those weights that become smaller by it. The file is replaced as a whole or not at all.
    """
    own = {id(layer.weight()): layer.name for layer in palettizer.layers}
    shared = {name: own[id(p)] for name, p in palettizer._model[0].named_parameters(remove_duplicate=False) if own.get(id(p), name) != name}
    save_clustered(palettizer.clustered(), palettizer.model_state(), path, entropy=entropy, aliases=shared)


def save_clustered(clustered, state, path, *, entropy=None, aliases=None):
    """Writes a state_dict in which some weights are `clustered`, name -> `Clustered`, and the others as they are in `state`.

    aliases: other name -> name of the same weight, beside those that tensors in `state` are seen to have.
    """
    state = {name: _checked(name, tensor) for name, tensor in sorted(state.items(), key=lambda pair: pair[0] not in clustered)}
    aliases = same_tensors(state) | (aliases or {})
    dense = {name: tensor for name, tensor in state.items() if name not in clustered and name not in aliases}
    planned = [Planned(name, c.shape, c.dtype, c.form) for name, c in clustered.items()]
    planned += by_alignment([Planned(name, tuple(t.shape), t.dtype) for name, t in dense.items()])
    with saving(path, planned, aliases, entropy=entropy) as saver:
        for name, *_, form in planned:
            saver.add(name, clustered[name] if form else dense[name])


def load_palettized(path):
    """name -> tensor, dense and on the CPU, ready for `load_state_dict`: what `save_palettized` or `r2kernels compress` wrote.

    The whole file is checked. ValueError names the tensor that is wrong: truncated, changed, too long, of another version, of a size that does not agree
    with its bytes. No code from a file is ever run.
    """
    with Palettized(path) as file:
        tensors = {entry.name: tensor for entry, tensor in file.read(file.own)}
    return {entry.name: tensors[file.aliases.get(entry.name, entry.name)] for entry in file.entries}


def _checked(name, tensor):
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        raise TypeError(f"{name} of the model's state_dict is a {type(tensor).__name__}; only dense tensors with data can be saved")
    return tensor


def by_alignment(planned):
    """In an order in which every tensor lies at a multiple of the size of its numbers."""
    return sorted(planned, key=lambda p: -p.dtype.itemsize)


@contextlib.contextmanager
def saving(path, planned, aliases=None, *, entropy=None, overwrite=True):
    """A `Saver` of a file that is put in place at the end of the block. Of the tensors `planned` those with a form come first, in any order."""
    if entropy not in ENTROPIES:
        raise ValueError(f"entropy must be one of {ENTROPIES}, got {entropy!r}")
    with container.replacing(path, overwrite) as file:
        saver = Saver(file, planned, aliases or {}, entropy)
        yield saver
        saver.finish()


class Saver:
    def __init__(self, file, planned, aliases, entropy):
        self.aliases, self.entropy, self.weights, self.checksums = aliases, entropy, {}, []
        parts = [f"{p.name}:{part}" for p in planned if p.form for part in PARTS]
        names = Counter(["__metadata__", *aliases, *[p.name for p in planned], *parts])
        twice = [name for name, times in names.items() if times > 1]
        if twice:
            raise CheckpointError(f"{twice[0]} cannot be stored: a part of the file has this name")
        for p in planned:
            container.check_storable(p.name, p.shape, p.dtype)
            if p.form and p.form.cluster_dim > MOST_DIM:
                raise CheckpointError(f"{p.name} has cluster_dim {p.form.cluster_dim}; at most {MOST_DIM} can be stored")
        self.writer = container.Writer(file, self._room(planned))

    def _room(self, planned):
        """What the header needs at most, where some weights with a form may be stored dense."""
        most, entries, weights = sum(_most_bytes(p, self.entropy) for p in planned), {}, {}
        for p in planned:
            parts = parts_of_planned(p, self.entropy) or {p.name: (p.dtype, p.shape)}
            if p.form:
                weights[p.name] = describe(p.shape, p.dtype, p.form, self.entropy)
            entries |= {name: container.entry(dtype, [most if n is None else n for n in shape], most, most) for name, (dtype, shape) in parts.items()}
        return len(container.header(entries, self._metadata(weights, len(entries))))

    def _metadata(self, weights, count, checksums=()):
        return {"checksum": container.UNSEALED, "format": FORMAT, "version": VERSION, "weights": _json(weights), "aliases": _json(self.aliases),
                "checksums": "".join(f"{c:08x}" for c in checksums) or container.UNSEALED * count}

    def add(self, name, value):
        """The bytes that a tensor or a `Clustered` takes."""
        if not isinstance(value, Clustered):
            self.checksums.append(self.writer.add(name, value))
            return value.nbytes
        entropy, parts = smallest(value, self.entropy)
        self.weights[name] = describe(value.shape, value.dtype, value.form, entropy)
        before = self.writer.size
        for part, tensor in sorted(parts.items(), key=lambda pair: (-pair[1].itemsize, pair[0] == "codes")):
            if part == "codes":
                tensor = torch.nn.functional.pad(tensor, (0, -(self.writer.size + len(tensor)) % 8))
            self.checksums.append(self.writer.add(f"{name}:{part}", tensor))
        return self.writer.size - before

    def finish(self):
        self.writer.finish(self._metadata(self.weights, len(self.checksums), self.checksums))


def parts_of_planned(planned, entropy):
    """full name -> (dtype, shape) of its parts"""
    parts = parts_of(planned.shape, planned.dtype, planned.form, entropy) if planned.form else {}
    return {f"{planned.name}:{part}": how for part, how in parts.items()}


def _most_bytes(planned, entropy):
    """What a tensor takes at most."""
    dense = math.prod(planned.shape) * planned.dtype.itemsize
    if planned.form is None:
        return dense
    parts = parts_of(planned.shape, planned.dtype, planned.form, entropy)
    packed = Geometry(planned.shape, planned.form).groups_of(planned.form.bits).nbytes + 8
    return max(dense, packed + sum(math.prod(shape) * dtype.itemsize for part, (dtype, shape) in parts.items() if part != "codes"))


def _json(data):
    return json.dumps(data, separators=(",", ":"))


def describe(shape, dtype, form, entropy):
    """What the metadata says of a clustered weight; what is as usual is left out."""
    fields = form._asdict() | {"entropy": entropy}
    unusual = {key: value for key, value in fields.items() if key not in DEFAULTS or value != DEFAULTS[key]}
    return {"shape": list(shape), "dtype": container.NAMES[dtype], **unusual}


def parts_of(shape, dtype, form, entropy):
    """part -> (dtype, shape) of the tensors that a clustered weight is stored as; None for a number that is not known before it is coded."""
    g, wide = Geometry(shape, form), torch.promote_types(dtype, torch.float32)
    parts = {"lut": (form.entry_dtype(dtype), (g.groups, 2**form.bits, form.cluster_dim)), "codes": (torch.uint8, (None,))}
    if form.lut_dtype == "int8":
        parts["lut_scale"] = wide, (g.groups, 1, 1)
    if form.per_channel_scale:
        parts["scale"] = dtype, (shape[0],)
    if g.leftovers:
        parts["leftovers"] = dtype, (g.leftovers,)
    if entropy == "huffman":
        parts["lengths"] = torch.uint8, (2**form.bits,)
        parts["blocks"] = torch.int32, (-(-g.rows // huffman.BLOCK),)
    return parts


def smallest(clustered, entropy):
    """(the entropy code used or None, part -> tensor): Huffman-coded where that is asked for and smaller than packed."""
    parts = {"lut": clustered.entries, "lut_scale": clustered.lut_scales, "scale": clustered.scales,
             "leftovers": clustered.leftovers if len(clustered.leftovers) else None}
    parts = {part: tensor.cpu() for part, tensor in parts.items() if tensor is not None}
    clustered = clustered._replace(codes=clustered.codes.cpu())
    if entropy == "huffman":
        lengths = huffman.code_lengths(clustered.counts().tolist())
        stream, sizes = huffman.encode(clustered.unpacked().codes, lengths)
        if len(stream) + len(lengths) + sizes.nbytes < clustered.geometry.groups_of(clustered.form.bits).nbytes:
            return entropy, parts | {"codes": stream, "lengths": torch.tensor(lengths, dtype=torch.uint8), "blocks": sizes}
    return None, parts | {"codes": clustered.packed().codes}


class Palettized(Checkpoint):
    """A palettized file: `entries` and `read` as for any checkpoint, `clustered(name)` for a weight as it is stored. A context manager.

    Sizes are checked when it is opened, before anything of their size is made; contents when they are read.
    """

    def __init__(self, path):
        self.reader = container.Reader(path)
        self.path = self.reader.path
        try:
            self._open()
        except BaseException:
            self.reader.close()
            raise

    def _open(self):
        reader, metadata = self.reader, self.reader.metadata
        if metadata.get("format") != FORMAT:
            raise self.error("is not a palettized file")
        if metadata.get("version") != VERSION:
            raise self.error(f"has version {metadata.get('version')!r:.40} of the format; this version of r2kernels reads {VERSION!r}")
        reader.check_seal()
        if metadata.keys() != {"checksum", "format", "version", "weights", "aliases", "checksums"}:
            raise self.error("has metadata other than those of the format")
        self._read_checksums(metadata["checksums"])
        rest = dict(reader.entries)
        self._weights = {name: self._described(name, fields) for name, fields in reader.json("list of weights", metadata["weights"]).items()}
        for name, (shape, dtype, form, entropy) in self._weights.items():
            self._check_parts(name, Geometry(shape, form), form, parts_of(shape, dtype, form, entropy), rest)
        entries = [Entry(name, shape, dtype) for name, (shape, dtype, *_) in self._weights.items()]
        entries += [Entry(name, stored.shape, stored.dtype) for name, stored in rest.items()]
        known = {entry.name: entry for entry in entries}
        self.own = entries
        self.aliases = reader.json("list of aliases", metadata["aliases"])
        for name, other in self.aliases.items():
            if not isinstance(other, str) or other not in known or name in known:
                raise self.error(f"{name} is another name of nothing, or a name that occurs twice")
        if len(known) < len(entries):
            raise self.error("has a clustered weight and a tensor of the same name")
        self.entries = sorted(entries + [known[other]._replace(name=name) for name, other in self.aliases.items()], key=lambda entry: natural(entry.name))

    def error(self, reason):
        return self.reader.error(reason)

    def _read_checksums(self, text):
        names = list(self.reader.entries)
        if len(text) != 8 * len(names) or not set(text) <= set("0123456789abcdef"):
            raise self.error(f"has checksums that are not those of {len(names)} tensors")
        self._checksums = {name: int(text[8 * i : 8 * i + 8], 16) for i, name in enumerate(names)}

    def _described(self, name, fields):
        """(shape, dtype, form, entropy) of a clustered weight, from its description."""
        if not isinstance(fields, dict) or not {"shape", "dtype", "bits"} <= set(fields) <= {"shape", "dtype", *Form._fields, "entropy"}:
            raise self.error(f"{name} is not described as a clustered weight is")
        shape, fields = self.reader.shape(name, fields["shape"]), DEFAULTS | fields
        dtype, entropy = container.DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None, fields["entropy"]
        form = Form(*[fields[field] for field in Form._fields])

        def is_int(value, most):
            return type(value) is int and 1 <= value <= most
        right = {
            "shape": len(shape) > 0 and min(shape) > 0, "dtype": dtype in DTYPES, "bits": is_int(form.bits, 8),
            "cluster_dim": is_int(form.cluster_dim, MOST_DIM), "layout": form.layout in LAYOUTS,
            "group_size": form.group_size is None or is_int(form.group_size, 2**62), "per_channel_scale": isinstance(form.per_channel_scale, bool),
            "lut_dtype": form.lut_dtype in tuple(LUT_DTYPES), "entropy": entropy in ENTROPIES}
        for field, fine in right.items():
            if not fine:
                raise self.error(f"{name} has {field} {fields[field]!r:.60}, which is not allowed")
        if Geometry(shape, form).rows == 0:
            raise self.error(f"{name} has shape {shape}, of less than a row of {form.cluster_dim}")
        return shape, dtype, form, entropy

    def _check_parts(self, name, geometry, form, parts, rest):
        """Takes the parts of a weight from `rest`; an error unless they are there and as large as its shape says."""
        for part in PARTS:
            stored = rest.pop(f"{name}:{part}", None)
            if (stored is None) == (part in parts):
                raise self.error(f"{name} has {'no' if part in parts else 'a'} part {part!r}, which does not agree with its own shape")
            if stored is None:
                continue
            dtype, shape = parts[part]
            if stored.dtype != dtype or (stored.shape != shape and shape != (None,)):
                raise self.error(f"{name} has a part {part!r} of {stored.dtype} and shape {stored.shape}, which does not agree with its own shape")
        found = self.reader.entries[f"{name}:codes"].shape
        coded = "blocks" in parts
        least = -(-geometry.rows // 8) if coded else geometry.groups_of(form.bits).nbytes
        if len(found) != 1 or found[0] < least or (not coded and found[0] >= least + 8):
            raise self.error(f"{name} has codes of shape {found}, which does not agree with its own shape")

    def clustered(self, name):
        """A clustered weight as it is stored, with its codes packed or a byte each."""
        shape, dtype, form, entropy = self._weights[name]
        parts = {part: self._part(f"{name}:{part}") for part in parts_of(shape, dtype, form, entropy)}
        geometry, codes = Geometry(shape, form), parts["codes"]
        if entropy:
            try:
                codes = huffman.decode(_unpadded(codes, parts["blocks"]), parts["blocks"], geometry.rows, parts["lengths"].tolist())
            except ValueError as error:
                raise self.error(f"{name} is corrupt ({error})") from error
        else:
            codes = codes[: geometry.groups_of(form.bits).nbytes]
        leftovers = parts.get("leftovers", torch.empty(0, dtype=dtype))
        return Clustered(shape, dtype, form, codes, 8 if entropy else form.bits, parts["lut"], parts.get("lut_scale"), parts.get("scale"), leftovers)

    def _part(self, name):
        return self.reader.read(name, self._checksums[name])

    def tensor(self, name):
        name = self.aliases.get(name, name)
        return self.clustered(name).decoded() if name in self._weights else self._part(name)

    def close(self):
        self.reader.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def _unpadded(stream, sizes):
    """A stream without what was added to it for the alignment of the next tensor."""
    size = int(sizes.long().clamp(min=0).sum())
    if not size <= len(stream) < size + 8:
        raise ValueError("its blocks are not as long as its codes")
    return stream[:size]


def is_palettized(path):
    """Whether a file says that it is one."""
    try:
        with container.Reader(path) as reader:
            return reader.metadata.get("format") == FORMAT
    except CheckpointError:
        return False


def opened(path):
    """A checkpoint of any kind, palettized or not."""
    return Palettized(path) if is_palettized(path) else Checkpoint(path)
