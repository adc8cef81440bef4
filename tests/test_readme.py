"""The examples of the README run, and its commands are those that CI follows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(info: str) -> list[str]:
    """Contents of the README's code blocks that begin with this line."""
    text = README.read_text("utf-8")
    return re.findall(rf"^```{info}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_python_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    values: dict = {}
    for block in blocks("python"):
        exec(compile(block, str(README), "exec"), values)
    assert values["w"].bits == 4
    assert values["packed"].kernel.get_value().bits == 1
    assert "layers/1" in capsys.readouterr().out
    assert values["y"].shape == (8, 256)
    assert values["gradient"].shape == (8, 512)


def test_model_example_runs(smollm2_path, capsys):
    (block,) = blocks('python title="model"')
    exec(compile(block.replace("model.gguf", str(smollm2_path)), str(README), "exec"), {})
    assert capsys.readouterr().out.startswith(" Paris")


@pytest.mark.parametrize("name", ["generate", "test"])
def test_commands_are_marked_for_ci(name):
    assert f"<!-- ci: {name} -->\n```sh\npip install " in README.read_text("utf-8")
