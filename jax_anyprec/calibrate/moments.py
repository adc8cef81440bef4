"""Second moments of a layer's inputs, in the basis and on the grid that its products have."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import format as fmt
from ..quantization import Quantization
from ..reference import quantize_activations
from ..rotation import Rotation


class Moments(NamedTuple):
    """Sums over rows: x, inputs of a layer in the quantized model, and f, those in the float model.

    Attributes:
      own: ``float32[K, K]`` of ``x' x``.
      cross: ``float32[K, K]`` of ``x' f``.
      reference: ``float32[K, K]`` of ``f' f``.
      own_sum, reference_sum: ``float32[K]`` of x and of f.
      rows: ``float32[]``, how many.
    """

    own: jax.Array
    cross: jax.Array
    reference: jax.Array
    own_sum: jax.Array
    reference_sum: jax.Array
    rows: jax.Array

    @classmethod
    def zeros(cls, k: int) -> Moments:
        square, vector = jnp.zeros((k, k)), jnp.zeros(k)
        # Not one array three times: they are donated.
        return cls(square, square + 0, square + 0, vector, vector + 0, jnp.zeros(()))


def rotation_of(quantization: Quantization, k: int) -> Rotation | None:
    """The rotation of a packed weight of K rows."""
    return Rotation.for_size(k) if quantization.rotate else None


@functools.partial(jax.jit, static_argnames="quantization", donate_argnums=0)
def add(moments: Moments, x: jax.Array, f: jax.Array, *, quantization: Quantization) -> Moments:
    """Moments with more rows: ``x, f float[rows, K]`` of the quantized and of the float model.

    Both are rotated as the products' are, and x is rounded to the grid of the activations, so that
    the weights can make up for what that loses.
    """
    rotation = rotation_of(quantization, x.shape[-1])
    x, f = x.astype(jnp.float32), f.astype(jnp.float32)
    if rotation is not None:
        x, f = rotation.apply(x), rotation.apply(f)
    if quantization.activations is not None:
        x = _rounded(x, quantization)
    return Moments(
        moments.own + _product(x, x),
        moments.cross + _product(x, f),
        moments.reference + _product(f, f),
        moments.own_sum + x.sum(0),
        moments.reference_sum + f.sum(0),
        moments.rows + x.shape[0],
    )


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a.T, b, precision="highest")


def _rounded(x: jax.Array, quantization: Quantization) -> jax.Array:
    """Activations ``float32[rows, K]`` as products take them."""
    assert quantization.activations is not None
    rows, k = x.shape
    per_token = quantization.act_scales == "token" or quantization.group_size is None
    group_size = k if per_token else quantization.group_size
    codes, scales = quantize_activations(
        x, bits=quantization.activations, group_size=group_size, rotation=None
    )
    q = fmt.act_codes_to_ints(codes, quantization.activations).astype(jnp.float32)
    return (q.reshape(rows, -1, group_size) * scales[..., None]).reshape(rows, k)
