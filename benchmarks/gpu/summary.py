"""Tables and targets of what `benchmarks.gpu.products` measured, as Markdown.

python -m benchmarks.gpu.summary products.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence

from ..report import Row, matrix, table
from .rows import print_summary

TARGETS = {"W1A1": 6.0, "W2A2": 2.5, "W4A4": 1.3, "W4A8": 1.3, "W8A8": 1.3}
"""Least factors over cuBLAS's bf16, the prologue included."""
TARGET_ROWS = 1024
"""From so many rows on they have to be reached."""

CASE: dict[str, Callable[[Row], object]] = {
    "layer": lambda row: row["layer"],
    "K x N": lambda row: f"{row['k']} x {row['n']}",
    "M": lambda row: row["m"],
}


def summarize(lines: Iterable[str]) -> str:
    """The tables of a file of JSON lines, of which the first is about the run."""
    about, *rows = (json.loads(line) for line in lines)
    good = [row for row in rows if "error" not in row]
    products = [row for row in good if "factor_over_bf16" in row]
    platform = about["platform"]
    parts = {
        "Targets": target_table(products, platform),
        "Factor over XLA's bf16": by_contestant(
            products, lambda row: f"{row['factor_over_bf16']:.2f}"
        ),
        "Microseconds": by_contestant(good, lambda row: f"{row['us']:.1f}"),
        "Share of the roofline, and what limits": by_contestant(
            [row for row in good if "roofline_share" in row],
            lambda row: f"{row['roofline_share']:.0%} {row['floor_limit']}",
        ),
        "Kernels": by_contestant(
            [row for row in good if row["kernel"]], lambda row: " ".join(row["kernel"].values())
        ),
        "Slower than XLA's bf16": slower_table(products, platform),
        "What XLA made of its dots": dot_table(good),
        "Errors": error_table(rows),
    }
    head = [f"- {name}: {about[name]}" for name in ("device", "date", "commit", "jax", "command")]
    cases = len({tuple(label(row) for label in CASE.values()) for row in rows})
    head.append(f"- measured: {len(good)} rows of {cases} cases; not cold: {warm(good)}")
    return "\n\n".join(["\n".join(head), *(f"## {name}\n\n{text}" for name, text in parts.items())])


def target_table(products: Sequence[Row], platform: str) -> str:
    """Each target with the least factor that was measured, and where."""
    header = ["precision", f"target at M >= {TARGET_ROWS}", "least", "largest", "where least", ""]
    lines = []
    for name, target in TARGETS.items():
        found = [
            row
            for row in products
            if row["contestant"] == name
            and row["implementation"] == platform
            and row["m"] >= TARGET_ROWS
        ]
        if not found:
            lines.append([name, f"{target:.1f}", "", "", "", "not measured"])
            continue
        factors = [row["factor_over_bf16"] for row in found]
        least = min(found, key=lambda row: row["factor_over_bf16"])
        missed = sum(factor < target for factor in factors)
        verdict = f"missed at {missed} of {len(found)}" if missed else "met"
        where = f"{least['k']} x {least['n']}, M = {least['m']}"
        lines.append(
            [name, f"{target:.1f}", f"{min(factors):.2f}", f"{max(factors):.2f}", where, verdict]
        )
    return table(header, lines)


def slower_table(products: Sequence[Row], platform: str) -> str:
    found = [
        row for row in products if row["implementation"] == platform and row["factor_over_bf16"] < 1
    ]
    return by_contestant(found, lambda row: f"{row['factor_over_bf16']:.2f}") if found else "none"


def dot_table(rows: Iterable[Row]) -> str:
    """The libraries that XLA's dots of each kind call; where there are none XLA wrote a kernel."""
    found: dict[tuple[str, str], int] = {}
    for row in rows:
        if row["implementation"] == "XLA":
            key = (row["contestant"], ", ".join(row["calls"]) or "XLA's own kernel")
            found[key] = found.get(key, 0) + 1
    return table(["dot", "calls", "cases"], ([*key, count] for key, count in found.items()))


def error_table(rows: Iterable[Row]) -> str:
    """What contestants said that could not take part or were wrong; once each."""
    found = dict.fromkeys((row["contestant"], row["error"]) for row in rows if "error" in row)
    if not found:
        return "none"
    return table(
        ["contestant", "error"],
        ((name, error.splitlines()[0][:200].replace("|", "\\|")) for name, error in found),
    )


def warm(rows: Iterable[Row]) -> int:
    return sum(not row["cold"] for row in rows)


def by_contestant(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    return matrix(rows, CASE, column, cell) if rows else "not measured"


def column(row: Row) -> str:
    """The contestant, and its kernel family if that was asked for by name."""
    _, _, family = row["implementation"].partition("_")
    return f"{row['contestant']} {family}".strip()


def main() -> None:
    print_summary(__doc__.splitlines()[0], "products", summarize)


if __name__ == "__main__":
    main()
