"""Modules that attach to a model."""
from .palettizer import Palettizer
from .regularizer import RangeRegularizer
from .select import select_weights

__all__ = ["Palettizer", "RangeRegularizer", "select_weights"]
