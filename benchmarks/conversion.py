"""Memory that converting a model takes: the most resident, against the model's own size.

    python -m benchmarks.conversion [--json FILE]

Each way runs in three processes of its own, of which the medians count. Resident memory is read
every 2 ms. Before that one layer is converted aside, so that compiled code counts as there already,
and what the allocator keeps of freed memory is given back (glibc), so that only the model counts.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

LAYERS, WIDTH, MIB, RUNS = 16, 2048, 2**20, 3
WAYS = ("nnx", "linen, donated", "linen")


def resident() -> int:
    """Bytes of this process that are in memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def settled() -> int:
    """`resident`, once freed memory has gone back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident()


class Peak:
    """The largest resident memory while a block runs."""

    def __enter__(self) -> Peak:
        self.bytes, self._running = resident(), True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._running:
            self.bytes = max(self.bytes, resident())
            time.sleep(0.002)

    def __exit__(self, *_: Any) -> None:
        self._running = False
        self._thread.join()


def convert(way: str, layers: int) -> tuple[int, int]:
    """Bytes above what there was before the model: once it is made, and the most from then on."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn
    from flax import nnx

    import jax_anyprec as ap

    rules = ap.Quantization(weights=4, activations=8, group_size=128)
    before = settled()
    model: Any
    if way == "nnx":
        model = nnx.Sequential(*[nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(i)) for i in range(layers)])
        jax.block_until_ready(nnx.state(model))
        size = settled() - before
        with Peak() as peak:
            ap.quantize_model(model, rules)
        return size, peak.bytes - before
    model = nn.Sequential([nn.Dense(WIDTH) for _ in range(layers)])
    x = jnp.ones((1, WIDTH))
    variables = jax.block_until_ready(model.init(jax.random.key(0), x))
    size = settled() - before
    with Peak() as peak:
        converted = ap.quantize_model(model, rules, variables, x, donate="donated" in way)
        jax.block_until_ready(converted[1])
    return size, peak.bytes - before


def main() -> None:
    """Run all ways, and print what each took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        convert(options.way, 1)
        print(json.dumps(convert(options.way, LAYERS)))
        return
    rows = []
    for way in WAYS:
        runs = [_in_process(way) for _ in range(RUNS)]
        size, peak = (statistics.median(values) for values in zip(*runs, strict=True))
        rows.append({"way": way, "model_mib": size, "peak_mib": peak, "runs_mib": runs})
        print(f"{way:16} model {size:6.0f} MiB, while converting at most {peak:6.0f} MiB")
    if options.json:
        options.json.write_text(
            json.dumps({"layers": LAYERS, "width": WIDTH, "rows": rows}, indent=1)
        )


def _in_process(way: str) -> list[float]:
    """What `convert` gives in a process of its own, in MiB."""
    command = [sys.executable, "-m", "benchmarks.conversion", "--way", way]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [value / MIB for value in json.loads(out.splitlines()[-1])]


if __name__ == "__main__":
    main()
