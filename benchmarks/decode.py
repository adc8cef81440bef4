"""Decoding speed of SmolLM2-135M, quantized settings against float32, token by token in turn.

    python -m benchmarks.decode --json benchmarks/results/decode-NAME.json

Each setting decodes the same prompt; the settings take turns for every token, so that a change in
the machine's speed meets all of them. Reported: the median time of a token, and the median over
tokens of the float32 time divided by the setting's time of the same turn.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import flax
import jax

import jax_anyprec as ap
from jax_anyprec import fetch, models

PROMPT = "Explain in a few sentences why the sky is blue."

SETTINGS: dict[str, models.Quantization | None] = {
    "float32": None,
    "W4A8 as in the file": models.Quantization(),
    "W4A16 as in the file": models.Quantization(activations=None),
    "W2A8 groups of 64": models.Quantization(weights=2, group_size=64),
    "W1A1 per channel": models.Quantization(weights=1, activations=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64, help="tokens that each setting decodes")
    parser.add_argument("--warmup", type=int, default=4, help="first tokens that are not counted")
    parser.add_argument("--json", type=pathlib.Path, help="write the raw figures to this file")
    options = parser.parse_args()
    path = fetch.locate("smollm2") or fetch.fetch("smollm2")
    loaded = {name: models.load_gguf(path, quantization=q) for name, q in SETTINGS.items()}
    seconds = time_in_turn(loaded, options.tokens, options.warmup)
    rows = summarize(loaded, seconds)
    print_table(rows)
    if options.json:
        write_report(options.json, rows, seconds)


def time_in_turn(
    loaded: dict[str, models.LoadedModel], tokens: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of each token of each setting, the first `warmup` left out."""
    streams = {name: start(entry, tokens + warmup + 1) for name, entry in loaded.items()}
    for stream in streams.values():
        next(stream)  # prefill, and with it the compilation of the step
    seconds: dict[str, list[float]] = {name: [] for name in loaded}
    for turn in range(tokens + warmup):
        for name, stream in streams.items():
            begin = time.perf_counter()
            next(stream)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def start(entry: models.LoadedModel, tokens: int) -> Iterator[int]:
    ids = entry.tokenizer.encode(PROMPT)
    return models.generate(entry.model, ids, max_tokens=tokens)


def summarize(
    loaded: dict[str, models.LoadedModel], seconds: dict[str, list[float]]
) -> list[dict[str, Any]]:
    baseline = seconds["float32"]
    rows = []
    for name, times in seconds.items():
        weights = models.weight_bytes(loaded[name].model)
        ratios = sorted(b / t for b, t in zip(baseline, times, strict=True))
        rows.append(
            {
                "setting": name,
                "speed_over_float32": statistics.median(ratios),
                "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
                "median_ms_per_token": 1e3 * statistics.median(times),
                "weight_megabytes": weights.total / 1e6,
                "bits_per_linear_weight": weights.bits_per_linear_weight,
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    print(
        "| setting | decoding speed over float32 (quartiles) | weights, MB | bits a linear weight |"
    )
    print("| --- | --- | --- | --- |")
    for row in rows:
        low, high = row["quartiles"]
        print(
            f"| {row['setting']} | {row['speed_over_float32']:.2f} ({low:.2f} to {high:.2f}) | "
            f"{row['weight_megabytes']:.0f} | {row['bits_per_linear_weight']:.2f} |"
        )


def write_report(path: pathlib.Path, rows: list[Any], seconds: dict[str, list[float]]) -> None:
    report = {
        "command": "python -m benchmarks.decode " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "rows": rows,
        "seconds": seconds,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """What a reader must know of the machine to judge the figures."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": ap.status()["cpu"].get("isa"),
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
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
