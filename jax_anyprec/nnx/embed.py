"""`QuantEmbed`: `nnx.Embed` with packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, PromoteDtypeFn

from .. import ops
from ..lookup import look_up
from ..quantization import Quantization
from ..tensor import QuantizedTensor, check_tensor
from .float_layers import check_float_layer
from .linear import param_dtype, reshard
from .metadata import NOTHING, folded, metadata_of


class QuantEmbed(nnx.Module):
    """`nnx.Embed` with a packed table, which may also serve as the output head.

    Args:
      embedding: `QuantizedTensor` of shape ``(features, num_embeddings)``, with leading axes in a
        layer that is mapped or scanned over.
      activations, act_scales, implementation: for `attend`, as for `QuantLinear`.
      dtype: dtype of the embeddings and of the scores (default: `param_dtype`).
      param_dtype: dtype of the float table that this stands for.
      promote_dtype, embedding_metadata: as for `nnx.Embed`.
    """

    def __init__(
        self,
        embedding: QuantizedTensor,
        *,
        activations: int | None = None,
        act_scales: Literal["group", "token"] = "group",
        implementation: str | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        embedding_metadata: Mapping[str, Any] = NOTHING,
    ):
        check_tensor(embedding, "embedding")
        self.features, self.num_embeddings = embedding.shape[-2:]
        shape = (self.num_embeddings, self.features)
        self.embedding = folded(embedding, embedding_metadata, shape, rank=2)
        self.activations = activations
        self.act_scales = act_scales
        self.implementation = implementation
        self.dtype = dtype or param_dtype
        self.param_dtype = param_dtype
        self.promote_dtype = promote_dtype

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Token ids ``int[...]`` to embeddings ``[..., features]``; NaN for ids out of range."""
        rows = look_up(self.embedding.get_value(), inputs)
        (rows,) = self.promote_dtype((rows,), dtype=self.dtype, inexact=False)
        return reshard(rows, out_sharding)

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Scores of ``[..., features]`` against every embedding, ``[..., num_embeddings]``."""
        like_table = jnp.zeros((), self.param_dtype)  # takes the float table's part in promotion
        query, _ = self.promote_dtype((query, like_table), dtype=self.dtype)
        scores = ops.matmul(
            query,
            self.embedding.get_value(),
            act_bits=self.activations,
            act_scales=self.act_scales,
            implementation=self.implementation,
        )
        return reshard(scores, out_sharding)

    @classmethod
    def from_tensor(cls, embedding: QuantizedTensor, **options: Any) -> QuantEmbed:
        """A layer around a packed table ``(features, num_embeddings)``."""
        return cls(embedding, **options)

    @classmethod
    def from_embed(
        cls, embed: nnx.Embed, quantization: Quantization, *, implementation: str | None = None
    ) -> QuantEmbed:
        """`embed` with its table quantized; dtypes, promotion and metadata stay."""
        check_float_layer(embed, nnx.Embed, "embed")
        return embed_like(
            embed,
            quantization.pack(embed.embedding.get_value().T),
            implementation=implementation,
            **quantization.layer_options,
        )


def embed_like(embed: nnx.Embed, table: QuantizedTensor, **options: Any) -> QuantEmbed:
    """A `QuantEmbed` of a packed table ``(..., features, num_embeddings)``, and else as `embed`."""
    rank = len(table.shape)
    axes = [[axis] for axis in (*range(rank - 2), rank - 1, rank - 2)]
    return QuantEmbed(
        table,
        dtype=embed.dtype,
        param_dtype=param_dtype(embed, embed.embedding),
        promote_dtype=embed.promote_dtype,
        embedding_metadata=metadata_of(embed.embedding, axes),
        **options,
    )
