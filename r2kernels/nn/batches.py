"""Running a model on the batches of a loader: which parts of a batch it is given, where they lie, and a bar."""

import contextlib
import inspect
import operator
import sys
from collections.abc import Mapping
from itertools import islice

import torch

from ..reference import checks
from .attach import attached

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def check_loader(loader, batches, forward):
    """TypeError or ValueError for what `run` cannot take, before any batch is read."""
    if not hasattr(loader, "__iter__") or isinstance(loader, (torch.Tensor, Mapping, str)):
        raise TypeError(
            f"loader must give batches (an iterable of tensors, tuples or mappings), got {type(loader).__name__}"
        )
    if batches is not None:
        checks.count("batches", batches)
    if forward is not None and not callable(forward):
        raise TypeError(f"forward must be a function of (model, batch) or None, got {forward!r}")


def run(model, loader, device, *, batches=None, forward=None, title=""):
    """Runs the model on the batches, at most so many, and gives their number.

    A tensor is the model's input. Of a tuple or list the model is given as many elements as its forward has positional
    parameters without a default, at least one; the others are targets. A mapping, or a tuple that begins with one, is
    passed as keyword arguments, without those that forward does not have. `forward(model, batch)` runs it in any other
    way. Tensors, in containers too, are moved to the device. Where stderr is a terminal, tqdm, if it is installed,
    shows a bar.
    """
    forward, count = forward or call, 0
    for batch in _shown(islice(loader, batches), _length(loader, batches), title):
        forward(model, moved(batch, device))
        count += 1
    return count


@contextlib.contextmanager
def evaluating(model):
    """The model in eval(), with the hard weights of what is attached to it made once.

    Afterwards each of its modules has the mode that it had.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        with contextlib.ExitStack() as stack:
            for other in attached(model):
                stack.enter_context(other.frozen())
            yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


def _length(loader, batches):
    """How many batches there will be, or None."""
    known = operator.length_hint(loader) or None
    return known if batches is None else min(batches, known or batches)


def _shown(items, total, title):
    if sys.stderr is None or not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, title, total, unit="batch")


def moved(batch, device):
    """A batch with what can be moved on the device; containers are made again."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [moved(part, device) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def call(model, batch):
    """The model on a batch, as `run` says."""
    parameters = inspect.signature(model.forward).parameters.values()
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError("loader gave an empty tuple; its first element must be the model's input")
        if not isinstance(batch[0], Mapping):
            needed = [p.name for p in parameters if p.kind in _POSITIONAL and p.default is p.empty]
            if len(batch) < len(needed):
                raise ValueError(
                    f"loader gave a {type(batch).__name__} of {len(batch)}; forward of {type(model).__name__} needs "
                    f"{len(needed)} inputs ({', '.join(needed)}); see forward="
                )
            return model(*batch[: max(len(needed), 1)])
        batch = batch[0]
    if isinstance(batch, Mapping):
        takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
        known = {p.name for p in parameters if p.kind != p.POSITIONAL_ONLY}
        return model(**{name: value for name, value in batch.items() if takes_all or name in known})
    if not isinstance(batch, torch.Tensor):
        raise TypeError(
            f"loader gave a {type(batch).__name__}; allowed are a tensor, a tuple or list with the inputs first, "
            "or a mapping of keyword arguments; for another pass forward=, a function of (model, batch)"
        )
    return model(batch)
