"""The shapes that tests and benchmarks share: where words, tiles, segments and row blocks end."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """A product ``[m, k] @ [k, n]`` with `group` values along K to a scale (0 where K is 0)."""

    m: int
    n: int
    k: int
    group: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}g{self.group}"


SIZES = (0, 1, 2, 31, 32, 33, 63, 65, 127, 257, 1000)
"""Sizes next to the edges of words (32), tiles (4, 8, 16), segments (256) and row blocks (128)."""

# Each of SIZES stands at least once in each place, next to sizes that end elsewhere.
PER_CHANNEL = tuple(
    Shape(m, n, k, k)
    for m, n, k in (
        (0, 33, 65), (3, 0, 65), (2, 33, 0), (0, 0, 0), (1, 1, 1), (2, 2, 2), (31, 31, 31),
        (32, 32, 32), (33, 33, 33), (63, 63, 63), (65, 65, 65), (127, 127, 127), (1, 1000, 257),
        (257, 2, 1000), (2, 257, 63), (1000, 1, 127), (1, 65, 1000), (9, 17, 257),
    )
)  # fmt: skip

GROUPED = tuple(
    Shape(m, n, k, group)
    for m, n, k, group in (
        (1, 33, 32, 32), (2, 31, 64, 32), (33, 16, 96, 32), (7, 65, 288, 32), (5, 17, 1024, 32),
        (1, 63, 64, 64), (31, 2, 192, 64), (130, 9, 576, 64), (3, 33, 128, 128), (4, 15, 384, 128),
        (2, 19, 640, 320), (1, 7, 1056, 352), (0, 3, 64, 32), (3, 0, 64, 32),
    )
)  # fmt: skip

SHAPES = PER_CHANNEL + GROUPED

FEW = (
    Shape(2, 33, 0, 0),
    Shape(1, 1, 1, 1),
    Shape(9, 17, 257, 257),
    Shape(5, 33, 192, 64),
    Shape(3, 2, 1056, 352),
)
"""Enough to reach every branch of a product once; for sweeps whose compile time counts."""
