"""Second moments of a layer's inputs, in the basis that its products have."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..rotation import Rotation

LARGEST = 4.0
"""The most that a row's sum of squares counts, in medians."""


class Moments(NamedTuple):
    """Sums over rows: x, inputs of a layer in the quantized model, and f, those in the float model.

    Attributes:
      own: ``float32[K, K]`` of ``x' x``.
      cross: ``float32[K, K]`` of ``x' f``.
      own_sum, reference_sum: ``float32[K]`` of x and of f.
      rows: ``float32[]``, how many.
      half_own, half_cross: of half of the rows alone.
    """

    own: jax.Array
    cross: jax.Array
    own_sum: jax.Array
    reference_sum: jax.Array
    rows: jax.Array
    half_own: jax.Array
    half_cross: jax.Array

    @classmethod
    def zeros(cls, k: int) -> Moments:

        def zeros(*shape: int) -> jax.Array:
            return jnp.zeros(shape)  # not one array twice: they are donated

        sums = zeros(k), zeros(k), zeros()
        return cls(zeros(k, k), zeros(k, k), *sums, zeros(k, k), zeros(k, k))


@functools.partial(jax.jit, static_argnames="rotate", donate_argnums=0)
def add(moments: Moments, x: jax.Array, f: jax.Array, *, rotate: bool) -> Moments:
    """Moments with more rows: ``x, f float[rows, K]`` of the quantized and of the float model.

    With `rotate` both are rotated as the products' are. What rounding x would lose is not among
    them: weights that make up for it are smaller, and models get worse.
    """
    x, f = x.astype(jnp.float32), f.astype(jnp.float32)
    if rotate:
        rotation = Rotation.for_size(x.shape[-1])
        x, f = rotation.apply(x), rotation.apply(f)
    x, f = _weighted(x, f)
    # Neighbours are alike: the halves are the first rows and the last.
    half = x.shape[0] // 2
    half_own, half_cross = product(x[:half], x[:half]), product(x[:half], f[:half])
    return Moments(
        moments.own + half_own + product(x[half:], x[half:]),
        moments.cross + half_cross + product(x[half:], f[half:]),
        moments.own_sum + x.sum(0),
        moments.reference_sum + f.sum(0),
        moments.rows + x.shape[0],
        moments.half_own + half_own,
        moments.half_cross + half_cross,
    )


def moments_of(batches: Iterable[tuple[Any, Any]], rotate: bool) -> Moments:
    """Of all rows of batches ``float[rows, K]``, x and f as for `add`; there must be one."""
    moments: Moments | None = None
    for x, f in batches:
        moments = Moments.zeros(x.shape[-1]) if moments is None else moments
        moments = add(moments, x, f, rotate=rotate)
    assert moments is not None
    return moments


def _weighted(x: jax.Array, f: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows whose squares sum to over LARGEST times the median's, shortened to that.

    A transformer has a few tokens with inputs a thousand times as long as others, which would
    decide all, and mean little for what it predicts.
    """
    squares = (f * f).sum(-1, keepdims=True)
    most = LARGEST * jnp.median(squares)
    factor = jnp.sqrt(jnp.where(squares > most, most / squares, 1.0))
    return x * factor, f * factor


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a' b`` of ``float32[rows, K]`` each, summed over rows in full float32."""
    return jnp.matmul(a.T, b, precision="highest")
