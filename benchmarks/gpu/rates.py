"""Builds rates.cu for the GPU of this machine, runs it, and shows what it found.

    python -m benchmarks.gpu.rates --json FILE

`Peaks` reads such a file: the fastest that the chip was seen to do, which rooflines are made of.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

from ..report import table
from .machine import gpu, provenance

SOURCE = pathlib.Path(__file__).with_name("rates.cu")


class Peaks(NamedTuple):
    """Operations a second of each unit ("b1", "int4", "int8", "bf16"), and bytes a second."""

    operations: dict[str, float]
    memory: float

    @classmethod
    def read(cls, path: pathlib.Path) -> Peaks:
        """Of a file that this program wrote; rates with wrong sums don't count."""
        report = json.loads(path.read_text())
        operations: dict[str, float] = {}
        for row in report["rates"]:
            if row["right"] and row["unit"] != "scalar":
                rate = 1e12 * row["tops"]
                operations[row["unit"]] = max(rate, operations.get(row["unit"], 0.0))
        memory = [row for row in report["bandwidths"] if "cache" not in row["path"]]
        return cls(operations, 1e9 * max(row["gigabytes_per_second"] for row in memory))


def compile_command(source: pathlib.Path, capability: str, *arguments: str) -> list[str]:
    """The nvcc command for one compute capability: "9.0" is 90a, because wgmma needs the a."""
    arch = capability.replace(".", "") + ("a" if capability == "9.0" else "")
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    return ["nvcc", "-O3", "-std=c++17", target, str(source), *arguments]


def measure() -> tuple[dict[str, Any], bool]:
    """What rates.cu reports on this machine's first GPU, and whether it was right to the end."""
    about = gpu()
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/rates"
        command = compile_command(SOURCE, about["compute_cap"], "-o", program)
        subprocess.run(command, check=True)
        run = subprocess.run([program], stdout=subprocess.PIPE, text=True, check=False)
    return {"gpu": about} | parse(run.stdout), run.returncode == 0


def parse(lines: str) -> dict[str, Any]:
    """The program's output as one report: about the device, "rates" and "bandwidths"."""
    rows = [json.loads(line) for line in lines.splitlines()]
    about: dict[str, Any] = next((row for row in rows if "device" in row), {})
    rates = [row for row in rows if "instruction" in row]
    return about | {"rates": rates, "bandwidths": [row for row in rows if "path" in row]}


def rate_table(report: dict[str, Any]) -> str:
    header = ["instruction", "operands", "warps an SM", "TOPS", "a clock and SM", "SM clock, MHz"]
    return table(
        [*header, "sums"],
        (
            [
                row["instruction"],
                row["operands"],
                row["warps_per_sm"],
                f"{row['tops']:.4g}",
                f"{row['ops_per_clock_per_sm']:.0f}",
                f"{row['sm_mhz']:.0f}",
                "right" if row["right"] else "WRONG",
            ]
            for row in report["rates"]
        ),
    )


def bandwidth_table(report: dict[str, Any]) -> str:
    rows = report["bandwidths"]
    cells = ([row["path"], f"{row['gigabytes_per_second']:.0f}"] for row in rows)
    return table(["memory", "GB/s"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write all figures to this file")
    options = parser.parse_args()
    try:
        report, right = measure()
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(f"rates need nvcc, and a GPU that nvidia-smi finds: {error}")
    if not report["bandwidths"]:
        sys.exit("rates.cu stopped before it measured anything")
    if options.json:
        report = provenance("benchmarks.gpu.rates") | report
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(rate_table(report), bandwidth_table(report), sep="\n\n")
    if not right:
        sys.exit("rates.cu stopped early, or some sums were wrong and their rates don't count")


if __name__ == "__main__":
    main()
