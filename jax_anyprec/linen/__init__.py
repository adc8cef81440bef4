"""Flax Linen layers with packed weights, those in training for them, and converted models."""

from .calibrate import calibrate
from .calls import EinsumCall
from .dense import COLLECTION, QuantDense
from .lora import LORA, LoRADense
from .qat import FakeQuantDense
from .quantized import Quantized

__all__ = [
    "COLLECTION",
    "LORA",
    "EinsumCall",
    "FakeQuantDense",
    "LoRADense",
    "QuantDense",
    "Quantized",
    "calibrate",
]
