"""What an error of each weight of a checkpoint counts, and the bits that each has under a budget."""

import warnings

from ..files.checkpoint import Checkpoint, CheckpointError
from ..files.clustered import Form
from ..nn.allocation import CHOICES, Budget
from ..nn.clustering import ClusteringOptions, few_rows
from ..nn.importance import checked_importance


class Importance:
    """Importances of weights in a file; None for a weight without, and one that is 0 everywhere."""

    def __init__(self, path, checkpoint):
        self.file = Checkpoint(path)
        shapes = {entry.name: entry.shape for entry in self.file.entries}
        self.path, missing = self.file.path, []
        for entry in checkpoint.weights:
            name = checkpoint.aliases.get(entry.name, entry.name)
            if name not in shapes:
                missing.append(name)
            elif tuple(shapes[name]) != tuple(entry.shape):
                raise CheckpointError(f"{path}: {name} has shape {tuple(shapes[name])}, not {tuple(entry.shape)}")
        if len(missing) == len(checkpoint.weights):
            raise CheckpointError(f"{path}: has importances of none of the weights, such as {missing[0]}")
        if missing:
            text = f"{path}: without importances, and not weighted: {', '.join(missing[:3])}"
            warnings.warn(text + f" and {len(missing) - 3} more" * (len(missing) > 3), stacklevel=2)
        self.names = set(shapes)

    def identity(self):
        return self.file.identity()

    def of(self, name, begin=0, end=None):
        """Those of the indices begin <= i < end of a weight's first dimension."""
        if name not in self.names:
            return None
        h = self.file.part(name, begin, end)
        try:
            return checked_importance(name, h, h.shape) if h.any() else None
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {error}") from None


def forms_within(checkpoint, planned, budget, *, preserve_zeros=False, importance=None, advance=lambda nbytes: None):
    """Name -> `Form` of the planned weights that are finite, for so many bits per number of theirs.

    Calls `advance` with the bytes of tensors done. CheckpointError where the budget is too small.
    """
    forms, spending, given = [Form.of(ClusteringOptions(**choice)) for choice in CHOICES], Budget(), {}
    for p in planned:
        if p.form:
            fitting = [form for form in forms if few_rows(p.shape, form) is None]
            ways = [(form, preserve_zeros) for form in fitting]
            if spending.add(checkpoint.part(p.name), ways, importance and importance.of(p.name)):
                given[p.name] = fitting
        advance(p.nbytes)
    try:
        chosen = spending.spend(budget) if given else []
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: --{error}") from None
    return {name: forms[i] for (name, forms), i in zip(given.items(), chosen, strict=True)}
