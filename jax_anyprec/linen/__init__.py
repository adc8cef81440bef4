"""Flax Linen layers with packed weights, and those in training for them."""

from .dense import COLLECTION, QuantDense
from .lora import LORA, LoRADense
from .qat import FakeQuantDense

__all__ = ["COLLECTION", "LORA", "FakeQuantDense", "LoRADense", "QuantDense"]
