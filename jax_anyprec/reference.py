"""Each operation in plain XLA: the definition, and the lowering for every other platform."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from . import format as fmt
from .quantize import absmax_scales
from .rotation import Rotation
from .tensor import dequantize_rows, group_count

INT32_LIMIT = 2**31


def fits_int32(group_size: int, act_bits: int, weight_bits: int) -> bool:
    """Whether the integer product of one group always fits int32."""
    return group_size * fmt.act_centre(act_bits) * fmt.max_level(weight_bits) < INT32_LIMIT


def rotate(x: jax.Array, rotation: Rotation | None) -> jax.Array:
    """``float32[..., K]``, rotated if a rotation is given."""
    return x.astype(jnp.float32) if rotation is None else rotation.apply(x)


def quantize_activations(
    x: jax.Array,
    *,
    bits: int,
    group_size: int,
    rotation: Rotation | None,
    peaks: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``float[..., K]`` to codes ``uint8[..., K]`` and scales ``float32[..., K / group_size]``.

    With `peaks`, ``float32[...]``, the one scale of a token is for that largest magnitude.
    """
    groups = group_count(x.shape[-1], group_size)
    grouped = rotate(x, rotation).reshape(*x.shape[:-1], groups, group_size)
    seen = grouped if peaks is None else peaks[..., None, None]
    scales = absmax_scales(seen, fmt.act_max_level(bits))
    return fmt.act_encode(grouped, scales[..., None], bits).reshape(x.shape), scales


def int_matmul(codes: jax.Array, planes: jax.Array, *, act_bits: int, group_size: int) -> jax.Array:
    """``uint8[M, K]`` and planes to ``sum_k q_x q_w`` of each group, ``int32[M, N, groups]``."""
    return _grouped_dot(codes, planes, act_bits, group_size, jnp.int32)


def matmul(
    x: jax.Array,
    planes: jax.Array,
    scales: jax.Array,
    offsets: jax.Array | None,
    bias: jax.Array | None,
    *,
    act_bits: int | None,
    act_group_size: int,
    group_size: int,
    rotation: Rotation | None,
    out_dtype: Any,
    peaks: jax.Array | None = None,
) -> jax.Array:
    """``x @ W + bias`` in `out_dtype` ``[M, N]``, where W is the tensor of the packed fields."""
    if act_bits is None:
        rows = dequantize_rows(planes, scales, offsets, x.shape[-1])
        y = dot_rows(rotate(x, rotation), rows)
    else:
        codes, act_scales = quantize_activations(
            x, bits=act_bits, group_size=act_group_size, rotation=rotation, peaks=peaks
        )
        y = _scaled_product(codes, act_scales, planes, scales, offsets, act_bits, group_size)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(out_dtype)


def dot_rows(x: jax.Array, rows: jax.Array, out_sharding: Any = None) -> jax.Array:
    """``x[..., K] @ rows[N, K].T`` in full float32."""
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, rows, contract, precision="highest", out_sharding=out_sharding)


def _scaled_product(
    codes: jax.Array,
    act_scales: jax.Array,
    planes: jax.Array,
    scales: jax.Array,
    offsets: jax.Array | None,
    act_bits: int,
    group_size: int,
) -> jax.Array:
    m = codes.shape[0]
    groups = scales.shape[-1]
    exact = fits_int32(group_size, act_bits, planes.shape[-3])
    dots = _grouped_dot(codes, planes, act_bits, group_size, jnp.int32 if exact else jnp.float32)
    scales = scales.astype(jnp.float32)
    if offsets is None:
        by_group = scales * dots.astype(jnp.float32)
    else:
        # w = 2 s u + offset = s q + (offset + s L), so the centre of the grid meets the sum of q_x.
        q = fmt.act_codes_to_ints(codes, act_bits).reshape(m, groups, group_size)
        sums = q.sum(-1, dtype=jnp.int32).astype(jnp.float32)
        centre = offsets.astype(jnp.float32) + scales * fmt.max_level(planes.shape[-3])
        by_group = scales * dots.astype(jnp.float32) + centre * sums[:, None, :]
    return (act_scales[:, None, :] * by_group).sum(-1)


def _grouped_dot(
    codes: jax.Array, planes: jax.Array, act_bits: int, group_size: int, dtype: Any
) -> jax.Array:
    m, k = codes.shape
    n, groups = planes.shape[-2], group_count(k, group_size)
    q_x = fmt.act_codes_to_ints(codes, act_bits).astype(dtype).reshape(m, groups, group_size)
    u_w = fmt.unpack_planes(planes, k)
    q_w = fmt.codes_to_ints(u_w, planes.shape[-3]).astype(dtype).reshape(n, groups, group_size)
    return jnp.einsum("mgk,ngk->mng", q_x, q_w, precision="highest", preferred_element_type=dtype)
