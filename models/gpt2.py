"""GPT-2 in Flax NNX, written for reading; a decoder for `generate`, as `Llama` is.

Shapes: B batch, S tokens of this call, T positions of the cache (T = S without one), H heads, D
head size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_anyprec.quantization import Quantization

from .attention import attend_causally, extend, join_heads, split_heads
from .dense import make_linear
from .llama import Cache, positions_after, run_layers
from .norms import layer_norm


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Sizes and constants of a GPT-2.

    Args:
      vocab_size: number of tokens.
      num_layers: number of decoder layers.
      hidden_size: features of the residual stream.
      intermediate_size: features inside the feed-forward block.
      num_heads: attention heads, H; must divide `hidden_size`.
      context_length: positions that have an embedding, and so the most tokens.
      norm_eps: added to the variance in layer norms.
    """

    vocab_size: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    context_length: int
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads must divide hidden_size = {self.hidden_size}, got {self.num_heads}"
            )

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values: all have their own."""
        return self.num_heads

    @property
    def head_dim(self) -> int:
        """Features of a head, D."""
        return self.hidden_size // self.num_heads

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by the names that weight maps use."""
        return {
            "layers": self.num_layers,
            "vocab": self.vocab_size,
            "positions": self.context_length,
            "hidden": self.hidden_size,
            "qkv": 3 * self.hidden_size,
            "inner": self.intermediate_size,
        }


class Attention(nnx.Module):
    """Causal self-attention; queries, keys and values are one projection, as checkpoints have."""

    def __init__(self, config: GPT2Config, **options: Any):
        self.head_dim = config.head_dim
        self.qkv = make_linear(config.hidden_size, 3 * config.hidden_size, **options)
        self.output = make_linear(config.hidden_size, config.hidden_size, **options)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        past: tuple[jax.Array, jax.Array] | None,
        reach: int | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """``x [B, S, width]`` at ``positions int32[S]`` to its update and the keys and values."""
        q, k, v = (split_heads(each, self.head_dim) for each in jnp.split(self.qkv(x), 3, axis=-1))
        k, v = extend(past, k, v, positions)
        y = attend_causally(q, k[:, :reach], v[:, :reach], positions)
        return self.output(join_heads(y, x.shape[0])), (k, v)


class FeedForward(nnx.Module):
    """``down(gelu(up(x)))`` with the tanh approximation of GELU."""

    def __init__(self, config: GPT2Config, **options: Any):
        self.up = make_linear(config.hidden_size, config.intermediate_size, **options)
        self.down = make_linear(config.intermediate_size, config.hidden_size, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(x), approximate=True))


class Layer(nnx.Module):
    """One decoder layer: attention and feed-forward, each on a normalised residual stream."""

    def __init__(self, config: GPT2Config, *, dtype: Any, rngs: nnx.Rngs, **options: Any):
        options |= {"use_bias": True, "dtype": dtype, "rngs": rngs}
        self.attention_norm = layer_norm(
            config.hidden_size, config.norm_eps, dtype=dtype, rngs=rngs
        )
        self.attention = Attention(config, **options)
        self.feed_forward_norm = layer_norm(
            config.hidden_size, config.norm_eps, dtype=dtype, rngs=rngs
        )
        self.feed_forward = FeedForward(config, **options)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        past: tuple[jax.Array, jax.Array] | None,
        reach: int | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        update, present = self.attention(self.attention_norm(x), positions, past, reach)
        x = x + update
        return x + self.feed_forward(self.feed_forward_norm(x)), present


class GPT2(nnx.Module):
    """A decoder with random weights; `load_huggingface` fills in trained ones.

    Args:
      config: sizes and constants.
      quantization: how linear layers are held, or None for float. Embeddings, one of which is the
        output head, stay float.
      dtype: of activations, float weights and cache.
      rngs: for the weights.
    """

    def __init__(
        self,
        config: GPT2Config,
        *,
        quantization: Quantization | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = dtype
        width, options = config.hidden_size, {"dtype": dtype, "rngs": rngs}
        self.embed = nnx.Embed(config.vocab_size, width, param_dtype=dtype, **options)
        self.position_embed = nnx.Embed(config.context_length, width, param_dtype=dtype, **options)
        self.layers = nnx.List(
            [Layer(config, quantization=quantization, **options) for _ in range(config.num_layers)]
        )
        self.norm = layer_norm(config.hidden_size, config.norm_eps, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits ``float32[B, S, vocab]`` of the token after each of ``tokens int32[B, S]``."""
        if tokens.shape[1] > self.config.context_length:
            raise ValueError(
                f"tokens must be at most context_length = {self.config.context_length} in a row, "
                f"got {tokens.shape[1]}"
            )
        return self.logits(self.hidden(tokens)[0])

    def hidden(
        self, tokens: jax.Array, cache: Cache | None = None, reach: int | None = None
    ) -> tuple[jax.Array, Cache]:
        """Final features ``[B, S, width]``, and the cache with these tokens added.

        Arguments and cache are as for `Llama.hidden`. What lies behind the context, as padding may,
        gets the last position's embedding; there features mean nothing, but are finite.
        """
        positions = positions_after(cache, tokens.shape[1])
        last = self.config.context_length - 1
        x = self.embed(tokens) + self.position_embed(jnp.minimum(positions, last))
        x, cache = run_layers(self.layers, x, positions, cache, reach)
        return self.norm(x), cache

    def logits(self, x: jax.Array) -> jax.Array:
        """Logits ``float32[..., vocab]`` of final features ``[..., width]``."""
        return self.embed.attend(x).astype(jnp.float32)
