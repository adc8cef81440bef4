"""docs/transforms.md: each test that its tables name exists, and its examples run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "transforms.md").read_text("utf-8")


def cells() -> list[tuple[str, str, str]]:
    """Transform, operation and content of every cell of the tables."""
    found, head = [], None
    for line in PAGE.splitlines():
        if not line.startswith("|"):
            head = None
            continue
        first, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        if head is None:
            head = rest
        elif set(first) != {"-"}:
            found += [(first, operation, cell) for operation, cell in zip(head, rest, strict=True)]
    return found


def defined(file: str) -> set[str]:
    """Names of the test functions in a file."""
    tree = ast.parse((TESTS / file).read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def complaint(content: str) -> str | None:
    """What is wrong with a cell, or None."""
    if re.fullmatch(r"not defined: .+", content):
        return None
    names = re.findall(r"`(test_\w+\.py)::(test_\w+)`", content)
    if not names or content != ", ".join(f"`{file}::{test}`" for file, test in names):
        return "neither names tests nor says why there are none"
    for file, test in names:
        if not (TESTS / file).exists() or test not in defined(file):
            return f"there is no {file}::{test}"
    return None


def test_each_cell_names_a_test_or_says_why_there_is_none() -> None:
    operations = {operation for _, operation, _ in cells()}
    assert operations >= {"`matmul`", "`int_matmul`", "`quantize_activations`", "`quantize`"}
    assert operations >= {"`nnx.QuantLinear`", "`nnx.QuantEmbed`", "`linen.QuantDense`"}
    complaints = {cell[:2]: complaint(cell[2]) for cell in cells()}
    assert not {cell: what for cell, what in complaints.items() if what is not None}


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("`test_docs.py::test_the_check_finds_what_is_missing`", None),
        ("not defined: integers", None),
        ("`test_docs.py::test_nothing`", "there is no test_docs.py::test_nothing"),
        ("`test_nothing.py::test_it`", "there is no test_nothing.py::test_it"),
        ("not defined", "neither"),
        ("", "neither"),
        ("yes", "neither"),
    ],
)
def test_the_check_finds_what_is_missing(content: str, wanted: str | None) -> None:
    found = complaint(content)
    assert found == wanted or (wanted is not None and found is not None and wanted in found)


@pytest.mark.filterwarnings("ignore:jax_anyprec runs in plain XLA:UserWarning")  # for CUDA
def test_examples_run() -> None:
    values: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/transforms.md", "exec"), values)
    assert values["y"].shape == (8, 256)
    assert values["x"].shape == (8, 512)
    assert len(values["ys"]) == 8
