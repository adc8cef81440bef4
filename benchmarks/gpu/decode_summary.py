"""Tables and targets of what `benchmarks.gpu.decode` measured, as Markdown.

python -m benchmarks.gpu.decode_summary decode.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..report import Row, matrix, table
from .rows import print_summary
from .summary import error_table

TARGETS = {2: 5.5, 4: 3.2}
"""Least factors over bf16 of decoding with so many bits of weights, at batch 1."""

CASE: dict[str, Callable[[Row], Any]] = {
    "model": lambda row: row["model"],
    "batch": lambda row: row["batch"],
    "context": lambda row: row["context"],
}


def summarize(lines: Iterable[str]) -> str:
    """The tables of a file of JSON lines, of which the first is about the run."""
    about, *rows = (json.loads(line) for line in lines)
    good = [row for row in rows if "us" in row and "error" not in row]
    decode, prefill, traced = (
        [row for row in good if row["kind"] == kind] for kind in ("decode", "prefill", "breakdown")
    )
    parts = {
        "Targets of decoding at batch 1": target_table(decode),
        "Decoding, tokens a second": by_contestant(decode, tokens),
        "Decoding, factor over bf16": by_contestant(decode, factor),
        "Decoding, share of the bandwidth that reading the weights needs": by_contestant(
            [row for row in decode if "bandwidth_share" in row],
            lambda row: f"{row['bandwidth_share']:.0%}",
        ),
        "Reading a prompt, tokens a second": by_contestant(prefill, tokens),
        "Reading a prompt, factor over bf16": by_contestant(prefill, factor),
        "GB of weights / of a step with its cache and scratch": by_contestant(
            [*decode, *prefill],
            lambda row: f"{row['weight_bytes'] / 1e9:.2f} / {row['program_bytes'] / 1e9:.2f}",
        ),
        "Parts of a decoding step": part_table(traced),
        "Logits of a tiny model against XLA's": check_table(rows),
        "Skipped": skipped_table(rows),
        "Errors": error_table(row for row in rows if "contestant" in row),
    }
    names = ("device", "date", "commit", "jax", "command", "command_buffers")
    head = [f"- {name}: {about[name]}" for name in names]
    apart = sorted({row["model"] for row in good if not row["interleaved"]})
    turns = f"one after another for {', '.join(apart)}" if apart else "by turns"
    head.append(f"- measured: {len(good)} rows, {turns}")
    return "\n\n".join(["\n".join(head), *(f"## {name}\n\n{text}" for name, text in parts.items())])


def tokens(row: Row) -> str:
    return f"{row['tokens_per_second']:.0f}"


def factor(row: Row) -> str:
    return f"{row['factor_over_bf16']:.2f}" if "factor_over_bf16" in row else "?"


def target_table(rows: Sequence[Row]) -> str:
    """Every contestant with a target, in every case at batch 1."""
    header = ["model", "context", "precision", "target", "factor over bf16", ""]
    lines = []
    for row in rows:
        target = TARGETS.get(row["weight_bits"])
        if target is None or row["batch"] != 1 or "factor_over_bf16" not in row:
            continue
        verdict = "met" if row["factor_over_bf16"] >= target else "missed"
        line = [row["model"], row["context"], row["contestant"], target, factor(row), verdict]
        lines.append(line)
    return table(header, lines) if lines else "not measured"


def part_table(rows: Sequence[Row]) -> str:
    """Launches and times of the parts of a step."""
    header = ["model", "precision", "part", "launches a step", "launches a layer", "us", "share"]
    lines = []
    for row in rows:
        layers = row["launches"] / row["launches_per_layer"]
        for part, figures in row["parts"].items():
            lines.append(
                [
                    row["model"],
                    row["contestant"],
                    part,
                    f"{figures['launches']:.0f}",
                    f"{figures['launches'] / layers:.1f}",
                    f"{figures['us']:.0f}",
                    f"{figures['us'] / row['us']:.0%}",
                ]
            )
    return table(header, lines) if lines else "not measured"


def check_table(rows: Iterable[Row]) -> str:
    header = ["precision", "relative error", "at most"]
    found = [row for row in rows if row["kind"] == "check" and "relative_error" in row]
    return table(
        header,
        (
            [row["contestant"], f"{row['relative_error']:.1e}", f"{row['tolerance']:.0e}"]
            for row in found
        ),
    )


def skipped_table(rows: Iterable[Row]) -> str:
    found = dict.fromkeys(
        (row["model"], row["kind"], row["batch"], row["context"], row["skipped"])
        for row in rows
        if "skipped" in row
    )
    return table(["model", "", "batch", "context", ""], found) if found else "none"


def by_contestant(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    return matrix(rows, CASE, lambda row: row["contestant"], cell) if rows else "not measured"


def main() -> None:
    print_summary(__doc__.splitlines()[0], "decode", summarize)


if __name__ == "__main__":
    main()
