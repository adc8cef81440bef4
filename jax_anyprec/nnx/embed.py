"""`QuantEmbed`: `nnx.Embed` with packed weights."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from .. import ops
from ..format import TILE, fields_to_planes
from ..tensor import QuantizedTensor, check_tensor, dequantize_rows
from .packed import Packed


class QuantEmbed(nnx.Module):
    """`nnx.Embed` with a packed table, which may also serve as the output head.

    Args:
      embedding: `QuantizedTensor` of shape ``(features, num_embeddings)``.
      activations, act_scales, implementation: for `attend`, as for `QuantLinear`.
      dtype: dtype of the embeddings and of the scores (default float32).
    """

    def __init__(
        self,
        embedding: QuantizedTensor,
        *,
        activations: int | None = None,
        act_scales: Literal["group", "token"] = "group",
        implementation: str | None = None,
        dtype: Dtype | None = None,
    ):
        check_tensor(embedding, "embedding")
        self.features, self.num_embeddings = embedding.shape
        self.embedding = Packed(embedding)
        self.activations = activations
        self.act_scales = act_scales
        self.implementation = implementation
        self.dtype = dtype

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Token ids ``int[...]`` to embeddings ``[..., features]``; NaN for ids out of range."""
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(f"inputs must be integers, got {inputs.dtype}")
        w = self.embedding.get_value()
        rows = dequantize_rows(*_rows_of(w, inputs.reshape(-1)), w.k)
        if w.rotation is not None:
            rows = w.rotation.invert(rows)
        return rows.reshape(*inputs.shape, self.features).astype(self.dtype or jnp.float32)

    def attend(self, query: jax.Array) -> jax.Array:
        """Scores of ``[..., features]`` against every embedding, ``[..., num_embeddings]``."""
        dtype = self.dtype or jnp.promote_types(query.dtype, jnp.float32)
        return ops.matmul(
            query.astype(dtype),
            self.embedding.get_value(),
            act_bits=self.activations,
            act_scales=self.act_scales,
            implementation=self.implementation,
        )

    @classmethod
    def from_tensor(cls, embedding: QuantizedTensor, **options: Any) -> QuantEmbed:
        """A layer around a packed table ``(features, num_embeddings)``."""
        return cls(embedding, **options)


def _rows_of(w: QuantizedTensor, ids: jax.Array) -> tuple[Any, Any, Any]:
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
