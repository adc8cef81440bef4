"""What a reader must know of the machine to judge figures: its parts, and its measured limits."""

from __future__ import annotations

import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

import jax_anyprec as ap

CPUS = pathlib.Path("/sys/devices/system/cpu")
REPEATS = 7
"""Times that a limit is measured; the best counts."""


def machine() -> dict[str, Any]:
    """The processor as this process may use it, and the versions that it runs."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": ap.status()["cpu"].get("isa"),
        "last_level_cache_bytes": last_level_cache(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
    }


def processor() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def commit() -> str:
    """The commit of this folder, dirty if other files than results differ; empty without git."""
    try:
        found, changed = (
            subprocess.run(["git", *command], capture_output=True, text=True, check=False)
            for command in (
                ["describe", "--always"],
                ["status", "--porcelain", "-uno", ".", ":!benchmarks/results"],
            )
        )
    except FileNotFoundError:
        return ""
    return found.stdout.strip() + "-dirty" * bool(changed.stdout)


def last_level_cache() -> int:
    """Bytes of the largest cache that the first core reads through."""
    sizes = [path.read_text().strip() for path in CPUS.glob("cpu0/cache/index*/size")]
    kibibytes = [int(size.removesuffix("K")) for size in sizes if size.endswith("K")]
    if kibibytes:
        return 1024 * max(kibibytes)
    levels = ("SC_LEVEL2_CACHE_SIZE", "SC_LEVEL3_CACHE_SIZE", "SC_LEVEL4_CACHE_SIZE")
    return max(os.sysconf(level) for level in levels)


def limits() -> dict[str, float]:
    """What the cores of this process reach at most, measured."""
    return {"read_bytes_per_second": read_bandwidth(), "float32_flop_per_second": peak_float32()}


def read_bandwidth() -> float:
    """Bytes a second that all cores together read from memory: the maximum of 1 GiB of floats."""
    cores = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(2**28, np.float32), cores)
    with ThreadPoolExecutor(cores) as pool:  # NumPy reduces without the interpreter lock
        return 2**30 / best_time(lambda: list(pool.map(np.max, parts)))


def peak_float32() -> float:
    """Operations a second of XLA's float32 product of two matrices of 2048 x 2048."""
    size = 2048
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / best_time(lambda: product(x, x).block_until_ready())


def best_time(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of several runs."""
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
