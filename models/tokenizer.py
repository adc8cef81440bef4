"""Text to tokens and back, from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence


class Tokenizer:
    """A byte-level BPE tokenizer with its special tokens and chat template (stub)."""

    vocab_size: int
    bos_token: int | None
    eos_token: int | None
    stop_tokens: frozenset[int]

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, tokens: Iterable[int]) -> str:
        raise NotImplementedError

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Pieces of text as soon as they are whole characters."""
        raise NotImplementedError

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt text of messages with "role" and "content", ready for the answer."""
        raise NotImplementedError
