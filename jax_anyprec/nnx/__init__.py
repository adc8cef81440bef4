"""Flax NNX layers with packed weights."""

from .embed import QuantEmbed
from .linear import QuantLinear
from .packed import Packed

__all__ = ["Packed", "QuantEmbed", "QuantLinear"]
