"""Token generation: a jitted prefill, a jitted decode step, and the loop that runs them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from .llama import Llama


def generate(
    model: Llama,
    tokens: Sequence[int],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Collection[int] = (),
) -> Iterator[int]:
    """Token ids that continue a prompt, one at a time (stub: being written)."""
    raise NotImplementedError
