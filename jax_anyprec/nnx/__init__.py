"""Flax NNX layers with packed weights, and those in training for them."""

from .embed import QuantEmbed
from .general import QuantEinsum, QuantLinearGeneral
from .linear import QuantLinear
from .lora import lora, merge_lora, pissa
from .packed import Packed
from .qat import FakeQuantLinear

__all__ = [
    "FakeQuantLinear",
    "Packed",
    "QuantEinsum",
    "QuantEmbed",
    "QuantLinear",
    "QuantLinearGeneral",
    "lora",
    "merge_lora",
    "pissa",
]
