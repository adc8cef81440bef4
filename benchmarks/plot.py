"""Draws speed over XLA's float32 against the bits of a weight."""

from __future__ import annotations

import pathlib
from typing import Any

from tests.layers import SQUARE

from .report import Row

PANELS = (
    ("M = 1, weights in cache", 1, False),
    ("M = 1, weights from memory", 1, True),
    ("M = 512", 512, False),
)
LINES = (
    ("8-bit activations", "o-", lambda row: row["act_bits"] == 8),
    ("as many bits in activations", "s--", lambda row: row["act_bits"] == row["weight_bits"]),
    ("bfloat16 activations", "^", lambda row: row["act_bits"] is None),
)
BITS = (1, 2, 4, 8)


def draw(runs: list[dict[str, Any]], path: pathlib.Path) -> None:
    """A row of panels for each number of threads: the square layer, a scale for each channel."""
    from matplotlib.figure import Figure

    figure = Figure((12, 3.6 * len(runs)), layout="constrained")
    grid = figure.subplots(len(runs), len(PANELS), squeeze=False)
    for axes_of_run, run in zip(grid, runs, strict=True):
        for axes, (title, m, cold) in zip(axes_of_run, PANELS, strict=True):
            chosen = [row for row in run["rows"] if belongs(row, m, cold)]
            fill(axes, chosen)
            if m == 1:
                draw_limit(axes, chosen, run["limits"]["read_bytes_per_second"])
            axes.set_title(f"{title}, threads: {run['threads']}")
            axes.set_xlabel("bits of a weight")
            axes.set_xscale("log", base=2)
            axes.set_xticks(BITS, map(str, BITS))
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(True, which="both", alpha=0.3)
        axes_of_run[0].set_ylabel(f"speed over XLA float32\n{SQUARE}")
        axes_of_run[0].legend(fontsize="small", loc="lower left")
    figure.savefig(path)


def belongs(row: Row, m: int, cold: bool) -> bool:
    grouping = row.get("grouping", "channel")  # peers have none
    return (row["layer"], row["m"], row["cold"], grouping) == (SQUARE.name, m, cold, "channel")


def fill(axes: Any, rows: list[Row]) -> None:
    for label, style, chosen in LINES:
        points = sorted(
            (row["weight_bits"], row["speed_over_float32"])
            for row in rows
            if "pair" in row and chosen(row)
        )
        axes.plot(*zip(*points, strict=True), style, label=label)
    axes.axhline(1, color="black", linewidth=0.8)


def draw_limit(axes: Any, rows: list[Row], bandwidth: float) -> None:
    """The speed at which weights alone, without scales, come from memory."""
    seconds = rows[0]["median_us"] / 1e6  # the baseline comes first
    speeds = [seconds * bandwidth / (SQUARE.k * SQUARE.n * bits / 8) for bits in BITS]
    axes.plot(BITS, speeds, ":", color="gray", label="memory's bandwidth")
