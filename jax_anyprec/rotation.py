"""The rotation of a quantized tensor: random signs times a block-diagonal Hadamard matrix.

Both operands of a product are multiplied by the same orthogonal matrix along the contraction,
which leaves the product as it was and spreads outliers over a block (the idea of QuaRot,
arXiv 2404.00456, and QuIP#, arXiv 2402.04396).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from .format import WORD_BITS, namespace, words

MIN_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Static description of a rotation: ``R = diag(signs) @ blockdiag(H, H, ...) / sqrt(block)``.

    Args:
      block: size of one Hadamard block; a power of two, at least 64, that divides K.
      seed: chooses the random signs; any int in 0..2**32 - 1.
    """

    block: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("block", "seed"):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"Rotation.{name} must be an int, got {getattr(self, name)!r}")
        if self.block < MIN_BLOCK or self.block & (self.block - 1):
            raise ValueError(
                f"Rotation.block must be a power of two, {MIN_BLOCK} or more, got {self.block}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"Rotation.seed must be in 0..2**32 - 1, got {self.seed}")

    @classmethod
    def for_size(cls, k: int, seed: int = 0, max_block: int = 1024) -> Rotation:
        """The rotation with the largest block, at most `max_block`, that divides `k`."""
        block = min(k & -k, max_block)
        if block < MIN_BLOCK:
            raise ValueError(f"k must be a multiple of {MIN_BLOCK} to be rotated, got {k}")
        return cls(block, seed)

    def sign_words(self, k: int) -> np.ndarray:
        """Packed signs ``uint32[ceil(k / 32)]``: a set bit is -1.

        Word j is the 32-bit finalizer of MurmurHash3 over ``seed * 0x9E3779B1 + j``.
        """
        h = np.arange(words(k), dtype=np.uint64) + np.uint64(self.seed * 0x9E3779B1)
        mask = np.uint64(0xFFFFFFFF)
        h &= mask
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            h = ((h ^ (h >> np.uint64(shift))) * np.uint64(factor)) & mask
        return h.astype(np.uint32)

    def signs(self, k: int) -> np.ndarray:
        """Signs ``float32[k]``, each -1 or +1."""
        bits = (self.sign_words(k)[:, None] >> np.arange(WORD_BITS, dtype=np.uint32)) & 1
        return (1 - 2 * bits.astype(np.float32)).reshape(-1)[:k]

    def apply(self, x: Any) -> Any:
        """``x @ R`` along the last axis, float32 ``[..., K]``."""
        return hadamard(x.astype(np.float32) * self.signs(x.shape[-1]), self.block)

    def invert(self, x: Any) -> Any:
        """``x @ R.T`` along the last axis, float32 ``[..., K]``."""
        return hadamard(x.astype(np.float32), self.block) * self.signs(x.shape[-1])


def check_rotation(rotation: Any, k: int) -> None:
    """TypeError or ValueError unless `rotation` is None or a `Rotation` that fits `k`."""
    if rotation is None:
        return
    if not isinstance(rotation, Rotation):
        raise TypeError(f"rotation must be a Rotation or None, got {rotation!r}")
    if k % rotation.block:
        raise ValueError(f"rotation block {rotation.block} must divide k, got k = {k}")


def hadamard(x: Any, block: int) -> Any:
    """Orthonormal Walsh-Hadamard transform of each `block` values of the last axis.

    log2(block) rounds of sums and differences at distance 1, 2, 4, ..., then one product with
    ``1 / sqrt(block)``; every implementation keeps this order, so results agree bit for bit.
    """
    return _transform(x, block) if namespace(x) is np else _compiled_transform(x, block)


def _transform(x: Any, block: int) -> Any:
    xp = namespace(x)
    shape = x.shape
    h = 1
    while h < block:
        pairs = x.reshape(*shape[:-1], shape[-1] // (2 * h), 2, h)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = xp.stack([a + b, a - b], axis=-2).reshape(shape)
        h *= 2
    return x * np.float32(1 / math.sqrt(block))


_compiled_transform = jax.jit(_transform, static_argnums=1, inline=True)
"""For eager JAX, which would compile each operation of each round for itself."""
