"""Draws what rounding costs SmolLM2 against how fast it decodes.

    python -m benchmarks.quality_speed_plot RESULTS.json --out docs/quality-speed.svg

RESULTS.json is one of benchmarks.quality_speed.
"""

from __future__ import annotations

import argparse
import json
import pathlib

from .report import Row

LEAST = 1e-4
"""Nats a token; what is below is drawn there, as the axis is logarithmic."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=pathlib.Path, help="of benchmarks.quality_speed")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="an image")
    options = parser.parse_args()
    runs = json.loads(options.results.read_text())["runs"]
    draw([run["rows"] for run in runs], options.out)


def draw(runs: list[list[Row]], path: pathlib.Path) -> None:
    """KL divergence from the float model against decoding speed, a panel for each run."""
    from matplotlib.figure import Figure

    figure = Figure((5 * len(runs), 4.2), layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, rows in zip(panels, runs, strict=True):
        for style, label, theirs in (("o", "ours", False), ("s", "llama.cpp", True)):
            chosen = [row for row in rows if row["setting"].startswith("llama.cpp") is theirs]
            points = [(row["next_token_speed_over_float32"], row["kl"]) for row in chosen]
            axes.plot(
                *zip(*((x, max(y, LEAST)) for x, y in points), strict=True), style, label=label
            )
            for row, (x, y) in zip(chosen, points, strict=True):
                name = row["setting"].removeprefix("llama.cpp ")
                axes.annotate(name, (x, max(y, LEAST)), (4, 4), textcoords="offset points", size=7)
        axes.set_xlabel(f"decoding speed over float32, {rows[0]['threads']} cores")
        axes.set_yscale("log")
        axes.grid(True, which="both", alpha=0.3)
    panels[0].set_ylabel("KL divergence, nats a token")
    panels[0].legend(fontsize="small")
    figure.savefig(path)


if __name__ == "__main__":
    main()
