"""Rows of figures in a file, a line of JSON each: written as they are measured, and read again."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Iterable

import jax

import jax_anyprec as ap

from ..report import Row
from .machine import gpu, provenance


def write_rows(
    path: pathlib.Path, platform: str, run: Callable[[jax.Device], Iterable[Row]]
) -> None:
    """Write what `run` yields on the first device of a platform; exit if a row has an "error"."""
    try:
        device = jax.devices(platform)[0]
    except RuntimeError as error:
        sys.exit(f"there is no device to measure: {error}")
    failed = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with jax.default_device(device), path.open("w") as file:
        for row in run(device):
            file.write(json.dumps(row) + "\n")
            file.flush()
            failed += "error" in row
    if failed:
        sys.exit(f"{failed} rows have errors, see {path}")


def about_run(module: str, platform: str, device: jax.Device) -> Row:
    """The first row of a file: how it came about, and on what."""
    return provenance(module) | {
        "platform": platform,
        "device": device.device_kind,
        "gpu": gpu() if platform == "cuda" else None,
        "jax": jax.__version__,
        "status": ap.status()[platform],
    }


def print_summary(
    description: str, program: str, summarize: Callable[[Iterable[str]], str]
) -> None:
    """The command that prints what `summarize` makes of a file's lines."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("rows", type=pathlib.Path, help=f"the file that {program} wrote")
    lines = parser.parse_args().rows.read_text().splitlines(keepends=True)
    print(summarize(line for line in lines if line.endswith("\n")))  # a killed run's last may not


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
