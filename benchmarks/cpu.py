"""Single layers on the CPU: every precision, and other libraries, against XLA's float32.

    python -m benchmarks.cpu --json benchmarks/results/cpu-NAME.json --plot cpu-NAME.svg

Each number of threads gets a process of its own, held to so many cores. There all contestants take
turns on one layer, and a speed is the median over rounds of XLA's float32 time divided by the
contestant's time of the same round. Up to 16 products run in one call, one after another, so times
hold little of what a call costs; those of PyTorch and NumPy, which take one product a call, hold it
all. Warm weights are the same each time; cold ones are copies in turn that exceed the last-level
cache twice. All results are checked on the timed data. Ours take float activations and quantize
them on line, which counts; so do ggml and PyTorch's int8.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from . import plot
from .isolate import on_cores, thread_counts
from .report import Row, matrix, table, write_json
from .sweep import run_sweep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=thread_counts, default=[1], help="such as 1,2")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each contestant")
    parser.add_argument("--quick", action="store_true", help="two layers only")
    parser.add_argument("--json", type=pathlib.Path, help="write all figures to this file")
    parser.add_argument("--plot", type=pathlib.Path, help="draw speed over bits into this file")
    options = parser.parse_args()
    runs = [on_cores(n, run_sweep, options.quick, options.rounds) for n in options.threads]
    rows = [row for run in runs for row in run["rows"]]
    for text in (limits_table(runs), our_table(rows), peer_table(rows), detail_table(rows)):
        print(text, end="\n\n")
    if options.json:
        write_json(options.json, "benchmarks.cpu", {"rounds": options.rounds, "runs": runs})
    if options.plot:
        plot.draw(runs, options.plot)


CASE = {
    "layer": lambda row: row["layer"],
    "K x N": lambda row: f"{row['k']} x {row['n']}",
    "M": lambda row: row["m"],
    "weights": lambda row: "cold" if row["cold"] else "warm",
    "threads": lambda row: row["threads"],
}
GROUPING = {"scale for": lambda row: row["grouping"]}


def limits_table(runs: list[dict[str, Any]]) -> str:
    header = ["processor", "threads", "read from memory, GB/s", "XLA float32 2048 x 2048, GFLOP/s"]
    return table(
        header,
        (
            [
                run["machine"]["processor"],
                run["threads"],
                f"{run['limits']['read_bytes_per_second'] / 1e9:.1f}",
                f"{run['limits']['float32_flop_per_second'] / 1e9:.0f}",
            ]
            for run in runs
        ),
    )


def our_table(rows: list[Row]) -> str:
    """Speed over XLA's float32 of each pair of precisions."""
    return matrix(
        [row for row in rows if "pair" in row],
        CASE | GROUPING,
        lambda row: row["pair"],
        lambda row: f"{row['speed_over_float32']:.2f}",
    )


def peer_table(rows: list[Row]) -> str:
    """Speed over XLA's float32 of others, and its time."""
    return matrix(
        [row for row in rows if "pair" not in row],
        CASE,
        lambda row: row["contestant"],
        lambda row: f"{row['speed_over_float32']:.2f} ({row['median_us']:.0f} us)",
    )


def detail_table(rows: list[Row]) -> str:
    """Times of ours, and how near they come to the machine's limits."""
    header = [*CASE, *GROUPING, "pair", "speed (quartiles)", "us", "weights, bytes", "GB/s"]
    header += ["share of memory's", "GOP/s"]
    return table(header, (detail(row) for row in rows if "pair" in row))


def detail(row: Row) -> list[Any]:
    low, high = row["speed_quartiles"]
    return [
        *(label(row) for label in (CASE | GROUPING).values()),
        row["pair"],
        f"{row['speed_over_float32']:.2f} ({low:.2f} to {high:.2f})",
        f"{row['median_us']:.1f}",
        row["weight_bytes"],
        f"{row['gigabytes_per_second']:.1f}",
        f"{row['bandwidth_share']:.0%}",
        f"{row['gop_per_second']:.0f}",
    ]


if __name__ == "__main__":
    main()
