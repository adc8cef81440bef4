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
    """`operation` on each of `sets` in turn, compiled."""

    def __init__(self, operation: Callable[..., Any], sets: Sequence[tuple[Any, ...]]):
        once = jax.jit(operation)  # traced and lowered once for all sets

        def run_all(sets: Sequence[tuple[Any, ...]]) -> list[Any]:
            return [once(*operands) for operands in sets]

        self.sets = sets
        self.compiled = jax.jit(run_all).lower(sets).compile(compiler_options=IN_ORDER)

    def run(self, calls: int) -> list[Any]:
        """The results of the last of so many calls, when it is done."""
        for _ in range(calls):
            results = self.compiled(self.sets)
        return jax.block_until_ready(results)


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
