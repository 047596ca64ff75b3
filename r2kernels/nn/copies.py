"""Copies of a model that something is attached to, as averages of weights (EMA, SWA) are."""

import torch

from ..reference import checks
from .attach import attached


@torch.no_grad()
def copy_attached(source, target, *, decay=None):
    """Gives what is attached to `target`, a copy of the model `source`, the centroids, ranges and temperatures of what
    is attached to `source`.

        palettizer = Palettizer(model, bits=2)
        ema = torch.optim.swa_utils.AveragedModel(model)   # a deepcopy has an attachment of its own
        ...
        ema.update_parameters(model)
        copy_attached(model, ema.module)                   # before it is evaluated or saved

    decay: None copies; a number in [0, 1) makes them decay * target's + (1 - decay) * source's, an average like that of
    the weights (what had not started yet, and flags and counts, are copied). ValueError where different things are
    attached to the two.
    """
    if decay is not None:
        checks.number("decay", decay, "a number in [0, 1)", lambda v: 0 <= v < 1)
    pairs = list(zip(attached(source), attached(target), strict=False))
    alike = len(attached(source)) == len(attached(target)) and all(
        type(a) is type(b) and [layer.name for layer in a.layers] == [layer.name for layer in b.layers]
        for a, b in pairs
    )
    if not pairs or not alike:
        kinds = [[type(a).__name__ for a in attached(model)] for model in (source, target)]
        raise ValueError(
            f"source has {kinds[0]} and target {kinds[1]} attached; both need the same, with the same layers. Make "
            "target by deepcopy or AveragedModel after attaching to source"
        )
    for a, b in pairs:
        new, old = a.state_dict(), b.state_dict()
        if decay is not None and b.has_started():
            for name, value in old.items():
                if value.is_floating_point():
                    new[name] = decay * value + (1 - decay) * new[name].to(value.device)
        b.load_state_dict(new)
