"""How well a model predicts a text, and how far it is from a reference model.

Logits over a whole vocabulary are large, so they exist for `CHUNK` positions at a time and only
sums leave the device. What is kept of the reference between models is its final features. Layers
are compiled one by one, and those that are alike once: a whole model takes long to compile.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .llama import Llama

CHUNK = 128
"""Positions whose logits are in memory at once: 25 MB a model for 49,152 tokens."""

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Averages over all predicted tokens.

    Args:
      tokens: how many were predicted.
      perplexity: ``exp`` of the mean negative log-likelihood of the text.
      reference_perplexity: that of the reference, on the same tokens.
      ratio_error: standard error of ``perplexity / reference_perplexity`` for the choice of text,
        from the spread of the tokens' differences; a change below twice this may be chance.
      kl: mean Kullback-Leibler divergence of the model's next-token distribution from the
        reference's, ``sum p_ref log(p_ref / p)``, in nats a token.
      top1: share of positions at which both find the same token most likely, 0 to 1.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float
    ratio_error: float
    kl: float
    top1: float

    @property
    def ratio(self) -> float:
        """``perplexity / reference_perplexity``: 1 if nothing is lost."""
        return self.perplexity / self.reference_perplexity


def encode_texts(texts: Iterable[str], encode: Callable[[str], list[int]]) -> list[int]:
    """Token ids of `texts`, each encoded on its own with an empty line after it."""
    return [token for text in texts for token in encode(text + "\n\n")]


def choose_windows(tokens: Sequence[int], total: int, context: int) -> np.ndarray:
    """At most `total` tokens as ``int32[windows, context]``, windows evenly spaced over the text.

    Raises:
      ValueError: there are too few tokens, or `total` is less than one window.
    """
    if context < 2:
        raise ValueError(f"context must be at least 2 tokens, got {context}")
    windows = total // context
    if windows < 1:
        raise ValueError(f"tokens must be at least one context of {context}, got {total}")
    if len(tokens) < windows * context:
        raise ValueError(f"the text has {len(tokens)} tokens, fewer than {windows * context}")
    starts = np.linspace(0, len(tokens) - context, windows).astype(int)
    return np.stack([np.asarray(tokens[start : start + context], np.int32) for start in starts])


class Evaluator:
    """Measures models on one text against one reference.

    In each window every token but the first is predicted from those before it in the window.

    Args:
      reference: the model that others are compared to, as a rule the float one.
      windows: the text as ``int32[windows, context]``; see `choose_windows`.
      progress: called with the windows done so far and their number.
    """

    def __init__(self, reference: Llama, windows: np.ndarray, progress: Progress | None = None):
        self.windows = _check_windows(windows, reference)
        self._vocab_size = reference.config.vocab_size
        self._reference = nnx.split(reference)
        self._features = []
        for i, window in enumerate(self.windows, 1):
            self._features.append(jax.block_until_ready(_features(reference, window)))
            _report(progress, i, len(self.windows))

    def __call__(self, model: Llama, progress: Progress | None = None) -> Evaluation:
        """The `Evaluation` of `model`, which must have the reference's vocabulary."""
        _check_windows(self.windows, model)
        if model.config.vocab_size != self._vocab_size:
            raise ValueError(
                f"model has a vocabulary of {model.config.vocab_size}, the reference of "
                f"{self._vocab_size}"
            )
        split, sums = nnx.split(model), np.zeros(5)
        for i, (window, expected) in enumerate(zip(self.windows, self._features, strict=True), 1):
            features = _features(model, window)
            sums += np.asarray(_compare(*self._reference, *split, expected, features, window))
            _report(progress, i, len(self.windows))
        count = self.windows.shape[0] * (self.windows.shape[1] - 1)
        loss, reference_loss, square, kl, same = (sums / count).tolist()
        change = loss - reference_loss
        variance = max(square - change**2, 0.0)
        return Evaluation(
            tokens=count,
            perplexity=math.exp(loss),
            reference_perplexity=math.exp(reference_loss),
            ratio_error=math.exp(change) * math.sqrt(variance / count),
            kl=kl,
            top1=same,
        )


class _Compiled(nnx.Module, pytree=False):
    """A layer that is compiled, with those that differ from it in their numbers only."""

    def __init__(self, layer: nnx.Module):
        self.layer = layer

    def __call__(self, *args: Any) -> Any:
        return _call(*nnx.split(self.layer), *args)


@functools.partial(jax.jit, static_argnums=0)
def _call(graph: Any, state: Any, *args: Any) -> Any:
    return nnx.merge(graph, state)(*args)


@contextmanager
def _compiled_layers(model: Any) -> Iterator[None]:
    layers = model.layers
    model.layers = nnx.List(map(_Compiled, layers))
    try:
        yield
    finally:
        model.layers = layers


def _features(model: Llama, window: np.ndarray) -> jax.Array:
    """Final features ``[context, width]`` of one window ``int32[context]``."""
    with _compiled_layers(model):
        return model.hidden(jnp.asarray(window)[None])[0][0]


@functools.partial(jax.jit, static_argnums=(0, 2))
def _compare(
    reference_graph: Any,
    reference_state: Any,
    graph: Any,
    state: Any,
    expected: jax.Array,
    features: jax.Array,
    window: jax.Array,
) -> jax.Array:
    """Sums over a window's predictions, ``float32[5]``.

    They are the model's loss, the reference's, the square of their difference, the divergence, and
    the positions where both have the same top token. `expected` and `features` are final features
    ``[context, width]`` of the reference and of the model.
    """
    reference, model = nnx.merge(reference_graph, reference_state), nnx.merge(graph, state)

    def chunk_sums(chunk: tuple[jax.Array, ...]) -> jax.Array:
        expected, features, target, counts = chunk
        log_p = jax.nn.log_softmax(reference.logits(expected))
        log_q = jax.nn.log_softmax(model.logits(features))
        kl = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
        same = log_p.argmax(-1) == log_q.argmax(-1)
        loss_p, loss_q = (
            -jnp.take_along_axis(x, target[:, None], axis=-1)[:, 0] for x in (log_p, log_q)
        )
        square = (loss_q - loss_p) ** 2
        rows = jnp.stack([loss_q, loss_p, square, kl, same.astype(jnp.float32)])
        return jnp.where(counts, rows, 0).sum(-1)

    # The last position has no token to predict; neither has the padding of the last chunk.
    count = window.shape[0] - 1
    operands = (expected[:-1], features[:-1], window[1:], jnp.ones(count, bool))
    chunks = jax.tree.map(_into_chunks, operands)
    return jax.lax.map(chunk_sums, chunks).sum(0)


def _into_chunks(x: jax.Array) -> jax.Array:
    """``[n, ...]`` to ``[chunks, CHUNK, ...]``, padded with zeros."""
    pad = -x.shape[0] % CHUNK
    x = jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, CHUNK, *x.shape[1:])


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def _check_windows(windows: np.ndarray, model: Llama) -> np.ndarray:
    windows = np.asarray(windows)
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows must be int32[windows, 2 or more], got shape {windows.shape}")
    if not np.issubdtype(windows.dtype, np.integer):
        raise TypeError(f"windows must be integers, got {windows.dtype}")
    if windows.shape[1] > model.config.context_length:
        raise ValueError(
            f"windows have {windows.shape[1]} tokens, the model's context holds "
            f"{model.config.context_length}"
        )
    if windows.min() < 0 or windows.max() >= model.config.vocab_size:
        raise ValueError(
            f"windows must hold ids in 0..{model.config.vocab_size - 1}, "
            f"got {windows.min()}..{windows.max()}"
        )
    return windows.astype(np.int32)
