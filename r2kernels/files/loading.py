"""Reading palettized files. `format` says what is in them; nothing in them is trusted."""

from ..reference.checks import DTYPES
from . import container, huffman
from .checkpoint import Checkpoint, CheckpointError, Entry, natural, refuse_key
from .folders import INDEX, Sharded, chosen, first_shard
from .format import (
    ENTROPIES,
    FORMAT,
    KINDS,
    PARTS,
    VERSION,
    WITH_INPUTS,
    Planned,
    parts_of,
    restored_input,
    usual_fields,
    wrong_names,
)


def load_palettized(path):
    """name -> tensor, dense and on the CPU, ready for `load_state_dict`.

    Of a file that `save_palettized`, `save_quantized`, or `compress` and `quantize` on the command line wrote, or a
    folder of such files and their index. The whole file is checked. ValueError names the tensor that is wrong:
    truncated, changed, too long, of another version, of a size that does not agree with its bytes. Several names of a
    tensor are one tensor; were each a copy, all would take at most 64 times the bytes of those without, or 64 MiB. No
    code from a file is ever run.
    """
    with palettized(path) as file:
        tensors = {entry.name: tensor for entry, tensor in file.read(file.own)}
    return {entry.name: tensors[file.aliases.get(entry.name, entry.name)] for entry in file.entries}


def load_ranges(path):
    """Layer's name -> `IntegerInput`: what quantizes the activations of a model that `save_quantized` wrote.

    Bits, scale, zero point, whether signed, and for EWGS an offset; empty for a file without. Checks the header alone;
    ValueError names what is wrong.
    """
    with palettized(path) as file:
        return file.inputs


class Palettized(Checkpoint):
    """A palettized file: `entries` and `read` as for any checkpoint, `clustered(name)` for a weight as it is stored.

    A context manager. The checksum of the header and all sizes are checked when the file is opened, before anything of
    their size is made; the checksum of a tensor, and its contents, when it is read.
    """

    _decoded = None, None  # name and tensor of the last `part`

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
        if metadata.get("version") not in (VERSION, WITH_INPUTS):
            raise self.error(
                f"has version {metadata.get('version')!r:.40} of the format; "
                f"this version of r2kernels reads {VERSION!r} and {WITH_INPUTS!r}"
            )
        reader.check_header()
        known = {"checksum", "format", "version", "weights", "aliases", "checksums"}
        known |= {"inputs"} if metadata["version"] == WITH_INPUTS else set()
        if metadata.keys() - {"user"} != known:
            raise self.error("has metadata other than those of the format")
        self.metadata, self.unread = reader.json("user's metadata", metadata.get("user", "{}")), {}
        if not all(isinstance(value, str) for value in self.metadata.values()):
            raise self.error("its user's metadata is corrupt")
        self._read_checksums(metadata["checksums"])
        self.inputs = self._read_inputs(metadata.get("inputs", "{}"))
        rest = dict(reader.entries)
        self._weights = {
            name: self._described(name, fields)
            for name, fields in reader.json("list of weights", metadata["weights"]).items()
        }
        for name, (shape, dtype, form, entropy) in self._weights.items():
            self._check_parts(name, form.groups(shape, form.bits), parts_of(shape, dtype, form, entropy), rest)
        planned = [Planned(name, shape, dtype, form) for name, (shape, dtype, form, _) in self._weights.items()]
        planned += [Planned(name, stored.shape, stored.dtype) for name, stored in rest.items()]
        entries = [Entry(*p[:3]) for p in planned]
        known = {entry.name: entry for entry in entries}
        self.own = entries
        self.aliases = reader.json("list of aliases", metadata["aliases"])
        for name, other in self.aliases.items():
            if not isinstance(other, str) or other not in known or name in known:
                raise self.error(f"{name} is another name of nothing, or a name that occurs twice")
        if reason := wrong_names(planned, self.aliases):
            raise self.error(reason)
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

    def _read_inputs(self, text):
        inputs = {}
        for name, fields in self.reader.json("list of inputs", text).items():
            try:
                inputs[name] = restored_input(fields)
            except (ValueError, TypeError, AttributeError, OverflowError) as error:
                raise self.error(f"the input of {name} is not described as it must be ({str(error)[:80]})") from error
        return inputs

    def _described(self, name, fields):
        """(shape, dtype, form, entropy) of a clustered weight, from its description."""
        kind = fields.get("kind", "clustered") if isinstance(fields, dict) else None
        form_of = KINDS.get(kind) if isinstance(kind, str) else None
        known = {"shape", "dtype", "kind", "entropy", *(form_of._fields if form_of else ())}
        if not form_of or not {"shape", "dtype", "bits"} <= set(fields) <= known:
            raise self.error(f"{name} is not described as a clustered or quantized weight is")
        shape, fields = self.reader.shape(name, fields["shape"]), usual_fields(kind) | fields
        dtype = container.DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
        entropy, form = fields["entropy"], form_of(*[_tuple(fields[field]) for field in form_of._fields])
        right = {"shape": len(shape) > 0 and min(shape) > 0, "dtype": dtype in DTYPES, "entropy": entropy in ENTROPIES}
        for field, fine in right.items():
            if not fine:
                raise self.error(f"{name} has {field} {fields[field]!r:.60}, which is not allowed")
        wrong = form.wrong(shape)
        if wrong:
            less = f", of less than a row of {form.cluster_dim}" if wrong[0] == "shape" else ", which is not allowed"
            raise self.error(f"{name} has {wrong[0]} {wrong[1]!r:.60}{less}")
        return shape, dtype, form, entropy

    def _check_parts(self, name, groups, parts, rest):
        """Takes the parts of a weight from `rest`; an error unless they are there and as large as its shape says."""
        disagrees = "which does not agree with its own shape"
        for part in PARTS:
            stored = rest.pop(f"{name}:{part}", None)
            if (stored is None) == (part in parts):
                raise self.error(f"{name} has {'no' if part in parts else 'a'} part {part!r}, {disagrees}")
            if stored is None:
                continue
            dtype, shape = parts[part]
            if stored.dtype != dtype or (stored.shape != shape and shape != (None,)):
                found = f"{stored.dtype} and shape {stored.shape}"
                raise self.error(f"{name} has a part {part!r} of {found}, {disagrees}")
        found = self.reader.entries[f"{name}:codes"].shape
        coded = "blocks" in parts
        least = -(-groups.rows // 8) if coded else groups.nbytes
        if len(found) != 1 or found[0] < least or (not coded and found[0] >= least + 8):
            raise self.error(f"{name} has codes of shape {found}, {disagrees}")

    def clustered(self, name):
        """A clustered weight as it is stored, with its codes packed or a byte each."""
        shape, dtype, form, entropy = self._weights[name]
        parts = {part: self._stored(f"{name}:{part}") for part in parts_of(shape, dtype, form, entropy)}
        groups, codes = form.groups(shape, form.bits), parts["codes"]
        if entropy:
            try:
                stream, lengths = _unpadded(codes, parts["blocks"]), parts["lengths"].tolist()
                codes = huffman.decode(stream, parts["blocks"], groups.rows, lengths)
            except ValueError as error:
                raise self.error(f"{name} is corrupt ({error})") from error
        else:
            codes = codes[: groups.nbytes]
        return form.restored(shape, dtype, codes, 8 if entropy else form.bits, parts)

    def _stored(self, name):
        """A stored tensor, whose checksum the reader compares."""
        return self.reader.read(name, self._checksums[name])

    def tensor(self, name):
        name = self.aliases.get(name, name)
        return self.clustered(name).decoded() if name in self._weights else self._stored(name)

    def part(self, name, begin=0, end=None):
        if self._decoded[0] != name:
            self._decoded = name, self.tensor(name)
        whole = self._decoded[1]
        return whole if end is None else whole[begin:end]

    def close(self):
        self.reader.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


class PalettizedShards(Sharded):
    """The same of a folder of palettized files and the index at `path` that names them."""

    def _open(self, path):
        return Palettized(path)

    @property
    def own(self):
        return [entry for entry in self.entries if entry.name not in self.aliases]

    @property
    def inputs(self):
        return {name: levels for shard in self.files()[1:] for name, levels in self._opened(shard.name).inputs.items()}

    def clustered(self, name):
        return self._opened(self._shard_of[name]).clustered(name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._shard = None


def palettized(path):
    """A `Palettized` file, or of a folder or an index its `PalettizedShards`."""
    path = chosen(path)
    return PalettizedShards(path) if path.name.endswith(INDEX) else Palettized(path)


def _tuple(value):
    """A list of JSON as it was written."""
    return tuple(value) if isinstance(value, list) else value


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


def opened(path, key=None):
    """A checkpoint of any kind: palettized or not, in one file or in shards, or the one of a folder (`chosen`).

    `key` as for a `Checkpoint`.
    """
    path = chosen(path)
    if path.name.endswith(INDEX):
        refuse_key(path, key)
        first = first_shard(path)
        return (PalettizedShards if first.exists() and is_palettized(first) else Sharded)(path)
    if not is_palettized(path):
        return Checkpoint(path, key)
    refuse_key(path, key)
    return Palettized(path)
