"""Modules that attach to a model.

`select` finds its weights; `regularizer` adds a loss of them, `palettizer` and `quantizer` put other weights in their
places while the model runs (`attach`), and `calibrate` makes a quantizer without training.
"""

from .allocation import allocate
from .attach import attached
from .batchnorm import reestimate_batchnorm
from .calibrate import calibrate
from .coefficient import LearnableCoefficient
from .copies import copy_attached
from .export import export
from .palettizer import Palettizer
from .quantizer import Quantizer
from .regularizer import RangeRegularizer
from .select import select_weights
from .sensitivity import sensitivity

__all__ = [
    "LearnableCoefficient",
    "Palettizer",
    "Quantizer",
    "RangeRegularizer",
    "allocate",
    "attached",
    "calibrate",
    "copy_attached",
    "export",
    "reestimate_batchnorm",
    "select_weights",
    "sensitivity",
]
