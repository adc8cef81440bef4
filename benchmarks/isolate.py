"""Runs a function in a fresh process that is held to a number of cores."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def on_cores(count: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of ``function(*arguments)`` on `count` cores; its module is imported there.

    Libraries count cores and read their environment when they load, so both are set before the
    process starts, and it inherits them.
    """
    spawn = multiprocessing.get_context("spawn")
    with (
        _affinity(choose_cores(count)),
        _environment(count),
        ProcessPoolExecutor(1, mp_context=spawn) as pool,
    ):
        return pool.submit(function, *arguments).result()


def choose_cores(count: int) -> list[int]:
    """The first cores that this process may use, hardware threads of a taken core last."""
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(allowed):
        raise ValueError(f"threads must be from 1 to {len(allowed)} on this machine, got {count}")
    taken: dict[str, int] = {}

    def order(core: int) -> tuple[int, int]:
        path = Path(SIBLINGS.format(core))
        siblings = path.read_text() if path.exists() else str(core)
        taken[siblings] = taken.get(siblings, 0) + 1
        return taken[siblings], core

    return sorted(allowed, key=order)[:count]


def thread_counts(text: str) -> list[int]:
    """A command line's "1,2" as numbers."""
    try:
        return [int(count) for count in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers such as 1,2 expected, got {text!r}") from None


@contextlib.contextmanager
def _affinity(cores: list[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _environment(threads: int) -> Iterator[None]:
    """Threads for each library; idle ones stop spinning soon, so as not to slow who comes next."""
    before = dict(os.environ)
    os.environ.pop("OPENBLAS_CORETYPE", None)  # the processor's own kernels
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": "10000",
        "OPENBLAS_THREAD_TIMEOUT": "20",  # 2**20 cycles
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
