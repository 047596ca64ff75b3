"""Writing palettized files. `format` says what is in them.

The checksum of every tensor comes from `container.Writer.add` and is kept by `Saver`; that of the header is put there
by `container.Writer.finish`.
"""

import contextlib
import itertools
import json
import math
import warnings

import torch

from . import container, huffman
from .checkpoint import CheckpointError, same_tensors
from .clustered import MOST_DIM, Form
from .format import ENTROPIES, FORMAT, VERSION, WITH_INPUTS, Planned, describe, describe_input, parts_of, wrong_names
from .paths import replacing


def save_palettized(palettizer, path, *, entropy=None):
    """Writes the model of a `Palettizer` with its weights as codes and look-up tables.

    `load_palettized` reads them back, bit for bit as `remove(bake=True)` leaves them. All other parameters and buffers
    of the model's state_dict are kept as they are; a tensor with several names is stored once. entropy: None packs
    codes into `bits` bits each; "huffman" codes those weights by which the file becomes smaller. A weight with a NaN or
    an infinity is stored dense, with a warning. The file is replaced as a whole or not at all, and keeps its mode; of a
    symlink what it leads to is replaced. Under `fully_shard` all ranks call this, and each writes its file. TypeError
    or ValueError names the tensor that cannot be stored, and OSError says why the file cannot be written.
    """
    _save_attached(palettizer, palettizer.clustered(), path, entropy)


def save_quantized(quantizer, path, *, entropy=None):
    """Writes the model of a `Quantizer` with its weights as packed integer codes, scales and zero points.

    `load_palettized` reads them back, bit for bit as `remove(bake=True)` leaves them, and `load_ranges` what quantizes
    the activations. The rest is as in `save_palettized`.
    """
    inputs = quantizer.levels()
    for name, levels in inputs.items():
        if wrong := levels.wrong():
            raise CheckpointError(f"the input of {name} has {wrong[0]} {wrong[1]!r}, which cannot be stored")
    _save_attached(quantizer, quantizer.coded(), path, entropy, inputs)


def _save_attached(attached, coded, path, entropy, inputs=None):
    state = attached.model_state()
    for layer in attached.layers:
        w = layer.gathered().weight()
        if not w.isfinite().all():
            warnings.warn(f"{layer.name} is stored dense: it has a NaN or an infinity", stacklevel=4)
            state[layer.name] = w.detach()
            del coded[layer.name]
    own = {id(layer.weight()): layer.name for layer in attached.layers}
    shared = {
        name: own[id(p)]
        for name, p in attached._model[0].named_parameters(remove_duplicate=False)
        if own.get(id(p), name) != name
    }
    save_clustered(coded, state, path, entropy=entropy, aliases=shared, inputs=inputs)


def save_clustered(clustered, state, path, *, entropy=None, aliases=None, inputs=None):
    """Writes a state_dict in which some weights are `clustered`, and the others as they are in `state`.

    clustered: name -> `Clustered` or `Uniform`. aliases: other name -> name of the same weight, beside those that
    tensors in `state` are seen to have. inputs: layer's name -> `IntegerInput`.
    """
    first = sorted(state.items(), key=lambda pair: pair[0] not in clustered)
    state = {name: _checked(name, tensor) for name, tensor in first}
    aliases = same_tensors(state) | (aliases or {})
    dense = {name: tensor for name, tensor in state.items() if name not in clustered and name not in aliases}
    planned = [Planned(name, c.shape, c.dtype, c.form) for name, c in clustered.items()]
    planned += by_alignment([Planned(name, tuple(t.shape), t.dtype) for name, t in dense.items()])
    with saving(path, planned, aliases, entropy=entropy, inputs=inputs) as saver:
        for name, *_, form in planned:
            saver.add(name, clustered[name] if form else dense[name])


def _checked(name, tensor):
    """A tensor of a state_dict, or an error that says why it cannot be saved."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        raise TypeError(
            f"{name} of the model's state_dict is a {type(tensor).__name__}; only dense tensors with data can be saved"
        )
    return tensor


def by_alignment(planned):
    """In an order in which every tensor lies at a multiple of the size of its numbers."""
    return sorted(planned, key=lambda p: -p.dtype.itemsize)


@contextlib.contextmanager
def saving(path, planned, aliases=None, *, entropy=None, overwrite=True, user=None, inputs=None):
    """A `Saver` of a file that is put in place at the end of the block.

    Of the tensors `planned` those with a form are to be added first, in any order. user: metadata of its own.
    """
    if entropy not in ENTROPIES:
        raise ValueError(f"entropy must be one of {ENTROPIES}, got {entropy!r}")
    with replacing(path, overwrite) as file:
        saver = Saver(file, planned, aliases or {}, entropy, user, inputs)
        yield saver
        saver.finish()


class Saver:
    """Adds tensors to a palettized file, one at a time.

    planned: a `Planned` for each. aliases: other name -> name of one of them. user: name -> text. inputs: as in
    `save_clustered`.
    """

    def __init__(self, file, planned, aliases, entropy, user=None, inputs=None):
        self.aliases, self.entropy, self.weights, self.checksums, self.user = aliases, entropy, {}, [], user
        self.inputs = {name: describe_input(levels) for name, levels in (inputs or {}).items()}
        if reason := wrong_names(planned, aliases):
            raise CheckpointError(reason)
        for p in planned:
            container.check_storable(p.name, p.shape, p.dtype)
            if isinstance(p.form, Form) and p.form.cluster_dim > MOST_DIM:
                raise CheckpointError(
                    f"{p.name} has cluster_dim {p.form.cluster_dim}; at most {MOST_DIM} can be stored"
                )
        self.file, self.writer = file, container.Writer(file, self._room(planned))
        self.last = None  # what `restore` takes of the tensor that was added last

    def _room(self, planned):
        """What the header needs at most, where some weights with a form may be stored dense."""
        most, entries, weights = sum(most_bytes(p, self.entropy) for p in planned), {}, {}
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
            "checksum": container.NO_CHECKSUM,
            "format": FORMAT,
            "version": WITH_INPUTS if self.inputs else VERSION,
            "weights": _json(weights),
            "aliases": _json(self.aliases),
            **({"inputs": _json(self.inputs)} if self.inputs else {}),
            "checksums": "".join(f"{c:08x}" for c in checksums) or container.NO_CHECKSUM * count,
            **({"user": _json(self.user)} if self.user else {}),
        }

    def add(self, name, value):
        """Writes a tensor, a `Clustered` or a `Uniform`, and keeps its checksums; the bytes that it takes."""
        before, known = self.writer.size, len(self.checksums)
        if isinstance(value, torch.Tensor):
            self.checksums.append(self.writer.add(name, value))
        else:
            self._add_coded(name, value)
        self.last = {
            "entries": dict(itertools.islice(self.writer.entries.items(), known, None)),
            "checksums": self.checksums[known:],
            "weights": {name: self.weights[name]} if name in self.weights else {},
        }
        return self.writer.size - before

    def restore(self, added):
        """Goes on behind the tensors of which `last` was kept; CheckpointError where the file has others."""
        entries = {name: fields for one in added for name, fields in one["entries"].items()}
        self.checksums = [checksum for one in added for checksum in one["checksums"]]
        self.weights = {name: described for one in added for name, described in one["weights"].items()}
        self.writer.restore(entries, self.checksums)

    def _add_coded(self, name, value):
        entropy, parts = smallest(value, self.entropy, self._described_in(name, value))
        self.weights[name] = describe(value.shape, value.dtype, value.form, entropy)
        for part, tensor in sorted(parts.items(), key=lambda pair: (-pair[1].itemsize, pair[0] == "codes")):
            if part == "codes":
                tensor = torch.nn.functional.pad(tensor, (0, -(self.writer.size + len(tensor)) % 8))
            self.checksums.append(self.writer.add(f"{name}:{part}", tensor))

    def _described_in(self, name, value):
        """Bytes of the header that describe the parts of an entropy code, at most."""
        planned = Planned(name, value.shape, value.dtype, value.form)
        here, most = self.writer.size, self.writer.size + most_bytes(planned, self.entropy)

        def size(entropy):
            entries = {
                part: container.entry(dtype, [most if n is None else n for n in shape], here, most)
                for part, (dtype, shape) in parts_of_planned(planned, entropy).items()
            }
            described = _json(describe(value.shape, value.dtype, value.form, entropy))
            return len(container.header(entries, {"checksums": container.NO_CHECKSUM * len(entries)} | {"": described}))

        return size(self.entropy) - size(None)

    def finish(self):
        """Writes the header, which holds the checksums."""
        tight = self.entropy is not None  # there is room for codes that turned out not to pay
        self.writer.finish(self._metadata(self.weights, len(self.checksums), self.checksums), tight)


def parts_of_planned(planned, entropy):
    """full name -> (dtype, shape) of its parts"""
    parts = parts_of(planned.shape, planned.dtype, planned.form, entropy) if planned.form else {}
    return {f"{planned.name}:{part}": how for part, how in parts.items()}


def most_bytes(planned, entropy):
    """What a tensor takes in the data at most."""
    if planned.form is None:
        return planned.nbytes
    parts = parts_of(planned.shape, planned.dtype, planned.form, entropy)
    packed = planned.form.groups(planned.shape, planned.form.bits).nbytes + 8
    beside = sum(math.prod(shape) * dtype.itemsize for part, (dtype, shape) in parts.items() if part != "codes")
    return max(planned.nbytes, packed + beside)


def _json(data):
    return json.dumps(data, separators=(",", ":"))


def smallest(clustered, entropy, described=0):
    """(entropy code used or None, part -> tensor): Huffman-coded where that is asked for and smaller than packed, with
    the bytes that describe the code, and those that fill up data and header."""
    parts = {part: tensor.cpu() for part, tensor in clustered.parts().items()}
    clustered = clustered._replace(codes=clustered.codes.cpu())
    if entropy == "huffman":
        lengths = huffman.code_lengths(clustered.counts().tolist())
        stream, sizes = huffman.encode(clustered.unpacked().codes, lengths)
        packed = clustered.form.groups(clustered.shape, clustered.form.bits).nbytes
        if len(stream) + len(lengths) + sizes.nbytes + (described and described + 24) < packed:
            lengths = torch.tensor(lengths, dtype=torch.uint8, device="cpu")
            return entropy, parts | {"codes": stream, "lengths": lengths, "blocks": sizes}
    return None, parts | {"codes": clustered.packed().codes}
