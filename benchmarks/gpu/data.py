"""Random operands, cheaply: pieces of one pool of random numbers for each dtype, in NumPy.

Drawing them on the device would compile a program for each shape, which takes longer than to time
it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

POOL = 2**22 + 1
"""Odd, so that rows of a matrix which is larger are not alike."""
STRIDE = 104_729
"""Between the beginnings of pieces, a prime."""


def draw(seed: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Floats are normal, integers uniform (int8 from -127 on)."""
    pool = _pool(jnp.dtype(dtype).name)
    size = math.prod(shape)
    start = seed * STRIDE % pool.size
    if start + size > pool.size:
        pool = np.tile(pool, -(-(start + size) // pool.size))
    return pool[start : start + size].reshape(shape)


@functools.cache
def _pool(dtype: str) -> np.ndarray:
    random = np.random.default_rng(0)
    if dtype == "uint32":
        return random.integers(2**32, size=POOL, dtype=np.uint32)
    if dtype == "int8":
        return random.integers(-127, 128, POOL, np.int8)
    return random.standard_normal(POOL, np.float32).astype(jnp.dtype(dtype))
