"""Flax NNX layers with packed weights, and those in training for them."""

from .embed import QuantEmbed
from .linear import QuantLinear
from .lora import lora, merge_lora, pissa
from .packed import Packed
from .qat import FakeQuantLinear

__all__ = [
    "FakeQuantLinear",
    "Packed",
    "QuantEmbed",
    "QuantLinear",
    "lora",
    "merge_lora",
    "pissa",
]
