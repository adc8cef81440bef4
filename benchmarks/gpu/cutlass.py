"""Builds cutlass.cu for the GPU of this machine, runs it, and compares ours with it.

    pip download --no-deps nvidia-cutlass   # and unpack: only its headers are used
    python -m benchmarks.gpu.cutlass --include DIR --products products.jsonl

Layers and rows are those of a file that `benchmarks.gpu.products` wrote, of many rows: one
configuration of tiles says nothing about few.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile

from ..report import Row, table
from .machine import gpu
from .rates import compile_command

SOURCE = pathlib.Path(__file__).with_name("cutlass.cu")
LEAST_ROWS = 1024
OURS = ("W1A1", "W1A2", "W2A2")
"""What the paper compares with CUTLASS's int8 and int4, up to 2.4 times as fast."""
THEIRS = ("CUTLASS int8", "CUTLASS int4", "CUTLASS b1")

Shape = tuple[int, int, int]


def headers() -> pathlib.Path | None:
    """The include folder of an installed nvidia-cutlass."""
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or not spec.submodule_search_locations:
        return None
    return pathlib.Path(spec.submodule_search_locations[0], "source", "include")


def measure(shapes: list[Shape], include: pathlib.Path) -> list[Row]:
    """A row for each product; what was wrong is left out, after a word."""
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/cutlass"
        flags = ("--expt-relaxed-constexpr", f"-I{include}", "-o", program)
        subprocess.run(compile_command(SOURCE, gpu()["compute_cap"], *flags), check=True)
        sizes = (str(size) for shape in shapes for size in shape)
        run = subprocess.run([program, *sizes], stdout=subprocess.PIPE, text=True, check=False)
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    for row in rows:
        if not row["right"]:
            print(f"WRONG: {row}", file=sys.stderr)
    return [row for row in rows if row["right"]]


def shape(row: Row) -> Shape:
    return row["m"], row["n"], row["k"]


def compare(products: list[Row], theirs: list[Row]) -> str:
    """Times of CUTLASS, and how many times as fast as its int8 and int4 ours are."""
    times = {(shape(row), row["contestant"]): row["us"] for row in (*products, *theirs)}

    def factors(at: Shape, ours: str) -> str:
        return " / ".join(
            f"{times[at, other] / times[at, ours]:.2f}"
            if (at, other) in times and (at, ours) in times
            else "?"
            for other in THEIRS[:2]
        )

    header = ["M", "N", "K", *(f"{name}, us" for name in THEIRS)]
    header += [f"{name} over int8 / int4" for name in OURS]
    return table(
        header,
        (
            [
                *at,
                *(times.get((at, name), "") for name in THEIRS),
                *(factors(at, name) for name in OURS),
            ]
            for at in dict.fromkeys(map(shape, theirs))
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--include", type=pathlib.Path, default=headers(), help="CUTLASS's headers")
    parser.add_argument("--products", type=pathlib.Path, required=True, help="rows of ours")
    options = parser.parse_args()
    if options.include is None:
        sys.exit("CUTLASS's headers are needed: pip install nvidia-cutlass, or --include DIR")
    _, *rows = map(json.loads, options.products.read_text().splitlines())
    ours = [
        row
        for row in rows
        if row["m"] >= LEAST_ROWS and row["contestant"] in OURS and "error" not in row
        if row["implementation"] == "cuda"
    ]
    print(compare(ours, measure(list(dict.fromkeys(map(shape, ours))), options.include)))


if __name__ == "__main__":
    main()
