"""Loading checkpoints: bytes read, memory and seconds, each way in a process of its own.

    python -m benchmarks.checkpoint --json FILE

A model of packed layers is saved in planes and prepared. Every way of loading it runs in fresh
processes on one core, with the file in the system's cache, so nothing waits for storage and the
process's seconds are what counts, whatever else runs: until all weights are there, and until each
was used in one product, compilation left out.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_anyprec as ap

from .isolate import on_cores
from .machine import machine
from .report import table, write_json

SIZE, GROUP, BITS = 4096, 32, 4
PLANES, PREPARED = "planes.safetensors", "prepared.safetensors"

Tree = dict[str, Any]
OnRead = Callable[[str, int], None]
Prepare = Callable[[ap.QuantizedTensor], ap.QuantizedTensor]


def planes(folder: pathlib.Path, on_read: OnRead, prepare: Prepare) -> Tree:
    return ap.load(folder / PLANES, on_read=on_read)


def two_bits(folder: pathlib.Path, on_read: OnRead, prepare: Prepare) -> Tree:
    return ap.load(folder / PLANES, bits=2, on_read=on_read)


def planes_then_prepared(folder: pathlib.Path, on_read: OnRead, prepare: Prepare) -> Tree:
    tree = ap.load(folder / PLANES, on_read=on_read)
    return {name: prepare(tree.pop(name)) for name in list(tree)}


def prepared_while_loading(folder: pathlib.Path, on_read: OnRead, prepare: Prepare) -> Tree:
    like = jax.eval_shape(ap.QuantizedTensor.prepare, abstract(BITS))
    names = ap.load(folder / PLANES, memory_map=True)
    return ap.load_into(dict.fromkeys(names, like), folder / PLANES, on_read=on_read)


def prepared(folder: pathlib.Path, on_read: OnRead, prepare: Prepare) -> Tree:
    return ap.load(folder / PREPARED, on_read=on_read)


def mapped(folder: pathlib.Path, on_read: OnRead, prepare: Prepare) -> Tree:
    return ap.load(folder / PREPARED, memory_map=True, on_read=on_read)


def into_arena(folder: pathlib.Path, on_read: OnRead, prepare: Prepare) -> Tree:
    return ap.Arena().place(mapped(folder, on_read, prepare))


WAYS: dict[str, Callable[[pathlib.Path, OnRead, Prepare], Tree]] = {
    "planes": planes,
    "planes, 2 bits of 4": two_bits,
    "planes, then prepared": planes_then_prepared,
    "planes, prepared while loading": prepared_while_loading,
    "prepared": prepared,
    "prepared, memory-mapped": mapped,
    "prepared, mapped and placed in an arena": into_arena,
}


def write(folder: pathlib.Path, layers: int) -> None:
    """The same model in planes and prepared; codes and scales are random."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**BITS, (SIZE, SIZE), np.uint8)
    scales = rng.uniform(0.01, 0.02, (SIZE, SIZE // GROUP)).astype(np.float16)
    w = ap.QuantizedTensor.from_codes(codes, scales, bits=BITS)
    tree = {f"layer{i:02}": w.prepare() for i in range(layers)}
    ap.save(folder / PLANES, tree)
    ap.save(folder / PREPARED, tree, keep_prepared=True)


def measure(way: str, folder: str) -> dict[str, Any]:
    """What one way takes, in this process."""
    x = jnp.ones((1, SIZE))
    product = jax.jit(lambda x, w: ap.matmul(x, w, act_bits=8))
    forms: list[ap.QuantizedTensor] = list(map(abstract, (BITS, 2)))
    prepare = jax.jit(ap.QuantizedTensor.prepare).lower(forms[0]).compile()
    forms.append(jax.eval_shape(ap.QuantizedTensor.prepare, forms[0]))
    products = {(w.bits, w.prepared): product.lower(x, w).compile() for w in forms}
    counts: dict[str, int] = {}
    importlib.import_module("jax_anyprec.checkpoint")  # on first use, with Flax
    with PeakMemory() as memory:
        begin = time.process_time()
        tree = WAYS[way](pathlib.Path(folder), counts.__setitem__, prepare)
        jax.block_until_ready(tree)
        ready = time.process_time() - begin
        for w in tree.values():
            products[w.bits, w.prepared](x, w).block_until_ready()
        used = time.process_time() - begin
    return {
        "bytes_read": sum(counts.values()),
        "weights_bytes": sum(w.nbytes for w in tree.values()),
        "peak_memory_bytes": memory.own,
        "peak_with_mapped_bytes": memory.resident,
        "cpu_seconds_ready": ready,
        "cpu_seconds_used": used,
    }


def abstract(bits: int) -> ap.QuantizedTensor:
    """A layer as it is loaded at so many bits, without its data."""
    scales = jnp.float16 if bits == BITS else jnp.float32
    return ap.QuantizedTensor(
        jax.ShapeDtypeStruct((bits, SIZE, SIZE // 32), jnp.uint32),
        jax.ShapeDtypeStruct((SIZE, SIZE // GROUP), scales),
        None,
        SIZE,
        GROUP,
    )


class PeakMemory:
    """The largest growth of memory while this is entered, sampled each millisecond.

    Attributes:
      own: bytes of the process itself.
      resident: those and the pages of mapped files, which the system can take back.
    """

    def __enter__(self) -> PeakMemory:
        self.own = self.resident = 0
        self._before = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            own, resident = (
                now - then for now, then in zip(self._now(), self._before, strict=True)
            )
            self.own, self.resident = max(self.own, own), max(self.resident, resident)

    def _now(self) -> tuple[int, int]:
        resident, shared = map(int, pathlib.Path("/proc/self/statm").read_text().split()[1:3])
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE"), resident * os.sysconf(
            "SC_PAGE_SIZE"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32, help=f"of {SIZE} x {SIZE}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        write(folder, arguments.layers)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        rows = {way: medians(way, made, arguments.repeats) for way in WAYS}
    if arguments.json:
        content = {"machine": machine(), "layers": arguments.layers, "repeats": arguments.repeats}
        write_json(
            arguments.json, "benchmarks.checkpoint", content | {"file_bytes": sizes, "ways": rows}
        )
    print(f"files, MB: {', '.join(f'{name} {size / 1e6:.1f}' for name, size in sizes.items())}\n")
    cells = ([way, *(f"{row[key] / unit:.{digits}f}" for key, unit, digits in COLUMNS.values())]
             for way, row in rows.items())  # fmt: skip
    print(table(["loaded", *COLUMNS], cells))


def medians(way: str, folder: str, repeats: int) -> dict[str, float]:
    runs = [on_cores(1, measure, way, folder) for _ in range(repeats)]
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


COLUMNS = {
    "bytes read, MB": ("bytes_read", 1e6, 1),
    "weights, MB": ("weights_bytes", 1e6, 1),
    "peak memory, MB": ("peak_memory_bytes", 1e6, 1),
    "with mapped pages, MB": ("peak_with_mapped_bytes", 1e6, 1),
    "ready, CPU s": ("cpu_seconds_ready", 1, 3),
    "used once, CPU s": ("cpu_seconds_used", 1, 3),
}

if __name__ == "__main__":
    main()
