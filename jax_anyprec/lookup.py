"""Embeddings of ids, from a packed table."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .format import TILE, fields_to_planes
from .tensor import QuantizedTensor, dequantize_rows


def look_up(w: QuantizedTensor, ids: jax.Array) -> jax.Array:
    """Columns ``float32[..., K]`` of ``w (K, N)`` for ``ids int[...]``; NaN for ids out of range.

    If there is one column only, any id finds it, as in Flax's embeddings.
    """
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"inputs must be integers, got {ids.dtype}")
    if w.shape[-1] == 1:
        ids = jnp.zeros_like(ids)
    rows = dequantize_rows(*rows_of(w, ids.reshape(-1)), w.k)
    if w.rotation is not None:
        rows = w.rotation.invert(rows)
    return rows.reshape(*ids.shape, w.k)


def rows_of(w: QuantizedTensor, ids: jax.Array) -> tuple[Any, Any, Any]:
    """Planes, scales and offsets of the columns `ids` of `w`; scales are NaN out of range."""
    if not w.prepared:
        planes = jnp.take(w.planes, ids, axis=1)
        scales, offsets = (
            None if x is None else jnp.take(x, ids, axis=0, fill_value=jnp.nan)
            for x in (w.scales, w.offsets)
        )
        return planes, scales, offsets
    n = w.shape[1]
    ids = jnp.where(ids < 0, ids + n, ids)
    known = (ids >= 0) & (ids < n)  # the last tile may be padded
    tile, lane = jnp.where(known, ids // TILE, w.planes.shape[0]), ids % TILE
    fields = jnp.asarray(w.planes).at[tile, :, :, lane].get(mode="fill", fill_value=0)
    scales, offsets = (
        None if x is None else jnp.asarray(x).at[tile, :, lane].get(mode="fill", fill_value=jnp.nan)
        for x in (w.scales, w.offsets)
    )
    return fields_to_planes(fields), scales, offsets
