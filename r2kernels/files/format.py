"""Palettized files: a model with its weights as codes and look-up tables, in a safetensors file.

A clustered weight NAME is the tensors `NAME:lut` (groups, K, d), `NAME:codes` (bytes) and where it has them `NAME:lut_scale`, `NAME:scale` (of channels),
`NAME:leftovers`; a weight on uniform levels is `NAME:codes`, `NAME:scale` and `NAME:zero` (twice the zero point). Huffman-coded both also have
`NAME:lengths` (of the code words) and `NAME:blocks` (bytes of each). Every other tensor is under its own name. The metadata holds `format`, `version`,
what is known of these weights (`weights`), other names of the same tensors (`aliases`), and CRC-32 checksums: of all tensors in the order of the data
(`checksums`), and of the header with `checksum` as zeros.
"""

import contextlib
import json
import math
from collections import Counter
from typing import NamedTuple

import torch

from ..reference.checks import DTYPES
from . import container, huffman
from .checkpoint import Checkpoint, CheckpointError, Entry, natural, same_tensors
from .clustered import MOST_DIM, Form
from .uniform import Grid

FORMAT, VERSION = "r2kernels.palettized", "1"
ENTROPIES = (None, "huffman")
PARTS = ("lut", "codes", "lut_scale", "scale", "zero", "leftovers", "lengths", "blocks")
KINDS = {"clustered": Form, "uniform": Grid}


class Planned(NamedTuple):
    """A tensor that a file will hold; with a form, a clustered weight."""

    name: str
    shape: tuple
    dtype: torch.dtype
    form: Form | Grid | None = None


def save_palettized(palettizer, path, *, entropy=None):
    """Writes the model of a `Palettizer` with its weights as codes and look-up tables; `load_palettized` reads them back, bit for bit as `remove(bake=True)`
    leaves them.

    All other parameters and buffers of the model's state_dict are kept as they are; a tensor with several names is stored once. entropy: None packs codes into
    `bits` bits each; "huffman" codes those weights that become smaller by it. The file is replaced as a whole or not at all.
    """
    _save_attached(palettizer, palettizer.clustered(), path, entropy)


def save_quantized(quantizer, path, *, entropy=None):
    """Writes the model of a `Quantizer` with its weights as packed integer codes, scales and zero points; `load_palettized` reads them back, bit for bit as
    `remove(bake=True)` leaves them.

    The rest is as in `save_palettized`. The ranges of the activations are not in the file; they are in `quantizer.state_dict()`.
    """
    _save_attached(quantizer, quantizer.coded(), path, entropy)


def _save_attached(attached, coded, path, entropy):
    own = {id(layer.weight()): layer.name for layer in attached.layers}
    shared = {
        name: own[id(p)]
        for name, p in attached._model[0].named_parameters(remove_duplicate=False)
        if own.get(id(p), name) != name
    }
    save_clustered(coded, attached.model_state(), path, entropy=entropy, aliases=shared)


def save_clustered(clustered, state, path, *, entropy=None, aliases=None):
    """Writes a state_dict in which some weights are `clustered`, name -> `Clustered` or `Uniform`, and the others as they are in `state`.

    aliases: other name -> name of the same weight, beside those that tensors in `state` are seen to have.
    """
    state = {
        name: _checked(name, tensor)
        for name, tensor in sorted(state.items(), key=lambda pair: pair[0] not in clustered)
    }
    aliases = same_tensors(state) | (aliases or {})
    dense = {name: tensor for name, tensor in state.items() if name not in clustered and name not in aliases}
    planned = [Planned(name, c.shape, c.dtype, c.form) for name, c in clustered.items()]
    planned += by_alignment([Planned(name, tuple(t.shape), t.dtype) for name, t in dense.items()])
    with saving(path, planned, aliases, entropy=entropy) as saver:
        for name, *_, form in planned:
            saver.add(name, clustered[name] if form else dense[name])


def load_palettized(path):
    """name -> tensor, dense and on the CPU, ready for `load_state_dict`: what `save_palettized`, `save_quantized`, or `compress` and `quantize` on the command
    line wrote.

    The whole file is checked. ValueError names the tensor that is wrong: truncated, changed, too long, of another version, of a size that does not agree
    with its bytes. No code from a file is ever run.
    """
    with Palettized(path) as file:
        tensors = {entry.name: tensor for entry, tensor in file.read(file.own)}
    return {entry.name: tensors[file.aliases.get(entry.name, entry.name)] for entry in file.entries}


def _checked(name, tensor):
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        raise TypeError(
            f"{name} of the model's state_dict is a {type(tensor).__name__}; only dense tensors with data can be saved"
        )
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
            if isinstance(p.form, Form) and p.form.cluster_dim > MOST_DIM:
                raise CheckpointError(
                    f"{p.name} has cluster_dim {p.form.cluster_dim}; at most {MOST_DIM} can be stored"
                )
        self.writer = container.Writer(file, self._room(planned))

    def _room(self, planned):
        """What the header needs at most, where some weights with a form may be stored dense."""
        most, entries, weights = sum(_most_bytes(p, self.entropy) for p in planned), {}, {}
        for p in planned:
            parts = parts_of_planned(p, self.entropy) or {p.name: (p.dtype, p.shape)}
            if p.form:
                weights[p.name] = describe(p.shape, p.dtype, p.form, self.entropy)
            entries |= {
                name: container.entry(dtype, [most if n is None else n for n in shape], most, most)
                for name, (dtype, shape) in parts.items()
            }
        return len(container.header(entries, self._metadata(weights, len(entries))))

    def _metadata(self, weights, count, checksums=()):
        return {
            "checksum": container.UNSEALED,
            "format": FORMAT,
            "version": VERSION,
            "weights": _json(weights),
            "aliases": _json(self.aliases),
            "checksums": "".join(f"{c:08x}" for c in checksums) or container.UNSEALED * count,
        }

    def add(self, name, value):
        """The bytes that a tensor, a `Clustered` or a `Uniform` takes."""
        if isinstance(value, torch.Tensor):
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
    packed = planned.form.groups(planned.shape, planned.form.bits).nbytes + 8
    return max(
        dense,
        packed + sum(math.prod(shape) * dtype.itemsize for part, (dtype, shape) in parts.items() if part != "codes"),
    )


def _json(data):
    return json.dumps(data, separators=(",", ":"))


def describe(shape, dtype, form, entropy):
    """What the metadata says of a clustered weight; what is as usual is left out."""
    kind = next(kind for kind, of in KINDS.items() if isinstance(form, of))
    usual = _usual(kind)
    unusual = {
        key: value
        for key, value in (form._asdict() | {"kind": kind, "entropy": entropy}).items()
        if key not in usual or value != usual[key]
    }
    return {"shape": list(shape), "dtype": container.NAMES[dtype], **unusual}


def _usual(kind):
    """The fields that a description leaves out where they have these values."""
    return {**KINDS[kind]._field_defaults, "kind": "clustered", "entropy": None}


def parts_of(shape, dtype, form, entropy):
    """part -> (dtype, shape) of the tensors that a clustered weight is stored as; None for a number that is not known before it is coded."""
    parts = {**form.parts(shape, dtype), "codes": (torch.uint8, (None,))}
    if entropy == "huffman":
        parts["lengths"] = torch.uint8, (2**form.bits,)
        parts["blocks"] = torch.int32, (-(-form.groups(shape, form.bits).rows // huffman.BLOCK),)
    return parts


def smallest(clustered, entropy):
    """(the entropy code used or None, part -> tensor): Huffman-coded where that is asked for and smaller than packed."""
    parts = {part: tensor.cpu() for part, tensor in clustered.parts().items()}
    clustered = clustered._replace(codes=clustered.codes.cpu())
    if entropy == "huffman":
        lengths = huffman.code_lengths(clustered.counts().tolist())
        stream, sizes = huffman.encode(clustered.unpacked().codes, lengths)
        if (
            len(stream) + len(lengths) + sizes.nbytes
            < clustered.form.groups(clustered.shape, clustered.form.bits).nbytes
        ):
            return entropy, parts | {
                "codes": stream,
                "lengths": torch.tensor(lengths, dtype=torch.uint8),
                "blocks": sizes,
            }
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
            raise self.error(
                f"has version {metadata.get('version')!r:.40} of the format; this version of r2kernels reads {VERSION!r}"
            )
        reader.check_seal()
        if metadata.keys() != {"checksum", "format", "version", "weights", "aliases", "checksums"}:
            raise self.error("has metadata other than those of the format")
        self._read_checksums(metadata["checksums"])
        rest = dict(reader.entries)
        self._weights = {
            name: self._described(name, fields)
            for name, fields in reader.json("list of weights", metadata["weights"]).items()
        }
        for name, (shape, dtype, form, entropy) in self._weights.items():
            self._check_parts(name, form.groups(shape, form.bits), parts_of(shape, dtype, form, entropy), rest)
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
        self.entries = sorted(
            entries + [known[other]._replace(name=name) for name, other in self.aliases.items()],
            key=lambda entry: natural(entry.name),
        )

    def error(self, reason):
        return self.reader.error(reason)

    def _read_checksums(self, text):
        names = list(self.reader.entries)
        if len(text) != 8 * len(names) or not set(text) <= set("0123456789abcdef"):
            raise self.error(f"has checksums that are not those of {len(names)} tensors")
        self._checksums = {name: int(text[8 * i : 8 * i + 8], 16) for i, name in enumerate(names)}

    def _described(self, name, fields):
        """(shape, dtype, form, entropy) of a clustered weight, from its description."""
        kind = fields.get("kind", "clustered") if isinstance(fields, dict) else None
        form_of = KINDS.get(kind) if isinstance(kind, str) else None
        if not form_of or not {"shape", "dtype", "bits"} <= set(fields) <= {
            "shape",
            "dtype",
            "kind",
            *form_of._fields,
            "entropy",
        }:
            raise self.error(f"{name} is not described as a clustered or quantized weight is")
        shape, fields = self.reader.shape(name, fields["shape"]), _usual(kind) | fields
        dtype, entropy = (
            container.DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None,
            fields["entropy"],
        )
        form = form_of(*[fields[field] for field in form_of._fields])
        for field, fine in {
            "shape": len(shape) > 0 and min(shape) > 0,
            "dtype": dtype in DTYPES,
            "entropy": entropy in ENTROPIES,
        }.items():
            if not fine:
                raise self.error(f"{name} has {field} {fields[field]!r:.60}, which is not allowed")
        wrong = form.wrong(shape)
        if wrong:
            less = f", of less than a row of {form.cluster_dim}" if wrong[0] == "shape" else ", which is not allowed"
            raise self.error(f"{name} has {wrong[0]} {wrong[1]!r:.60}{less}")
        return shape, dtype, form, entropy

    def _check_parts(self, name, groups, parts, rest):
        """Takes the parts of a weight from `rest`; an error unless they are there and as large as its shape says."""
        for part in PARTS:
            stored = rest.pop(f"{name}:{part}", None)
            if (stored is None) == (part in parts):
                raise self.error(
                    f"{name} has {'no' if part in parts else 'a'} part {part!r}, which does not agree with its own shape"
                )
            if stored is None:
                continue
            dtype, shape = parts[part]
            if stored.dtype != dtype or (stored.shape != shape and shape != (None,)):
                raise self.error(
                    f"{name} has a part {part!r} of {stored.dtype} and shape {stored.shape}, which does not agree with its own shape"
                )
        found = self.reader.entries[f"{name}:codes"].shape
        coded = "blocks" in parts
        least = -(-groups.rows // 8) if coded else groups.nbytes
        if len(found) != 1 or found[0] < least or (not coded and found[0] >= least + 8):
            raise self.error(f"{name} has codes of shape {found}, which does not agree with its own shape")

    def clustered(self, name):
        """A clustered weight as it is stored, with its codes packed or a byte each."""
        shape, dtype, form, entropy = self._weights[name]
        parts = {part: self._part(f"{name}:{part}") for part in parts_of(shape, dtype, form, entropy)}
        groups, codes = form.groups(shape, form.bits), parts["codes"]
        if entropy:
            try:
                codes = huffman.decode(
                    _unpadded(codes, parts["blocks"]), parts["blocks"], groups.rows, parts["lengths"].tolist()
                )
            except ValueError as error:
                raise self.error(f"{name} is corrupt ({error})") from error
        else:
            codes = codes[: groups.nbytes]
        return form.restored(shape, dtype, codes, 8 if entropy else form.bits, parts)

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
