"""Sentence embeddings from a BERT, as Sentence Transformers has them for MiniLM."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_anyprec.quantization import Quantization

from .architectures import load_huggingface
from .bert import Bert
from .huggingface import Folder, HuggingFaceError
from .loading import Progress
from .tokenizer import Tokenizer

BATCH = 32
"""The most sentences that are embedded at once."""

MIN_BUCKET = 16
"""The least tokens in a row that are compiled for; sizes are powers of two."""


class SentenceEncoder:
    """Embeds sentences: the mean of their tokens' features, of length 1.

    Args:
      model: float or quantized.
      tokenizer: of the same checkpoint; adds the tokens that begin and end a sentence.
      max_tokens: of a sentence, at least those two; what is longer is cut. None for as many as the
        model has positions.
    """

    def __init__(self, model: Bert, tokenizer: Tokenizer, *, max_tokens: int | None = None):
        context = model.config.context_length
        max_tokens = context if max_tokens is None else max_tokens
        if not 2 <= max_tokens <= context:
            raise ValueError(
                f"max_tokens must be in 2..{context}, the model's positions, got {max_tokens}"
            )
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, but the model an embedding for "
                f"only {model.config.vocab_size}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        graph, self._weights = nnx.split(model)
        self._embed = jax.jit(functools.partial(_embed, graph))

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """Embeddings ``float32[sentences, width]``, each of length 1."""
        if isinstance(sentences, str):
            raise TypeError("sentences must be a list of strings, got one string")
        rows = [self._tokens(sentence) for sentence in sentences]
        embeddings = np.zeros((len(rows), self.model.config.hidden_size), np.float32)
        # Sentences of like length share a batch, so that there is little padding.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            tokens, mask = self._pad([rows[i] for i in batch])
            embeddings[batch] = self._embed(self._weights, tokens, mask)[: len(batch)]
        return embeddings

    def _tokens(self, sentence: str) -> list[int]:
        """Ids of a sentence; one that is cut keeps the token that ends it."""
        ids = self.tokenizer.encode(sentence)
        return ids if len(ids) <= self.max_tokens else [*ids[: self.max_tokens - 1], ids[-1]]

    def _pad(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens ``int32[B, S]`` and their mask, for sizes that few programs cover."""
        longest = max(MIN_BUCKET, max(len(row) for row in rows))
        shape = _bucket(len(rows)), min(_bucket(longest), self.model.config.context_length)
        tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        mask[:, 0] = True  # also in rows of padding, whose features would be NaN without
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
            mask[i, : len(row)] = True
        return tokens, mask


def load_sentence_encoder(
    path: str | os.PathLike[str],
    *,
    quantization: Quantization | None = None,
    dtype: Any = None,
    progress: Progress | None = None,
) -> SentenceEncoder:
    """Load a folder of Sentence Transformers that holds a BERT and takes the mean of its tokens.

    Args:
      path: of the folder: as for `load_huggingface`, with tokenizer.json; "max_seq_length" of
        sentence_bert_config.json is the most tokens of a sentence.
      quantization, dtype, progress: as for `load_huggingface`.

    Raises:
      HuggingFaceError: the folder is broken, or not such a model. Others as `load_huggingface`.
    """
    folder = Folder(path)
    kind = folder.config.get("model_type", str)
    if kind != "bert":
        raise HuggingFaceError(f"{folder.config.where}: 'model_type' must be 'bert', got {kind!r}")
    pooling = folder.optional("1_Pooling/config.json")
    pooling.require("pooling_mode", "mean", "mean")
    for key in pooling.values:
        if key.startswith("pooling_mode_"):
            pooling.require(key, key == "pooling_mode_mean_tokens", None)
    limit = folder.optional("sentence_bert_config.json").get("max_seq_length", int | None, None)
    loaded = load_huggingface(path, quantization=quantization, dtype=dtype, progress=progress)
    try:
        return SentenceEncoder(loaded.model, loaded.tokenizer, max_tokens=limit)
    except ValueError as error:
        raise HuggingFaceError(f"{folder.name}: {error}") from None


def mean_embedding(features: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of ``features [B, S, width]`` where ``mask bool[B, S]``, of length 1.

    Returns:
      ``float32[B, width]``.
    """
    shown = mask[..., None]
    total = jnp.where(shown, features, 0).sum(axis=1, dtype=jnp.float32)
    mean = total / shown.sum(axis=1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def _embed(graph: nnx.GraphDef[Bert], weights: Any, tokens: jax.Array, mask: jax.Array) -> Any:
    return mean_embedding(nnx.merge(graph, weights)(tokens, mask), mask)


def _bucket(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()
