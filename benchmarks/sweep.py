"""Times all layers, sizes and contestants on the cores of this process."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.layers import LAYERS, PAIRS, SMOLLM2, SQUARE, Layer, Pair

from .machine import last_level_cache, limits, machine
from .peers import BASELINE, PEERS, Peer, check
from .products import (
    CHANNEL,
    GROUPS_32_OFFSETS,
    GROUPS_64,
    Grouping,
    OurProduct,
)
from .timing import speeds, spread, take_turns

MEMORY = 4 * 2**30
"""The most bytes of weights, copies included, that one case holds."""
GROUPED_PAIRS = (Pair(4, 8), Pair(2, 8), Pair(4, 4), Pair(8, 8))
SETTINGS: tuple[tuple[Grouping, Pair], ...] = (
    *((CHANNEL, pair) for pair in PAIRS),
    *((grouping, pair) for grouping in (GROUPS_64, GROUPS_32_OFFSETS) for pair in GROUPED_PAIRS),
)


class Case(NamedTuple):
    """A layer, a number of tokens, and whether its weights come from memory each time."""

    layer: Layer
    m: int
    cold: bool

    def __str__(self) -> str:
        return f"{self.layer}, M = {self.m}, {'cold' if self.cold else 'warm'}"


def choose_cases(quick: bool) -> list[Case]:
    layers = (SQUARE, SMOLLM2[2]) if quick else LAYERS
    sizes = ((1, False), (1, True), (16, False), (512, False))
    return [Case(layer, *size) for layer in layers for size in sizes]


def run_sweep(quick: bool, rounds: int) -> dict[str, Any]:
    """Limits of the machine, and a row for each contestant of each case."""
    cases = choose_cases(quick)
    threads = len(os.sched_getaffinity(0))
    reached = limits()
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for number, case in enumerate(cases, 1):
        begin = time.perf_counter()
        for row in time_case(case, rounds, skipped):
            share = row["gigabytes_per_second"] * 1e9 / reached["read_bytes_per_second"]
            rows.append(row | {"threads": threads, "bandwidth_share": share})
        gc.collect()
        took = time.perf_counter() - begin
        log(f"[{number}/{len(cases)}] {case}, threads: {threads}, took {took:.0f} s")
    return {
        "threads": threads,
        "machine": machine(),
        "limits": reached,
        "skipped": skipped,
        "rows": rows,
    }


def time_case(case: Case, rounds: int, skipped: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of the contestants, whose results have been checked after they were timed."""
    random = np.random.default_rng(0)
    x = random.standard_normal((case.m, case.layer.k), np.float32)
    w = random.integers(-1, 2, (case.layer.k, case.layer.n), np.int8).astype(np.float32) / 64
    peers = enter_peers(case, x, w, skipped)
    ours = [
        OurProduct(case.layer, pair, grouping, x, lambda size: count_copies(case, size))
        for grouping, pair in SETTINGS
    ]
    contestants: list[Peer | OurProduct] = [*peers, *ours]
    seconds = take_turns(contestants, rounds)
    for peer in peers:
        check(peer, x, w)
    for product in ours:
        product.check()
    for contestant, times in zip(contestants, seconds, strict=True):
        yield describe(case, contestant, times, seconds[0])


def enter_peers(case: Case, x: np.ndarray, w: np.ndarray, skipped: list[str]) -> list[Peer]:
    """The baseline, then those that can take part; why others can't goes to `skipped`, once."""
    peers: list[Peer] = []
    for make in (BASELINE, *PEERS):
        try:
            peers.append(make(x, w, lambda size: count_copies(case, size)))
        except (ImportError, ValueError) as reason:
            if str(reason) not in skipped:
                skipped.append(str(reason))
                log(f"skipped: {reason}")
    return peers


def count_copies(case: Case, size: int) -> int:
    """Copies that exceed the last-level cache twice if the case is cold, or fill their memory."""
    share = MEMORY // (1 + len(PEERS) + len(SETTINGS))
    enough = 2 * last_level_cache() // size + 1
    return max(1, min(enough, share // size)) if case.cold else 1


def describe(
    case: Case, contestant: Peer | OurProduct, times: Sequence[float], baseline: Sequence[float]
) -> dict[str, Any]:
    typical, speed = spread(times), speeds(baseline, times)
    size = contestant.weight_bytes
    row = {
        "layer": case.layer.name,
        "k": case.layer.k,
        "n": case.layer.n,
        "m": case.m,
        "cold": case.cold,
        "contestant": contestant.name,
        "speed_over_float32": speed.median,
        "speed_quartiles": [speed.low, speed.high],
        "median_us": 1e6 * typical.median,
        "quartiles_us": [1e6 * typical.low, 1e6 * typical.high],
        "weight_bytes": size,
        "rotated_bytes": size * count_copies(case, size),
        "gigabytes_per_second": size / typical.median / 1e9,
        "gop_per_second": 2 * case.m * case.layer.k * case.layer.n / typical.median / 1e9,
    }
    if isinstance(contestant, OurProduct):
        pair = contestant.pair
        row |= {"pair": str(pair), "weight_bits": pair.weights, "act_bits": pair.activations}
        row |= {"grouping": contestant.grouping.name}
    return row


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
