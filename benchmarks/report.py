"""What benchmarks leave behind: Markdown tables, and JSON that says how it came about."""

from __future__ import annotations

import datetime
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .machine import commit

Row = dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def matrix(
    rows: Iterable[Row],
    labels: dict[str, Callable[[Row], Any]],
    column: Callable[[Row], str],
    cell: Callable[[Row], str],
) -> str:
    """A Markdown table with a line for each combination of `labels` and a column for each name."""
    lines: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault(tuple(label(row) for label in labels.values()), {})
        line[column(row)] = cell(row)
    columns = list(dict.fromkeys(name for line in lines.values() for name in line))
    cells = [[*key, *(line.get(name, "") for name in columns)] for key, line in lines.items()]
    return table([*labels, *columns], cells)


def write_json(path: pathlib.Path, module: str, content: dict[str, Any]) -> None:
    report = {
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        **content,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def rows_of(path: pathlib.Path | None, facts: Row) -> list[Row]:
    """The rows of an earlier run's file, if there is one and it has these facts."""
    if path is None or not path.exists():
        return []
    report = json.loads(path.read_text())
    return report["rows"] if facts.items() <= report.items() else []
