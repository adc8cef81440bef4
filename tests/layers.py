"""The layer shapes and the precisions that benchmarks time, for tests too."""

from __future__ import annotations

from typing import NamedTuple


class Layer(NamedTuple):
    """A dense layer with weights ``[k, n]``."""

    name: str
    k: int
    n: int

    def __str__(self) -> str:
        return f"{self.name} {self.k} x {self.n}"


class Pair(NamedTuple):
    """Bits of the weights, and of the activations (None: bfloat16)."""

    weights: int
    activations: int | None

    def __str__(self) -> str:
        return f"W{self.weights}A{self.activations or 16}"


SQUARE = Layer("square", 4096, 4096)
FFN = Layer("feed-forward", 4096, 11008)
SMOLLM2 = (
    Layer("SmolLM2 query, key and value", 576, 960),
    Layer("SmolLM2 output", 576, 576),
    Layer("SmolLM2 gate and up", 576, 3072),
    Layer("SmolLM2 down", 1536, 576),
    Layer("SmolLM2 head", 576, 49152),
)
LAYERS = (SQUARE, FFN, *SMOLLM2)

PAIRS = tuple(
    Pair(*bits)
    for bits in ((1, 1), (1, 8), (2, 2), (2, 8), (4, 4), (4, 8), (8, 8), (4, None))
)  # fmt: skip
