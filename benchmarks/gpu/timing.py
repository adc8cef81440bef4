"""Times programs of many products by turns, without what launches and calls cost.

A program runs one operation on many sets of operands, one after another, each its own: together
they exceed the second-level cache twice, so each product finds its weights in memory. XLA makes a
program one command buffer (a CUDA graph), in order; calls are queued, and only the last is waited
for.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

SAMPLE_SECONDS = 10e-3
"""A turn repeats its program until it takes about as long, so that its first call's way counts
little."""
MOST_CALLS = 64
WARM_UPS = 3
"""Calls before any is timed: XLA makes command buffers while it runs a program."""

IN_ORDER = {
    "xla_gpu_command_buffer_scheduling_mode": "SERIALIZE",
    "xla_gpu_graph_min_graph_size": 1,
}


class Program:
    """`operation` on each of `sets` in turn, compiled.

    Each call's results take the place of the last one's. A command buffer whose addresses change
    has to be made anew, which would take as long as small products.
    """

    def __init__(
        self,
        operation: Callable[..., Any],
        sets: Sequence[tuple[Any, ...]],
        compiler_options: dict[str, Any] | None = None,
    ):
        once = jax.jit(operation)  # traced and lowered once for all sets

        def run_all(sets: Sequence[tuple[Any, ...]], results: list[jax.Array]) -> list[jax.Array]:
            del results  # they lend their memory
            return [once(*operands) for operands in sets]

        self.sets = sets
        self.results = [_poisoned(once, operands) for operands in sets]
        self.jitted = jax.jit(
            run_all,
            donate_argnums=1,
            keep_unused=True,
            compiler_options=IN_ORDER | (compiler_options or {}),
        )

    def text(self) -> str:
        """What XLA made of it."""
        return self.jitted.lower(self.sets, self.results).compile().as_text() or ""

    def run(self, calls: int) -> jax.Array:
        """The result for the last set, after so many calls."""
        for _ in range(calls):
            self.results = self.jitted(self.sets, self.results)
        return jax.block_until_ready(self.results)[-1]


def _poisoned(operation: Callable[..., Any], operands: tuple[Any, ...]) -> jax.Array:
    """What no result is, so that elements which are never written show."""
    result = jax.eval_shape(operation, *operands)
    poison = jnp.nan if jnp.issubdtype(result.dtype, jnp.floating) else jnp.iinfo(result.dtype).max
    return jnp.full(result.shape, poison, result.dtype)


def take_turns(
    programs: Sequence[Program], rounds: int, sample_seconds: float = SAMPLE_SECONDS
) -> list[list[float]]:
    """Seconds that one operation of each program takes, in each round."""
    counts = [_warm_up(program, sample_seconds) for program in programs]
    seconds: list[list[float]] = [[] for _ in programs]
    gc.collect()
    gc.disable()  # collections would fall into some turns
    for _ in range(rounds):
        for program, calls, times in zip(programs, counts, seconds, strict=True):
            times.append(_time(program, calls) / (calls * len(program.sets)))
    gc.enable()
    return seconds


def _warm_up(program: Program, sample_seconds: float) -> int:
    """How many calls a turn takes."""
    program.run(WARM_UPS)
    return min(MOST_CALLS, math.ceil(sample_seconds / _time(program, 1)))


def _time(program: Program, calls: int) -> float:
    begin = time.perf_counter()
    program.run(calls)
    return time.perf_counter() - begin
