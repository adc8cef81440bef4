"""The layers, rows and precisions that are timed on a GPU."""

from __future__ import annotations

from typing import NamedTuple

from tests.layers import Layer, Pair

SQUARES = tuple(Layer("square", size, size) for size in (1024, 2048, 4096, 8192, 16384))
MODELS = (
    Layer("Llama-2-7B query, key and value", 4096, 12288),
    Layer("Llama-2-7B gate", 4096, 11008),
    Layer("Llama-2-7B gate and up", 4096, 22016),
    Layer("Llama-2-7B down", 11008, 4096),
    Layer("Llama-3-8B query, key and value", 4096, 6144),
    Layer("Llama-3-8B gate and up", 4096, 28672),
    Layer("Llama-3-8B down", 14336, 4096),
    Layer("Llama-3-70B query, key and value", 8192, 10240),
    Layer("Llama-3-70B gate and up", 8192, 57344),
    Layer("Llama-3-70B down", 28672, 8192),
)
"""Attention's outputs are squares."""


class Precision(NamedTuple):
    """Bits of both operands, and how many weights share a scale (None: a whole column).

    Activations have a scale for each token, with groups one for each token and group.
    """

    pair: Pair
    group_size: int | None = None

    def __str__(self) -> str:
        return f"{self.pair}" + (f" g{self.group_size}" if self.group_size else "")


def precisions(*names: str) -> tuple[Precision, ...]:
    """Of names such as "W4A8" or "W4A16 g128", where 16 bits are bfloat16."""
    found = []
    for name in names:
        bits, _, group = name.partition(" g")
        weights, activations = (int(part) for part in bits[1:].split("A"))
        pair = Pair(weights, None if activations == 16 else activations)
        found.append(Precision(pair, int(group) if group else None))
    return tuple(found)


PRECISIONS = precisions(
    *("W1A1", "W1A2", "W2A2", "W2A4", "W3A3", "W4A4", "W2A8", "W4A8", "W8A8"),
    *("W1A16", "W2A16", "W3A16", "W4A16", "W8A16", "W4A8 g128", "W4A16 g128"),
)


class Selection(NamedTuple):
    """What one run times: each precision for each number of rows of each layer."""

    layers: tuple[Layer, ...]
    rows: tuple[int, ...]
    precisions: tuple[Precision, ...]


FULL = Selection((*SQUARES, *MODELS), (1, 4, 16, 64, 256, 1024, 4096, 8192), PRECISIONS)
QUICK = Selection(
    (SQUARES[2], MODELS[1], SQUARES[3], MODELS[6]),
    (1, 16, 256, 1024, 4096),
    precisions("W1A1", "W1A2", "W2A2", "W4A4", "W4A8", "W8A8", "W2A16", "W4A16", "W4A8 g128"),
)
SMOKE = Selection(
    (Layer("small", 256, 192),),
    (33,),
    precisions("W1A1", "W4A8", "W3A16", "W4A8 g128"),
)
SELECTIONS = {"full": FULL, "quick": QUICK, "smoke": SMOKE}
