"""Flax Linen layers with packed weights."""

from .dense import COLLECTION, QuantDense

__all__ = ["COLLECTION", "QuantDense"]
