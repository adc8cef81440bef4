"""Where the time of a decoding step goes: our products, XLA's own work, and handing both over.

    python -m benchmarks.step --threads 1,2 --json benchmarks/results/step-NAME.json

SmolLM2-135M with the weights of its file and 8-bit activations decodes on so many cores, first
untouched, then under jax.profiler.trace, whose events say how long each operation ran. Dispatch is
what they leave of a traced step, which takes a little longer than an untouched one.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax

from jax_anyprec import fetch, models

from .isolate import on_cores, thread_counts
from .machine import machine
from .model import PROMPT
from .report import table, write_json

WARM_UP, STEPS = 8, 50
"""Steps before and of each measurement."""
PRODUCTS, ATTENTION, OTHER = "products", "attention's products", "norms, rotary, cache, softmax"
DISPATCH = "dispatch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=thread_counts, default=[1], help="such as 1,2")
    parser.add_argument("--json", type=pathlib.Path, help="write all figures to this file")
    options = parser.parse_args()
    path = fetch.fetch("smollm2")
    runs = [on_cores(n, run_steps, path) for n in options.threads]
    header = ["threads", "part of a step", "calls", "us", "share"]
    rows = [row for run in runs for row in part_rows(run)]
    print(table(header, rows))
    if options.json:
        write_json(options.json, "benchmarks.step", {"runs": runs})


def part_rows(run: dict[str, Any]) -> Iterator[list[Any]]:
    for part, figures in run["parts"].items():
        us, share = f"{figures['us']:.0f}", f"{figures['us'] / run['step_us']:.0%}"
        yield [run["machine"]["cores"], part, figures["calls"], us, share]


def run_steps(path: pathlib.Path) -> dict[str, Any]:
    """Microseconds of a step, and of its parts."""
    loaded = models.load_gguf(path)
    prompt = loaded.tokenizer.encode(PROMPT)
    tokens = models.generate(loaded.model, prompt, max_tokens=WARM_UP + 2 * STEPS)
    step_seconds(tokens, WARM_UP)  # compiles
    untouched = step_seconds(tokens, STEPS)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            seconds = step_seconds(tokens, STEPS)
        parts = by_part(folder, STEPS)
    traced = 1e6 * sum(seconds) / STEPS
    parts[DISPATCH] = {"calls": 1, "us": traced - sum(part["us"] for part in parts.values())}
    return {
        "machine": machine(),
        "untouched_step_us": 1e6 * statistics.median(untouched),
        "step_us": traced,
        "weight_arrays": len(jax.tree.leaves(loaded.model)),
        "parts": parts,
    }


def step_seconds(tokens: Iterator[int], count: int) -> list[float]:
    """How long each of the next `count` tokens takes."""
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        next(tokens)
        seconds.append(time.perf_counter() - begin)
    return seconds


def by_part(folder: str, steps: int) -> dict[str, dict[str, float]]:
    """Calls and microseconds a step of each part, from a trace of `steps` steps."""
    (file,) = pathlib.Path(folder).rglob("perfetto_trace.json.gz")
    trace = json.loads(gzip.decompress(file.read_bytes()))
    events = trace["traceEvents"] if isinstance(trace, dict) else trace
    calls: dict[str, int] = collections.Counter()
    spent: dict[str, float] = collections.Counter()
    for event in events:
        part = part_of(event.get("name", ""))
        if event.get("ph") == "X" and part:
            calls[part] += 1
            spent[part] += event["dur"]
    if not calls[PRODUCTS] or not calls[OTHER]:
        raise RuntimeError("this version of XLA names its events otherwise: see part_of")
    # All operations of a step run inside one event; what is no product is XLA's own.
    spent[OTHER] -= spent[PRODUCTS] + spent[ATTENTION]
    return {
        part: {"calls": round(calls[part] / steps), "us": spent[part] / steps}
        for part in (PRODUCTS, ATTENTION, OTHER)
    }


def part_of(name: str) -> str | None:
    """The part that an event of the trace counts to; that of all operations counts to OTHER."""
    if name == "ThunkExecutor::Execute":
        return OTHER
    if name.startswith("ffi_call"):
        return PRODUCTS
    return ATTENTION if name.startswith(("ynn_fusion", "dot")) else None


if __name__ == "__main__":
    main()
