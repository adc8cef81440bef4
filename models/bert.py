"""BERT encoders in Flax NNX, written for reading.

Shapes: B batch, S tokens, H heads, D head size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_anyprec.quantization import Quantization

from .attention import attend, join_heads, split_heads
from .dense import make_linear
from .norms import layer_norm
from .projections import Projections


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes and constants of a BERT.

    Args:
      vocab_size: number of tokens.
      num_layers: number of encoder layers.
      hidden_size: features of the residual stream.
      intermediate_size: features inside the feed-forward block.
      num_heads: attention heads, H; must divide `hidden_size`.
      context_length: positions that have an embedding, and so the most tokens.
      token_types: number of token types (first and second sentence).
      norm_eps: added to the variance in layer norms.
      pooler: whether there is one, a dense layer on the first token's features.
    """

    vocab_size: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    context_length: int
    token_types: int = 2
    norm_eps: float = 1e-12
    pooler: bool = False

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if name != "pooler" and not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads must divide hidden_size = {self.hidden_size}, got {self.num_heads}"
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by the names that weight maps use."""
        return {
            "layers": self.num_layers,
            "vocab": self.vocab_size,
            "positions": self.context_length,
            "types": self.token_types,
            "hidden": self.hidden_size,
            "inner": self.intermediate_size,
        }


class Embeddings(nnx.Module):
    """The normalised sum of the embeddings of tokens, positions and token types."""

    def __init__(self, config: BertConfig, *, dtype: Any, rngs: nnx.Rngs):
        def embed(count: int) -> nnx.Embed:
            return nnx.Embed(count, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs)

        self.tokens = embed(config.vocab_size)
        self.positions = embed(config.context_length)
        self.types = embed(config.token_types)
        self.norm = layer_norm(config.hidden_size, config.norm_eps, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array, types: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        return self.norm(self.tokens(tokens) + self.types(types) + self.positions(positions))


class Attention(nnx.Module):
    """Self-attention in which every token sees all that are no padding."""

    def __init__(self, config: BertConfig, **options: Any):
        width = config.hidden_size
        self.head_dim = width // config.num_heads
        self.qkv = Projections(width, (width,) * 3, **options)
        self.output = make_linear(width, width, **options)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """``x [B, S, width]`` to its update; ``mask bool[B, S]``."""
        q, k, v = (split_heads(each, self.head_dim) for each in self.qkv(x))
        visible = jnp.repeat(mask, q.shape[0] // x.shape[0], axis=0)[:, None, :]
        y = attend(q, k, v, visible)
        return self.output(join_heads(y, x.shape[0]))


class FeedForward(nnx.Module):
    """``down(gelu(up(x)))`` with the exact GELU."""

    def __init__(self, config: BertConfig, **options: Any):
        self.up = make_linear(config.hidden_size, config.intermediate_size, **options)
        self.down = make_linear(config.intermediate_size, config.hidden_size, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(x), approximate=False))


class Layer(nnx.Module):
    """One encoder layer: attention and feed-forward, the residual stream normalised after each."""

    def __init__(self, config: BertConfig, *, dtype: Any, rngs: nnx.Rngs, **options: Any):
        options |= {"use_bias": True, "dtype": dtype, "rngs": rngs}
        self.attention = Attention(config, **options)
        self.attention_norm = layer_norm(
            config.hidden_size, config.norm_eps, dtype=dtype, rngs=rngs
        )
        self.feed_forward = FeedForward(config, **options)
        self.feed_forward_norm = layer_norm(
            config.hidden_size, config.norm_eps, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.attention_norm(x + self.attention(x, mask))
        return self.feed_forward_norm(x + self.feed_forward(x))


class Pooler(nnx.Module):
    """``tanh(W x + b)`` of the first token's features. Always float: it is one small product."""

    def __init__(self, config: BertConfig, *, dtype: Any, rngs: nnx.Rngs):
        width = config.hidden_size
        self.weight = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (width,) * 2, dtype))
        self.bias = nnx.Param(jnp.zeros(width, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x [B, S, width]`` to ``[B, width]``."""
        return jnp.tanh(x[:, 0] @ self.weight[...] + self.bias[...])


class Bert(nnx.Module):
    """An encoder with random weights; `load_huggingface` fills in trained ones.

    Args:
      config: sizes and constants.
      quantization: how linear layers are held, or None for float. Embeddings and the pooler stay
        float.
      dtype: of activations and float weights.
      rngs: for the weights.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        quantization: Quantization | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.embeddings = Embeddings(config, dtype=dtype, rngs=rngs)
        options = {"quantization": quantization, "dtype": dtype, "rngs": rngs}
        self.layers = nnx.List([Layer(config, **options) for _ in range(config.num_layers)])
        if config.pooler:
            self.pooler = Pooler(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, types: jax.Array | None = None
    ) -> jax.Array:
        """Features ``[B, S, width]`` of ``tokens int32[B, S]``.

        Args:
          tokens: at most `context_length` in a row.
          mask: ``bool[B, S]``, False for padding, which no token sees; at least one in each row
            must be True. None for no padding.
          types: ``int32[B, S]``, 1 for tokens of a second sentence. None for all 0.
        """
        if tokens.ndim != 2 or tokens.shape[1] > self.config.context_length:
            raise ValueError(
                f"tokens must be [B, S] with S at most context_length = "
                f"{self.config.context_length}, got shape {tokens.shape}"
            )
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        types = jnp.zeros(tokens.shape, jnp.int32) if types is None else types
        for name, value in (("mask", mask), ("types", types)):
            if value.shape != tokens.shape:
                raise ValueError(
                    f"{name} must have the shape of tokens, {tokens.shape}, got {value.shape}"
                )
        if mask.dtype != bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        x = self.embeddings(tokens, types)
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def pooled(self, x: jax.Array) -> jax.Array:
        """What the pooler makes of features ``[B, S, width]``: ``[B, width]``."""
        if not self.config.pooler:
            raise ValueError("config.pooler is False: this model has no pooler")
        return self.pooler(x)
