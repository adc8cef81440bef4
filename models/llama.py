"""Decoders of the Llama family (Llama, Mistral, Qwen, Gemma) in Flax NNX, written for reading.

Shapes: B batch, S tokens of this call, T positions of the cache (T = S without one), H query
heads, G key/value heads, D head size. Rotary embeddings turn neighbouring pairs (2 i, 2 i + 1) of
queries and keys, as in GGUF files of architecture "llama"; the weights of a Hugging Face
checkpoint, which pairs (i, i + D / 2), are reordered when they are loaded.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

import jax_anyprec as ap
from jax_anyprec.before import Before
from jax_anyprec.quantization import Quantization

from .attention import (
    LinearScaling,
    Llama3Scaling,
    attend_causally,
    cap_softly,
    extend,
    join_heads,
    rotary,
    split_heads,
)
from .dense import apply_linear, make_linear
from .norms import before_product
from .projections import Projections

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nnx.silu,
    "gelu_tanh": functools.partial(nnx.gelu, approximate=True),
}
"""Of the gate in feed-forward blocks, by name."""


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a decoder; the defaults are Llama's.

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
      rope_scaling: of the rotary frequencies, for a longer context; or None.
      qkv_bias: whether the query, key and value projections have biases.
      qk_norm: whether each head of queries and keys is normalised.
      post_norms: whether what attention and feed-forward add is normalised too.
      activation: of the gate in feed-forward blocks.
      scale_embeddings: whether embeddings are multiplied by ``sqrt(hidden_size)``.
      sliding_window: positions that layers of `sliding_layers` see, their own among them.
      sliding_layers: for each layer, whether it sees a `sliding_window` only; empty for none.
      sliding_rope_theta: instead of `rope_theta` and `rope_scaling` in those layers; None for the
        same.
      attention_scale: of scores, None for ``head_dim**-0.5``.
      attention_soft_cap: limit that scores approach, or None.
      logit_soft_cap: limit that logits approach, or None.
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
    rope_scaling: LinearScaling | Llama3Scaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    scale_embeddings: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    sliding_rope_theta: float | None = None
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and not value > 0:
                raise ValueError(f"{field.name} must be positive, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads = {self.num_heads}, got {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
            )
        if len(self.sliding_layers) not in (0, self.num_layers):
            raise ValueError(
                f"sliding_layers must be empty or one for each of num_layers = {self.num_layers}, "
                f"got {len(self.sliding_layers)}"
            )
        if any(self.sliding_layers) and self.sliding_window is None:
            raise ValueError("sliding_window must be set where sliding_layers has layers")

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

    def __init__(
        self, config: LlamaConfig, *, sliding: bool, dtype: Any, rngs: nnx.Rngs, **options: Any
    ):
        self.config = config
        self.sliding = sliding
        options |= {"dtype": dtype, "rngs": rngs}
        width, heads = config.hidden_size, config.num_heads * config.head_dim
        kv_heads = config.num_kv_heads * config.head_dim
        widths = (heads, kv_heads, kv_heads)
        self.qkv = Projections(width, widths, use_bias=config.qkv_bias, **options)
        self.output = make_linear(heads, width, **options)
        if config.qk_norm:
            self.query_norm = make_norm(config, dtype, rngs, config.head_dim)
            self.key_norm = make_norm(config, dtype, rngs, config.head_dim)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        past: tuple[jax.Array, jax.Array] | None,
        reach: int | None = None,
        *,
        before: Before = None,
        residual: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """``before(x)``, x ``[B, S, width]`` at ``positions int32[S]``, to its update, to which
        `residual` is added, and the keys and values.
        """
        config = self.config
        q, k, v = (split_heads(each, config.head_dim) for each in self.qkv(x, before))
        if config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = self._turn(q, positions), self._turn(k, positions)
        k, v = extend(past, k, v, positions)
        y = attend_causally(
            q,
            k[:, :reach],
            v[:, :reach],
            positions,
            window=config.sliding_window if self.sliding else None,
            scale=config.attention_scale,
            soft_cap=config.attention_soft_cap,
        )
        y = join_heads(y, x.shape[0])
        return apply_linear(self.output, y, residual=residual), (k, v)

    def _turn(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotary embeddings for ``x [B heads, S, D]``."""
        config = self.config
        if self.sliding and config.sliding_rope_theta is not None:
            return rotary(x, positions, config.sliding_rope_theta)
        return rotary(x, positions, config.rope_theta, config.rope_scaling)


class FeedForward(nnx.Module):
    """A gated linear unit: ``down(activation(gate(x)) * up(x))``."""

    def __init__(self, config: LlamaConfig, **options: Any):
        inner = config.intermediate_size
        self.activation = config.activation
        self.gate_up = Projections(config.hidden_size, (inner, inner), **options)
        self.down = make_linear(inner, config.hidden_size, **options)

    def __call__(
        self, x: jax.Array, *, before: Before = None, residual: jax.Array | None = None
    ) -> jax.Array:
        """The block's update of ``before(x)``, to which `residual` is added."""
        products = self.gate_up.products(x, before)
        if self.activation == "silu" and len(products) == 1:
            return apply_linear(self.down, products[0], before=ap.SwiGLU(), residual=residual)
        gate, up = self.gate_up.split(products)
        return apply_linear(self.down, ACTIVATIONS[self.activation](gate) * up, residual=residual)


class Layer(nnx.Module):
    """One decoder layer: attention and feed-forward, each on a normalised residual stream."""

    def __init__(
        self, config: LlamaConfig, *, sliding: bool, dtype: Any, rngs: nnx.Rngs, **options: Any
    ):
        self.post_norms = config.post_norms
        options |= {"dtype": dtype, "rngs": rngs}
        self.attention_norm = make_norm(config, dtype, rngs)
        self.attention = Attention(config, sliding=sliding, **options)
        self.feed_forward_norm = make_norm(config, dtype, rngs)
        self.feed_forward = FeedForward(config, **options)
        if config.post_norms:
            self.attention_post_norm = make_norm(config, dtype, rngs)
            self.feed_forward_post_norm = make_norm(config, dtype, rngs)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        past: tuple[jax.Array, jax.Array] | None,
        reach: int | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        norm = before_product(self.attention_norm)
        if self.post_norms:
            update, present = self.attention(x, positions, past, reach, before=norm)
            x = x + self.attention_post_norm(update)
        else:
            x, present = self.attention(x, positions, past, reach, before=norm, residual=x)
        norm = before_product(self.feed_forward_norm)
        if self.post_norms:
            return x + self.feed_forward_post_norm(self.feed_forward(x, before=norm)), present
        return self.feed_forward(x, before=norm, residual=x), present


class Llama(nnx.Module):
    """A decoder with random weights; `load_gguf` and `load_huggingface` fill in trained ones.

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
        sliding = config.sliding_layers or (False,) * config.num_layers
        self.layers = nnx.List([Layer(config, sliding=each, **options) for each in sliding])
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
        positions = positions_after(cache, tokens.shape[1])
        x = self.embed(tokens)
        if self.config.scale_embeddings:
            x *= jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        x, cache = run_layers(self.layers, x, positions, cache, reach)
        return self.norm(x), cache

    def logits(self, x: jax.Array) -> jax.Array:
        """Logits ``float32[..., vocab]`` of final features ``[..., width]``."""
        y = self.embed.attend(x) if self.config.tied_embeddings else self.head(x)
        y = y.astype(jnp.float32)
        cap = self.config.logit_soft_cap
        return y if cap is None else cap_softly(y, cap)


def positions_after(cache: Cache | None, count: int) -> jax.Array:
    """Positions ``int32[count]`` of tokens that follow those in the cache, if there is one."""
    return _filled(cache) + jnp.arange(count, dtype=jnp.int32)


def _filled(cache: Cache | None) -> jax.Array:
    return jnp.int32(0) if cache is None else cache.length


def run_layers(
    layers: Iterable[Any],
    x: jax.Array,
    positions: jax.Array,
    cache: Cache | None,
    reach: int | None,
) -> tuple[jax.Array, Cache]:
    """``x [B, S, width]`` through decoder layers, and the cache with these tokens added."""
    presents = []
    for i, layer in enumerate(layers):
        past = None if cache is None else (cache.keys[i], cache.values[i])
        x, present = layer(x, positions, past, reach)
        presents.append(present)
    keys, values = zip(*presents, strict=True)
    return x, Cache(keys, values, _filled(cache) + x.shape[1])


def make_norm(
    config: LlamaConfig, dtype: Any, rngs: nnx.Rngs, size: int | None = None
) -> nnx.RMSNorm:
    """RMSNorm over `size` features (None: the residual stream's) with a float32 scale."""
    size = config.hidden_size if size is None else size
    return nnx.RMSNorm(size, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
