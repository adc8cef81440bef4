"""Second moments of a layer's inputs, in the basis and on the grid that its products have."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import format as fmt
from ..quantization import Quantization
from ..reference import quantize_activations
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
    """

    own: jax.Array
    cross: jax.Array
    own_sum: jax.Array
    reference_sum: jax.Array
    rows: jax.Array

    @classmethod
    def zeros(cls, k: int) -> Moments:
        square, vector = jnp.zeros((k, k)), jnp.zeros(k)
        # Not one array twice: they are donated.
        return cls(square, square + 0, vector, vector + 0, jnp.zeros(()))


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a quantization does to inputs before they are multiplied.

    Args:
      rotate: whether they are rotated.
      bits: that they are rounded to, or None.
      group_size: values that share a scale; None for one a row.
    """

    rotate: bool
    bits: int | None
    group_size: int | None

    @classmethod
    def of(cls, quantization: Quantization) -> Inputs:
        per_token = quantization.act_scales == "token"
        group_size = None if per_token else quantization.group_size
        return cls(quantization.rotate, quantization.activations, group_size)


@functools.partial(jax.jit, static_argnames="inputs", donate_argnums=0)
def add(moments: Moments, x: jax.Array, f: jax.Array, *, inputs: Inputs) -> Moments:
    """Moments with more rows: ``x, f float[rows, K]`` of the quantized and of the float model.

    Both are rotated as the products' are, and x is rounded to the grid of the activations, so that
    the weights can make up for what that loses.
    """
    x, f = x.astype(jnp.float32), f.astype(jnp.float32)
    if inputs.rotate:
        rotation = Rotation.for_size(x.shape[-1])
        x, f = rotation.apply(x), rotation.apply(f)
    if inputs.bits is not None:
        x = _rounded(x, inputs.bits, inputs.group_size or x.shape[-1])
    x, f = _weighted(x, f)
    return Moments(
        moments.own + product(x, x),
        moments.cross + product(x, f),
        moments.own_sum + x.sum(0),
        moments.reference_sum + f.sum(0),
        moments.rows + x.shape[0],
    )


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


def _rounded(x: jax.Array, bits: int, group_size: int) -> jax.Array:
    """Activations ``float32[rows, K]`` as products take them."""
    codes, scales = quantize_activations(x, bits=bits, group_size=group_size, rotation=None)
    q = fmt.act_codes_to_ints(codes, bits).astype(jnp.float32)
    return (q.reshape(*scales.shape, group_size) * scales[..., None]).reshape(x.shape)
