"""Operands of one device's operations: absent, prepared and rotated ones, for every backend."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import format as fmt
from .rotation import Rotation, hadamard


def absent(dtype: Any = np.float32) -> jax.Array:
    """In the place of an operand that there is not."""
    return jnp.zeros(0, dtype)


def sign_words(rotation: Rotation | None, k: int) -> tuple[jax.Array, int]:
    """What carries a rotation to a device: packed signs and block, or nothing and 0."""
    if rotation is None:
        return absent(np.uint32), 0
    return jnp.asarray(rotation.sign_words(k)), rotation.block


def rotate(x: jax.Array, signs: jax.Array, block: int) -> jax.Array:
    """``float32[..., K]``: `x` with signs flipped and its blocks transformed, if there are any."""
    x = x.astype(jnp.float32)
    if block == 0:
        return x
    bits = (signs[:, None] >> np.arange(fmt.WORD_BITS, dtype=np.uint32)) & np.uint32(1)
    return hadamard(x * (1 - 2 * bits.astype(jnp.float32)).reshape(-1)[: x.shape[-1]], block)


def in_planes(planes: Any, scales: Any, offsets: Any, columns: int | None) -> tuple[Any, Any, Any]:
    """Planes, scales and offsets (or None) of a tensor that may be prepared."""
    if columns is None:
        return planes, scales, offsets
    scales, offsets = (
        None if x is None else fmt.untile_groups(x, columns) for x in (scales, offsets)
    )
    return fmt.untile_planes(planes, columns), scales, offsets


def output_columns(planes: Any, columns: int | None) -> int:
    """N, the columns of the result."""
    return planes.shape[1] if columns is None else columns


def weight_bits(planes: Any, columns: int | None) -> int:
    """The number of planes."""
    return planes.shape[0 if columns is None else 2]


def known_rows(x: Any) -> int | None:
    """M of ``[M, K]``, or None where it is a symbol."""
    return x.shape[0] if isinstance(x.shape[0], int) else None
