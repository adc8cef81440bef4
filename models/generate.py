"""Token generation: one jitted step that reads tokens and gives the next, and its loop.

The step takes the model as a flat list of arrays, because walking a module costs more than
dispatching a step, and is compiled once for each number of tokens and size of cache. A prompt is
read in padded chunks whose sizes, like the cache's, are powers of two; so a chat of any length
needs only a few programs. The cache is donated to each step, which updates it in place.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .llama import Cache

MIN_BUCKET = 32
"""The smallest chunk of a prompt, and the smallest cache, that is compiled for."""

CHUNK = 512
"""The most tokens of a prompt that are read at once; bounds the memory for attention scores."""


@runtime_checkable
class Decoder(Protocol):
    """What generates: `Llama`, say, whose methods have the documentation."""

    config: Any
    dtype: Any

    def hidden(
        self, tokens: jax.Array, cache: Cache | None = None, reach: int | None = None
    ) -> tuple[jax.Array, Cache]: ...

    def logits(self, x: jax.Array) -> jax.Array: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """Chooses the next token.

    Args:
      key: a `jax.random` key; each position folds its number into it.
      temperature: ``float32[]``, or None to take the most likely token.
      top_p: ``float32[]``; samples from the fewest tokens that have this probability together.
        None for all.
      top_k: samples from so many of the most likely tokens, or None for all.
    """

    key: Any
    temperature: Any = None
    top_p: Any = None
    top_k: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __call__(self, logits: jax.Array, position: jax.Array) -> jax.Array:
        """A token ``int32[]`` from ``logits float32[vocab]``."""
        if self.temperature is None:
            return most_likely(logits)
        logits, tokens = logits / self.temperature, None
        if self.top_k is not None:
            logits, tokens = jax.lax.top_k(logits, min(self.top_k, logits.size))
        if self.top_p is not None:
            logits = nucleus(logits, self.top_p)
        choice = jax.random.categorical(jax.random.fold_in(self.key, position), logits)
        return (choice if tokens is None else tokens[choice]).astype(jnp.int32)


def most_likely(logits: jax.Array) -> jax.Array:
    """The first index ``int32[]`` of the largest of ``logits float32[vocab]``.

    `jnp.argmax` reduces pairs, which XLA does one at a time on a CPU; this is two plain reductions.
    """
    indices = jnp.arange(logits.size, dtype=jnp.int32)
    return jnp.where(logits < logits.max(), logits.size, indices).min()


def nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """`logits`, -inf outside of the fewest likeliest tokens that have probability `top_p` together.

    The least probability that stays is found bit by bit, since floats from 0 to 1 are ordered as
    their bits are; on a CPU, sorting a vocabulary would take longer than all of a small model.
    """
    probabilities = jax.nn.softmax(logits)
    keys = jax.lax.bitcast_convert_type(probabilities, jnp.int32)

    def refine(i: int, least: jax.Array) -> jax.Array:
        candidate = least | jax.lax.shift_right_logical(jnp.int32(1 << 30), i)
        enough = jnp.where(keys >= candidate, probabilities, 0).sum() >= top_p
        return jnp.where(enough, candidate, least)

    least = jax.lax.fori_loop(0, 31, refine, jnp.int32(0))
    return jnp.where(keys >= least, logits, -jnp.inf)


def generate(
    model: Decoder,
    tokens: Sequence[int],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Collection[int] = (),
) -> Iterator[int]:
    """Token ids that continue a prompt, one at a time as they are computed.

    Args:
      model: a `Llama` or another decoder, float or quantized.
      tokens: the prompt's ids, at least one and fewer than the model's context.
      max_tokens: the most ids to give; the context's end may come first.
      temperature: 0 for the most likely token each time; larger is more random.
      top_k: sample from so many of the most likely tokens only.
      top_p: sample from the fewest tokens that have this probability together, in (0, 1].
      seed: of the random choices.
      stop_tokens: ids that end the text; they are not given.

    Raises:
      TypeError: `model` is no decoder.
      ValueError: an argument is out of range, or the prompt is longer than the context.
    """
    if not isinstance(model, Decoder):
        raise TypeError(f"model must be a decoder, such as Llama, got {type(model).__name__}")
    context = model.config.context_length
    prompt = _check_prompt(tokens, model.config.vocab_size, context)
    sampler = _make_sampler(temperature, top_k, top_p, seed)
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be positive, got {max_tokens}")
    max_tokens = min(max_tokens, context - prompt.size)
    graph, state = nnx.split(model)
    weights, tree = jax.tree.flatten(state)
    step = compile_step(graph, tree)

    def run() -> Iterator[int]:
        cache = Cache.zeros(model.config, 1, bucket(prompt.size + max_tokens), model.dtype)
        for start in range(0, prompt.size, CHUNK):
            chunk = prompt[start : start + CHUNK]
            padded = np.zeros((1, bucket(chunk.size)), np.int32)
            padded[0, : chunk.size] = chunk
            token, cache = step(
                weights, padded, np.int32(chunk.size), cache, sampler, start + padded.size
            )
        for remaining in reversed(range(max_tokens)):
            current = token.item()  # waits for the device
            if current in stop_tokens:
                return
            yield current
            if remaining:
                token, cache = step(weights, token, np.int32(1), cache, sampler)

    return run()


@functools.lru_cache(maxsize=8)
def compile_step(graph: nnx.GraphDef[Any], tree: Any) -> Any:
    """The jitted step for models of one structure.

    ``step(weights, tokens int32[1, S], count int32[], cache, sampler, reach=None)`` adds the first
    `count` tokens to the cache, which it consumes, and returns the next token ``int32[1, 1]`` and
    the cache. There must be room for all S. `reach`, a Python int, is as for `Llama.hidden`.
    """

    @functools.partial(jax.jit, donate_argnames="cache", static_argnames="reach")
    def step(
        weights: list[jax.Array],
        tokens: jax.Array,
        count: jax.Array,
        cache: Cache,
        sampler: Sampler,
        reach: int | None = None,
    ) -> tuple[jax.Array, Cache]:
        model = nnx.merge(graph, jax.tree.unflatten(tree, weights))
        # Padding is cached too, but behind the tokens: nothing sees it before it is overwritten.
        length = cache.length + count
        x, cache = model.hidden(tokens, cache, reach)
        last = jax.lax.dynamic_index_in_dim(x[0], count - 1, keepdims=False)
        token = sampler(model.logits(last), length)
        return token[None, None], dataclasses.replace(cache, length=length)

    return step


def bucket(size: int) -> int:
    """The power of two that is compiled for `size` tokens."""
    return max(MIN_BUCKET, 1 << (size - 1).bit_length())


def _check_prompt(tokens: Sequence[int], vocab_size: int, context: int) -> np.ndarray:
    prompt = np.asarray(tokens)
    if prompt.ndim != 1 or not prompt.size:
        raise ValueError(f"tokens must be a list of at least one id, got shape {prompt.shape}")
    if not np.issubdtype(prompt.dtype, np.integer):
        raise TypeError(f"tokens must be integers, got {prompt.dtype}")
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise ValueError(
            f"tokens must be in 0..{vocab_size - 1}, got {prompt.min()}..{prompt.max()}"
        )
    if prompt.size >= context:
        raise ValueError(
            f"the prompt has {prompt.size} tokens; the model's context holds {context}, "
            "which must leave room for at least one more"
        )
    return prompt


def _make_sampler(temperature: float, top_k: int | None, top_p: float, seed: int) -> Sampler:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or larger, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be positive or None, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    key = jax.random.key(seed)
    if temperature == 0:
        return Sampler(key)
    nucleus = None if top_p == 1 else np.float32(top_p)
    return Sampler(key, np.float32(temperature), nucleus, top_k)
