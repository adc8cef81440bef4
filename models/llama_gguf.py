"""Llama models from GGUF files: configuration, weight map, and loading tensor by tensor."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from .llama import Llama, LlamaConfig
from .quantization import Quantization
from .tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """What a checkpoint holds: `model`, `tokenizer`, `config`, and its `name`."""

    model: Llama
    tokenizer: Tokenizer
    config: LlamaConfig
    quantization: Quantization | None
    name: str


@dataclasses.dataclass(frozen=True)
class WeightBytes:
    """Resident bytes of a model's weights: linears, embedding (and its tied head), the rest."""

    linear: int
    embedding: int
    other: int
    linear_weights: int

    @property
    def total(self) -> int:
        return self.linear + self.embedding + self.other

    @property
    def bits_per_linear_weight(self) -> float:
        """Bits for each weight of a linear layer, scales and offsets included."""
        return 8 * self.linear / self.linear_weights


def load_gguf(
    path: str | os.PathLike[str],
    *,
    quantization: Quantization | None = Quantization(),
    dtype: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Load (stub: being written). progress(done, total) in bytes of the file."""
    raise NotImplementedError


def weight_bytes(model: Llama) -> WeightBytes:
    """Count (stub: being written)."""
    raise NotImplementedError
