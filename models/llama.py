"""A Llama-family decoder in Flax NNX, written for reading.

Shapes: B batch, S tokens of this call, T positions of the cache (T = S without one), H query
heads, G key/value heads, D head size. Parameters are those of GGUF files of architecture
"llama", in which the rows of the query and key projections are ordered for rotary embeddings
over neighbouring pairs (2 i, 2 i + 1); a Hugging Face checkpoint, which pairs (i, i + D / 2),
needs those rows permuted first.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_anyprec.quantization import Quantization

from .dense import make_linear
from .projections import Projections

QUERY_BLOCK = 128
"""Tokens of a prompt that attention takes at once; the fewer, the less is computed in vain."""


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a Llama model.

    Args:
      vocab_size: number of tokens.
      num_layers: number of decoder layers.
      hidden_size: features of the residual stream.
      intermediate_size: features inside the feed-forward block.
      num_heads: query heads, H.
      num_kv_heads: key and value heads, G; must divide `num_heads`.
      head_dim: features of a head, D; even.
      context_length: the most tokens, prompt and answer together.
      rope_theta: base of the rotary frequencies.
      norm_eps: added to the mean square in `RMSNorm`.
      tied_embeddings: whether the output head is the embedding.
    """

    vocab_size: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied_embeddings: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool) and not value > 0:
                raise ValueError(f"{field.name} must be positive, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads = {self.num_heads}, got {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by the names that weight maps use."""
        return {
            "layers": self.num_layers,
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "inner": self.intermediate_size,
            "query": self.num_heads * self.head_dim,
            "key": self.num_kv_heads * self.head_dim,
            "head": self.head_dim,
        }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of past tokens, preallocated: a pytree that `Llama.hidden` returns updated.

    Batch and heads are one axis, as the products of a decode step read them: with two, XLA
    copies the whole cache at every step, on a CPU at least.

    Args:
      keys: for each layer ``[B G, T, D]``.
      values: like `keys`.
      length: ``int32[]``, the positions that are filled; the same for the whole batch.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array

    @classmethod
    def zeros(cls, config: LlamaConfig, batch: int, size: int, dtype: Any) -> Cache:
        """An empty cache for `size` positions."""
        shape = (batch * config.num_kv_heads, size, config.head_dim)

        def layers() -> tuple[jax.Array, ...]:
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

        return cls(layers(), layers(), jnp.zeros((), jnp.int32))


class Attention(nnx.Module):
    """Causal self-attention in which ``H / G`` query heads share one key and value head."""

    def __init__(self, config: LlamaConfig, **options: Any):
        self.config = config
        width, heads = config.hidden_size, config.num_heads * config.head_dim
        kv_heads = config.num_kv_heads * config.head_dim
        self.qkv = Projections(width, (heads, kv_heads, kv_heads), **options)
        self.output = make_linear(heads, width, **options)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        past: tuple[jax.Array, jax.Array] | None,
        reach: int | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """``x [B, S, width]`` at ``positions int32[S]`` to its update and the keys and values."""
        theta = self.config.rope_theta
        q, k, v = map(self._heads, self.qkv(x))
        q, k = rotary(q, positions, theta), rotary(k, positions, theta)
        if past is not None:
            k = jax.lax.dynamic_update_slice_in_dim(past[0], k, positions[0], axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(past[1], v, positions[0], axis=1)
        y = attend_causally(q, k[:, :reach], v[:, :reach], positions)
        y = jnp.swapaxes(y.reshape(x.shape[0], -1, *y.shape[1:]), 1, 2)
        return self.output(y.reshape(*x.shape[:2], -1)), (k, v)

    def _heads(self, x: jax.Array) -> jax.Array:
        """``[B, S, heads D]`` to ``[B heads, S, D]``."""
        x = jnp.swapaxes(x.reshape(*x.shape[:2], -1, self.config.head_dim), 1, 2)
        return x.reshape(-1, *x.shape[2:])


class FeedForward(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: LlamaConfig, **options: Any):
        inner = config.intermediate_size
        self.gate_up = Projections(config.hidden_size, (inner, inner), **options)
        self.down = make_linear(inner, config.hidden_size, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = self.gate_up(x)
        return self.down(nnx.silu(gate) * up)


class Layer(nnx.Module):
    """One decoder layer: attention and feed-forward, each on a normalised residual stream."""

    def __init__(self, config: LlamaConfig, *, dtype: Any, rngs: nnx.Rngs, **options: Any):
        self.attention_norm = make_norm(config, dtype, rngs)
        self.attention = Attention(config, dtype=dtype, rngs=rngs, **options)
        self.feed_forward_norm = make_norm(config, dtype, rngs)
        self.feed_forward = FeedForward(config, dtype=dtype, rngs=rngs, **options)

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


class Llama(nnx.Module):
    """A decoder with random weights; `jax_anyprec.models.load_gguf` fills in trained ones.

    Args:
      config: sizes and constants.
      quantization: how linear layers are held, or None for float. The embedding stays float.
      dtype: of activations, float weights and cache.
      rngs: for the weights.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        quantization: Quantization | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = dtype
        self.embed = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        options = {"quantization": quantization, "dtype": dtype, "rngs": rngs}
        self.layers = nnx.List([Layer(config, **options) for _ in range(config.num_layers)])
        self.norm = make_norm(config, dtype, rngs)
        if not config.tied_embeddings:
            self.head = make_linear(config.hidden_size, config.vocab_size, **options)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits ``float32[B, S, vocab]`` of the token after each of ``tokens int32[B, S]``."""
        return self.logits(self.hidden(tokens)[0])

    def hidden(
        self, tokens: jax.Array, cache: Cache | None = None, reach: int | None = None
    ) -> tuple[jax.Array, Cache]:
        """Final features ``[B, S, width]``, and the cache with these tokens added.

        Attention sees the first `reach` positions of the cache, at least those that these tokens
        fill; None for all. Fewer cost less.

        The tokens follow those in the cache, where there must be room for them (a traced length
        can't be checked here; `generate` does). Without one they are the first, and the cache
        that is returned is full.
        """
        start = jnp.int32(0) if cache is None else cache.length
        positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        x = self.embed(tokens)
        presents = []
        for i, layer in enumerate(self.layers):
            past = None if cache is None else (cache.keys[i], cache.values[i])
            x, present = layer(x, positions, past, reach)
            presents.append(present)
        keys, values = zip(*presents, strict=True)
        return self.norm(x), Cache(keys, values, start + tokens.shape[1])

    def logits(self, x: jax.Array) -> jax.Array:
        """Logits ``float32[..., vocab]`` of final features ``[..., width]``."""
        y = self.embed.attend(x) if self.config.tied_embeddings else self.head(x)
        return y.astype(jnp.float32)


def make_norm(config: LlamaConfig, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm with a float32 scale."""
    return nnx.RMSNorm(config.hidden_size, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)


def rotary(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Turn each pair (2 i, 2 i + 1) of ``x [..., S, D]`` by ``position * theta**(-2 i / D)``."""
    size = x.shape[-1]
    frequencies = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies[:, None]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], size // 2, 2)
    # (a cos - b sin, b cos + a sin) without taking the pairs apart, which XLA is slow to undo.
    signs = np.array([-1, 1], np.float32)
    turned = pairs * jnp.cos(angles) + pairs[..., ::-1] * (signs * jnp.sin(angles))
    return turned.reshape(x.shape).astype(x.dtype)


def attend_causally(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """`attend` where a query at one of ``positions int32[S]`` sees those up to it.

    All S positions are among the T of `k` and `v`, so those past T - S + s are out of sight of
    query s, wherever S begins. A long prompt is cut into blocks, which leave them out.
    """
    s, t = q.shape[1], k.shape[1]
    blocks = []
    for begin in range(0, s, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, s)
        reach = t - s + end
        visible = positions[begin:end, None] >= jnp.arange(reach)
        blocks.append(attend(q[:, begin:end], k[:, :reach], v[:, :reach], visible))
    return jnp.concatenate(blocks, axis=1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """Attention of ``q [B H, S, D]`` over ``k, v [B G, T, D]``.

    Query s sees position t where ``visible bool[S, T]``. Scores and softmax are float32; the
    result ``[B H, S, D]`` has the dtype of `q`.
    """
    s, size = q.shape[1:]
    grouped = q.reshape(k.shape[0], -1, size)  # the H / G query heads of a key, one after another
    scores = jnp.einsum("bsd,btd->bst", grouped, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(-1, s, k.shape[1]) * size**-0.5
    scores = jnp.where(visible, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = weights.reshape(*grouped.shape[:2], -1)
    y = jnp.einsum("bst,btd->bsd", weights, v, preferred_element_type=jnp.float32)
    return y.reshape(q.shape).astype(q.dtype)
