"""Modules that attach to a model."""

from .calibrate import calibrate
from .coefficient import LearnableCoefficient
from .palettizer import Palettizer
from .quantizer import Quantizer
from .regularizer import RangeRegularizer
from .select import select_weights

__all__ = ["LearnableCoefficient", "Palettizer", "Quantizer", "RangeRegularizer", "calibrate", "select_weights"]
