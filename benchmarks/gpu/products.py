"""Single layers on a GPU: every precision against XLA's own dots of bf16, int8 and fp8.

    python -m benchmarks.gpu.products --quick --peaks rates.json --rows products.jsonl

All contestants of one layer and one number of rows take turns, and a factor over bf16 is the median
over rounds of bf16's time divided by the contestant's of the same round. Ours take bfloat16
activations, and quantizing them counts. Weights are cold and results are checked before and after.
Rows are written as they are measured; `benchmarks.gpu.summary` makes tables of the file.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ..timing import speeds, spread
from . import contestants, timing
from .contestants import BASELINE, DOTS, Case, Contestant
from .rates import Peaks
from .roofline import floor
from .rows import about_run, log, write_rows
from .shapes import SELECTIONS, Selection

CACHE_BYTES = 128 * 2**20
"""A second-level cache larger than which no GPU has, for when no measured file says its size."""

Row = dict[str, Any]
Entry = tuple[str, Callable[[], Contestant]]


def main() -> None:
    options = parse_options()
    write_rows(options.rows, options.platform, functools.partial(run, options))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    for name in SELECTIONS:
        which.add_argument(f"--{name}", dest="selection", action="store_const", const=name)
    parser.set_defaults(selection="quick")
    parser.add_argument("--platform", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--families", action="store_true", help="also time planes and codes by name"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--peaks", type=pathlib.Path, help="the file of benchmarks.gpu.rates")
    parser.add_argument(
        "--rows", type=pathlib.Path, required=True, help="JSON lines are written here"
    )
    return parser.parse_args()


def run(options: argparse.Namespace, device: jax.Device) -> Iterator[Row]:
    """What the run is, then a row for each contestant of each case."""
    peaks, cache_bytes = None, CACHE_BYTES
    if options.peaks:
        peaks = Peaks.read(options.peaks)
        cache_bytes = json.loads(options.peaks.read_text())["l2_bytes"]
    yield about(options, device)
    selection = SELECTIONS[options.selection]
    for layer in selection.layers:
        for m in selection.rows:
            case = Case(layer, m, cache_bytes)
            begin = time.perf_counter()
            entries = list(choose(case, selection, options.platform, options.families))
            yield from (row | bounds(row, peaks) for row in race(case, entries, options.rounds))
            gc.collect()
            log(f"{case}: {time.perf_counter() - begin:.1f} s")


def about(options: argparse.Namespace, device: jax.Device) -> Row:
    return about_run("benchmarks.gpu.products", options.platform, device) | {
        "selection": options.selection,
        "rounds": options.rounds,
        "sample_seconds": timing.SAMPLE_SECONDS,
    }


def choose(case: Case, selection: Selection, platform: str, families: bool) -> Iterator[Entry]:
    """Names and makers of the contestants, the baseline first."""
    for kind in DOTS:
        yield kind.name, functools.partial(contestants.dot, case, kind)
    quantized: dict[tuple[int, int | None], None] = {}
    for precision in selection.precisions:
        implementations = [platform]
        if precision.pair.activations is not None:
            quantized[precision.pair.activations, precision.group_size] = None
            if families and precision.group_size is None:  # there is one family for groups
                implementations += [f"{platform}_planes", f"{platform}_codes"]
        for name in implementations:
            make = functools.partial(contestants.ours, case, precision, name)
            yield f"{precision}, {name}", make
    for bits, group_size in quantized:
        make = functools.partial(contestants.prologue, case, bits, group_size, platform)
        yield f"quantize A{bits}", make


def race(case: Case, entries: list[Entry], rounds: int) -> Iterator[Row]:
    """A row for each; of one that can't take part or is wrong, what it said.

    Without the baseline the others don't run.
    """
    entered: list[Contestant] = []
    for name, make in entries:
        try:
            contestant = make()
            contestant.check(contestant.program.run(1))
            entered.append(contestant)
        except Exception as error:  # whatever it is, the others go on
            said = f"{type(error).__name__}: {error}"
            log(f"{case}, {name}: {said}")
            yield describe_case(case) | {"contestant": name, "error": said}
            if name == BASELINE:
                return
    seconds = timing.take_turns([contestant.program for contestant in entered], rounds)
    for contestant, times in zip(entered, seconds, strict=True):
        row = describe(case, contestant, times, seconds[0])
        try:
            contestant.check(contestant.program.run(1))
        except AssertionError as error:
            row["error"] = f"wrong after it was timed: {error}"
        yield row


def describe_case(case: Case) -> Row:
    return {"layer": case.layer.name, "m": case.m, "n": case.layer.n, "k": case.layer.k}


def describe(case: Case, contestant: Contestant, times: list[float], baseline: list[float]) -> Row:
    typical, speed = spread(times), speeds(baseline, times)
    copies = len(contestant.program.sets)
    row = describe_case(case) | contestant.about
    row |= {
        "us": 1e6 * typical.median,
        "us_quartiles": [1e6 * typical.low, 1e6 * typical.high],
        "gigabytes_per_second": contestant.moved / typical.median / 1e9,
        "moved_bytes": contestant.moved,
        "copies": copies,
        "cold": (copies - 1) * contestant.moved >= 2 * case.cache_bytes,
        "calls": contestant.calls,
        "kernel": contestant.kernel,
    }
    if contestant.weight_bytes:  # it is a product
        row |= {
            "factor_over_bf16": speed.median,
            "tops": 2 * case.m * case.layer.n * case.layer.k / typical.median / 1e12,
            "weight_gigabytes_per_second": contestant.weight_bytes / typical.median / 1e9,
        }
    return row


def bounds(row: Row, peaks: Peaks | None) -> Row:
    """The least time that the chip allows, if it is known, and the share of it in the row's."""
    if peaks is None or "us" not in row:
        return {}
    if row["ways"] and peaks.operations.keys().isdisjoint(row["ways"]):
        return {}  # nobody measured the unit of 8-bit floats
    once = 2 * row["m"] * row["n"] * row["k"]
    operations = {unit: factor * once for unit, factor in row["ways"].items()}
    least = floor(peaks, operations, row["moved_bytes"])
    return {
        "floor_us": 1e6 * least.seconds,
        "floor_limit": least.limit,
        "roofline_share": 1e6 * least.seconds / row["us"],
    }


if __name__ == "__main__":
    main()
