"""Interleaved timing: contestants take turns, and ratios are taken inside a round.

A change in the machine's speed meets all contestants of a round alike, so the median over rounds
of baseline over contestant holds on a busy machine where times do not.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

SAMPLE_SECONDS = 1e-3
"""A sample repeats short work until it takes about as long."""
LONG_SECONDS = 10e-3
"""Work that takes longer needs no warm-up in each turn."""
CHAIN = 16
"""The most products that one call into a library may hold, so that the call itself costs little."""
REST_SECONDS = 2e-3
MOST_RESTS = 100
"""Before a turn others' threads must have gone to sleep, but nobody is waited for longer."""


class Contestant(Protocol):
    """Something whose work can be timed, such as one way to multiply by one layer's weights."""

    name: str

    def run(self, count: int) -> None:
        """Do the work `count` times, and wait until it is done."""


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def take_turns(contestants: Sequence[Contestant], rounds: int) -> list[list[float]]:
    """Seconds that each contestant's work takes once, in each round."""
    counts = [_warm_up(contestant) for contestant in contestants]
    seconds: list[list[float]] = [[] for _ in contestants]
    gc.collect()
    gc.disable()  # collections would fall into some turns
    for _ in range(rounds):
        for contestant, count, times in zip(contestants, counts, seconds, strict=True):
            rest()
            if not times or times[-1] < LONG_SECONDS:
                contestant.run(1)  # the last turn was others', who took the caches
            times.append(_time(contestant, count) / count)
    gc.enable()
    return seconds


def rest() -> None:
    """Wait until no thread of this process runs: some spin, or give memory back, after their turn.

    XLA's bfloat16 products free large buffers for 20 ms after their result is there.
    """
    for _ in range(MOST_RESTS):
        before = time.process_time()
        time.sleep(REST_SECONDS)
        if time.process_time() - before < REST_SECONDS / 10:
            return


def speeds(baseline: Sequence[float], times: Sequence[float]) -> Spread:
    """How many times as fast as the baseline, over rounds."""
    return spread([base / own for base, own in zip(baseline, times, strict=True)])


def _warm_up(contestant: Contestant) -> int:
    """Compile and load what a turn needs; how often a sample repeats the work."""
    contestant.run(1)
    once = _time(contestant, 1)
    if once >= LONG_SECONDS:
        return 1
    once = min(once, *(_time(contestant, 1) for _ in range(3)))
    count = math.ceil(SAMPLE_SECONDS / once)
    if count > CHAIN:
        contestant.run(CHAIN)
        once = min(_time(contestant, CHAIN) for _ in range(3)) / CHAIN
        count = CHAIN * math.ceil(SAMPLE_SECONDS / once / CHAIN)  # whole calls
    contestant.run(count)
    return count


def _time(contestant: Contestant, count: int) -> float:
    begin = time.perf_counter()
    contestant.run(count)
    return time.perf_counter() - begin
