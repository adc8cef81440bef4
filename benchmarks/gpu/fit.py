"""What the times of alternatives say about the choices and the constants of csrc/cuda/plan.cc."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from ..report import Row, table

MANY_ROWS = 1024
"""From so many rows on tiles are compared: then blocks come in many waves over the chip."""


def report(rows: Sequence[Row]) -> dict[str, Any]:
    """All figures: choices with their losses, and constants that fit best."""
    return {
        "choices": choices(rows),
        "max_plane_products": max_plane_products(rows),
        "tile_efficiencies": tile_efficiencies(rows),
        "rows": rows,
    }


def problems(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows with a time, by the problem that they solve."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "us" in row and "error" not in row:
            key = tuple(row[name] for name in ("precision", "m", "n", "k"))
            found.setdefault(key, []).append(row)
    return list(found.values())


def fastest(rows: Iterable[Row], **wanted: Any) -> Row | None:
    """The fastest whose plan says so."""
    fitting = (row for row in rows if wanted.items() <= row["plan"].items())
    return min(fitting, key=lambda row: row["us"], default=None)


def choices(rows: Sequence[Row]) -> list[Row]:
    """Of each problem the fastest plan, the one that `plan()` chose, and what that loses."""
    found = []
    for group in problems(rows):
        best = min(group, key=lambda row: row["us"])
        chosen = next((row for row in group if row["chosen"]), None)
        line = {name: best[name] for name in ("precision", "m", "n", "k")}
        line |= {"best": best["plan"], "best_us": best["us"]}
        if chosen is not None:
            line |= {"chosen": chosen["plan"], "chosen_us": chosen["us"]}
            line["loss"] = chosen["us"] / best["us"] - 1
        found.append(line)
    return found


def max_plane_products(rows: Sequence[Row]) -> dict[str, float] | None:
    """kMaxPlaneProducts: up to how many one-bit products planes should be taken.

    That with the least mean loss, over problems for which there are both planes and codes in tiles
    for many rows; the smallest of those that do as well. None without such problems.
    """
    pairs: list[tuple[int, float]] = []
    for group in problems(rows):
        tiled = [row for row in group if row["plan"]["tile"] != "stream"]
        planes, codes = fastest(tiled, method="planes"), fastest(tiled, method="codes")
        if planes and codes and planes["m"] >= MANY_ROWS:
            products = planes["weight_bits"] * planes["act_bits"]
            pairs.append((products, math.log(planes["us"] / codes["us"])))
    if not pairs:
        return None

    def loss(most: int) -> float:
        return statistics.mean(
            max(0.0, ratio if products <= most else -ratio) for products, ratio in pairs
        )

    most = min(sorted({0, *(products for products, _ in pairs)}), key=loss)
    return {"products": most, "mean_loss": math.expm1(loss(most)), "problems": len(pairs)}


def tile_efficiencies(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Of each method: the rate of each tile relative to the fastest tile, the median over problems.

    Of problems with many rows only, whole K, so that the time of a tile is that of its rate.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for group in problems(rows):
        if group[0]["m"] < MANY_ROWS:
            continue
        for method in ("planes", "codes", "float"):
            own = [
                row
                for row in group
                if row["plan"]["method"] == method and row["plan"]["splits"] == 1
            ]
            least = min((row["us"] for row in own), default=0.0)
            for row in own:
                shares = found.setdefault(method, {}).setdefault(row["plan"]["tile"], [])
                shares.append(least / row["us"])
    return {
        method: {tile: statistics.median(shares) for tile, shares in tiles.items()}
        for method, tiles in found.items()
    }


def tables(rows: Sequence[Row]) -> str:
    """As Markdown: constants first, then the choices that lose most."""
    planes = max_plane_products(rows)
    efficiencies = tile_efficiencies(rows)
    losing = sorted(
        (line for line in choices(rows) if "loss" in line), key=lambda line: -line["loss"]
    )
    parts = {
        "Up to how many one-bit products planes are faster (kMaxPlaneProducts)": (
            f"{planes['products']}, with a mean loss of {planes['mean_loss']:.1%} over "
            f"{planes['problems']} problems"
            if planes
            else "not measured"
        ),
        "Tiles relative to the fastest": table(
            ["method", "tile", "efficiency"],
            (
                [method, tile, f"{share:.2f}"]
                for method, tiles in efficiencies.items()
                for tile, share in tiles.items()
            ),
        ),
        "Choices of plan() that lose most": table(
            ["precision", "M", "K x N", "chosen", "us", "fastest", "us", "loss"],
            (
                [
                    line["precision"],
                    line["m"],
                    f"{line['k']} x {line['n']}",
                    plan_text(line["chosen"]),
                    f"{line['chosen_us']:.1f}",
                    plan_text(line["best"]),
                    f"{line['best_us']:.1f}",
                    f"{line['loss']:.0%}",
                ]
                for line in itertools.islice(losing, 20)
            ),
        ),
    }
    return "\n\n".join(f"## {name}\n\n{text}" for name, text in parts.items())


def plan_text(plan: dict[str, Any]) -> str:
    """Such as "codes stream 4 clustered"."""
    flags = [name for name, value in plan.items() if value is True]
    return " ".join([plan["method"], plan["tile"], str(plan["splits"]), *flags])
