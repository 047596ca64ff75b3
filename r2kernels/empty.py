"""Lists of which some tensors are empty, as the shards of a sharded model are: what an op gives for those is what the
reference does, and a backend never sees them."""

import re

import torch

_EACH = ("weights", "xs", "gs", "clusters", "out", "needed")  # arguments with something for each tensor of a list
_SECOND = ("history", "moments")  # those in which tensors are counted in the second dimension,
_SECOND_RESULTS = {("soft_extrema", 0), ("dkm", 1), ("dkm", 2)}  # and results of a forward, by their place


def apart(kernel, plain, op, schema, at):
    """The kernel of an op for lists that may hold empty tensors; its weights are argument `at`."""
    names = [re.split(r"[ =]", field.strip())[1] for field in schema[1 : schema.index(")")].split(",")]
    each = (*_EACH, "grads") if op.name == "dkm" else _EACH
    second = (*_SECOND, "grad") if op.name == "soft_extrema" else _SECOND

    def run(*args, **options):
        weights = args[at]
        if all([w.numel() for w in weights]):
            return kernel(*args, **options)
        given = dict(zip(names, args, strict=True))
        axis = given.get("axis")
        sizes = [1 if axis is None else w.shape[axis] for w in weights]  # numbers of a tensor in a flat parameter
        parts = [[i for i, w in enumerate(weights) if bool(w.numel()) == full] for full in (True, False)]
        results = []
        for some, function in zip(parts, (kernel, plain), strict=True):
            if some:
                cut = [_some(given[n], some, sizes, n in each, int(n in second)) for n in names]
                kept = {n: _some(value, some, sizes, n in each, 0) for n, value in options.items()}
                results.append(function(*cut, **kept))
        if len(results) == 1:
            return results[0]
        order = sorted(range(len(weights)), key=[*parts[0], *parts[1]].__getitem__)
        many = isinstance(results[0], tuple)
        pairs = zip(*results, strict=True) if many else [results]
        by_term = 1 if at else 0  # from here on a list of `terms` has something for each term
        joined = []
        for place, pair in enumerate(pairs):
            if place == 0 and options.get("out") is not None:
                joined.append(options["out"])
            elif op.name == "terms" and place >= by_term:
                joined.append([_joined(tensors, parts, sizes, order, 0) for tensors in zip(*pair, strict=True)])
            else:
                joined.append(_joined(pair, parts, sizes, order, int(not at and (op.name, place) in _SECOND_RESULTS)))
        return tuple(joined) if many else joined[0]

    return run


def _some(value, some, sizes, is_each, dim):
    """What of an argument belongs to some tensors of the list."""
    if isinstance(value, torch.Tensor):
        pieces = value.split(sizes, dim)
        return torch.cat([pieces[i] for i in some], dim)
    if is_each and value is not None:
        return type(value)([value[i] for i in some])
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
        return [_some(v, some, sizes, False, 0) for v in value]
    return value


def _joined(pair, parts, sizes, order, dim):
    """The results of the two parts as one of the list."""
    if isinstance(pair[0], list):
        pieces = [*pair[0], *pair[1]]
        return [pieces[i] for i in order]
    if pair[0].dim() == 0:  # how often `dkm_solve` went round
        return torch.maximum(*pair)
    pieces = [p for t, some in zip(pair, parts, strict=True) for p in t.split([sizes[i] for i in some], dim)]
    return torch.cat([pieces[i] for i in order], dim)
