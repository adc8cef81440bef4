"""Quantization-aware training: weights rounded to the grid in float, with derivatives to learn by.

The value is that of the packed tensor. The derivative is the straight-through estimator with a
learned scale, LSQ (arXiv 1902.08153), on the odd integers of the format. With ``r = w / s`` and the
largest level ``L = 2**bits - 1``, the rounded weight ``s * q`` has

    d/dw = 1 where |r| <= L, else 0
    d/ds = (q - r where |r| <= L, else L * sign(r)) / sqrt(group_size * L)

whose last factor, from the paper, keeps steps of scales and weights in proportion. Second
derivatives of the rounding count as 0. docs/training.md says more.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from . import format as fmt
from . import ops, reference
from .quantize import check_floats, quantize
from .rotation import Rotation, check_rotation
from .tensor import check_group_size


def fake_quant(weights: Any, scales: Any, bits: int, *, rotation: Rotation | None = None) -> Any:
    """`weights` rounded to `bits` bits and back to float: exactly what the packed tensor holds.

    The value is that of ``quantize(weights, bits, scales=scales, ...).dequantize(weights.dtype)``.
    Differentiable with respect to both arguments, in both modes, as this module's docstring says.

    Args:
      weights: ``float[..., K, N]``, contraction first; float32, bfloat16 or float16.
      scales: ``float[..., N, groups]``, not negative (`magnitude` makes them so). Start from
        ``quantize(weights, bits, ...).scales``, which are those of the least squared error.
      bits: 1 to 8.
      rotation: a `Rotation` along K, in which the rounding happens, or None.

    Returns:
      ``[..., K, N]`` in the dtype of `weights`.
    """
    bits = fmt.check_bits(bits)
    weights, scales = _check_weights(weights, scales, rotation)
    rows = _rounded_rows(weights, scales, bits, rotation)
    if rotation is not None:
        rows = rotation.invert(rows)
    return jnp.swapaxes(rows, -1, -2).astype(weights.dtype)


def fake_quant_matmul(
    x: Any,
    weights: Any,
    scales: Any,
    bits: int,
    *,
    rotation: Rotation | None = None,
    bias: Any = None,
    act_bits: int | None = None,
    act_scales: Literal["group", "token"] = "group",
    out_dtype: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    """``x @ weights + bias`` by `matmul`, on weights that are quantized on the fly.

    The value is that of the packed layer, bit for bit, because the same product makes it. The
    derivative is that of ``x @ fake_quant(weights, scales) + bias`` in float32, straight through
    the rounding of the activations.

    Args:
      x, bias, act_bits, act_scales, out_dtype, implementation: as for `matmul`.
      weights: ``float[K, N]``.
      scales, bits, rotation: as for `fake_quant`.
    """
    bits = fmt.check_bits(bits)
    weights, scales = _check_weights(weights, scales, rotation)
    x = check_floats(x, "x", min_ndim=1)
    group_size = weights.shape[-2] // scales.shape[-1]
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)

    @jax.custom_jvp
    def product(x: Any, weights: Any, scales: Any, bias: Any) -> jax.Array:
        w = quantize(weights, bits, group_size=group_size, scales=scales, rotation=rotation)
        return ops.matmul(
            x, w, bias=bias, act_bits=act_bits, act_scales=act_scales, out_dtype=out_dtype,
            implementation=implementation,
        )  # fmt: skip

    def float_product(x: Any, weights: Any, scales: Any, bias: Any) -> jax.Array:
        act_group_size = group_size if act_scales == "group" else weights.shape[0]
        seen = _rounded_activations(x, act_bits, act_group_size, rotation, implementation)
        rows = _rounded_rows(weights, scales, bits, rotation)
        y = jnp.einsum("...k,nk->...n", seen, rows, precision="highest")
        return (y if bias is None else y + bias.astype(jnp.float32)).astype(out_dtype)

    @product.defjvp
    def product_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        return product(*primals), jax.jvp(float_product, primals, tangents)[1]

    return product(x, weights, scales, bias)


def magnitude(scales: jax.Array) -> jax.Array:
    """``|scales|``: scales as a layer uses its learned parameter.

    The grid is symmetric, so the sign of a scale means nothing, and an optimizer that steps over 0
    comes out on the other side. Unlike that of `jnp.abs` the derivative at 0 is 1: a scale of 0,
    which a group of zeros starts with, can be learned away.
    """
    return jnp.where(scales < 0, -scales, scales)


def _check_weights(weights: Any, scales: Any, rotation: Any) -> tuple[jax.Array, jax.Array]:
    weights = check_floats(weights, "weights", min_ndim=2)
    scales = check_floats(scales, "scales", min_ndim=2)
    *leading, k, n = weights.shape
    groups = scales.shape[-1]
    if scales.shape[:-1] != (*leading, n) or groups == 0 or k % groups:
        raise ValueError(
            f"scales must have shape {(*leading, n)} and an axis of groups, a number that divides "
            f"k = {k}, got {scales.shape}"
        )
    check_group_size(k // groups, k)
    check_rotation(rotation, k)
    return weights, scales


def _rounded_rows(
    weights: jax.Array, scales: jax.Array, bits: int, rotation: Rotation | None
) -> jax.Array:
    """Rows ``float32[..., N, K]`` of the rounded weights, still rotated."""
    rows = reference.rotate(jnp.swapaxes(weights, -1, -2), rotation)
    grouped = rows.reshape(*scales.shape, rows.shape[-1] // scales.shape[-1])
    return _round(grouped, scales.astype(jnp.float32)[..., None], bits).reshape(rows.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _round(grouped: jax.Array, scales: jax.Array, bits: int) -> jax.Array:
    """Values ``float32[..., groups, group_size]`` on the grids of scales ``[..., groups, 1]``."""
    q = fmt.codes_to_ints(fmt.encode(grouped, scales, bits), bits)
    return scales * q.astype(jnp.float32)


@_round.defjvp
def _round_jvp(bits: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (grouped, scales), (grouped_dot, scales_dot) = primals, tangents
    largest = fmt.max_level(bits)
    q = fmt.codes_to_ints(fmt.encode(grouped, scales, bits), bits).astype(jnp.float32)
    clipped = jnp.abs(grouped) > largest * scales
    ratio = grouped / jnp.where(scales > 0, scales, 1)
    slope = jnp.where(clipped, largest * jnp.sign(grouped), q - ratio)
    slope = jax.lax.stop_gradient(slope) / math.sqrt(max(grouped.shape[-1], 1) * largest)
    # The value is this function's again, so that second derivatives see it.
    value = _round(grouped, scales, bits)
    return value, jnp.where(clipped, 0, grouped_dot) + slope * scales_dot


def _rounded_activations(
    x: jax.Array,
    bits: int | None,
    group_size: int,
    rotation: Rotation | None,
    implementation: str | None,
) -> jax.Array:
    """``float32[..., K]`` as the product sees them: rotated and rounded, straight through that."""
    rotated = reference.rotate(x, rotation)
    if bits is None:
        return rotated
    codes, scales = ops.quantize_activations(
        jax.lax.stop_gradient(x), bits, group_size=group_size, rotation=rotation,
        implementation=implementation,
    )  # fmt: skip
    q = fmt.act_codes_to_ints(codes, bits).astype(jnp.float32)
    values = q.reshape(*scales.shape, -1 if q.size else group_size) * scales[..., None]
    return values.reshape(x.shape) + (rotated - jax.lax.stop_gradient(rotated))
