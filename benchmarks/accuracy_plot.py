"""Draws what rounding costs SmolLM2 against the bits of a weight.

python -m benchmarks.accuracy_plot benchmarks/results/accuracy.json --out docs/accuracy.svg
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable

from .report import Row

LEAST = 1e-5
"""Nats a token; what loses less, weights as in the file, is left out of the logarithmic axis."""

LINES: dict[str, tuple[str, Callable[[Row], bool]]] = {
    "calibrated, bits by layer": ("o-", lambda row: row["part"] == "budgets"),
    "ggml's types, importance matrix": ("s", lambda row: _kind(row) == ["importance matrix"]),
    "ggml's types": ("x", lambda row: _kind(row) == []),
    "ggml's types as if blocks joined rows": (
        "^",
        lambda row: _kind(row) == ["joined", "importance matrix"],
    ),
}


def _kind(row: Row) -> list[str] | None:
    """What the name of a type of ggml's adds to it; None for others."""
    return row["setting"].split(", ")[1:] if row["part"] == "peers" else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=pathlib.Path, help="of benchmarks.accuracy")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="an image")
    options = parser.parse_args()
    draw(json.loads(options.results.read_text())["rows"], options.out)


def draw(rows: list[Row], path: pathlib.Path) -> None:
    """KL divergence from the float model against true bits of a weight of linear layers."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4.2), layout="constrained")
    axes = figure.subplots()
    for label, (style, belongs) in LINES.items():
        seen = [row for row in rows if belongs(row) and row["kl"] > LEAST]
        points = sorted((row["bits"], row["kl"]) for row in seen)
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set_xlabel("bits of a weight: planes, scales and offsets")
    axes.set_ylabel("KL divergence, nats a token")
    axes.set_yscale("log")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)


if __name__ == "__main__":
    main()
