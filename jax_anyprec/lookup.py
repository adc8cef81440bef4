"""Single columns of a packed matrix, as embeddings look them up."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .format import TILE, fields_to_planes
from .tensor import QuantizedTensor


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
