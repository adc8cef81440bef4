"""The blocks of a model, run one after another on recorded inputs, whatever lies between them.

A model is a stem, blocks of one class (the layers of a transformer) and a head. To run block i on
its true inputs, the model is run with what block i - 1 gave in the place of the blocks before, and
is left as soon as block i is reached: so nothing need be known of how a model calls its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from flax import nnx

from ..nnx.references import Reference, references

Call = Callable[[Any, Any], Any]
"""Runs a model on a batch."""


def call_plainly(model: Any, batch: Any) -> Any:
    """The `Call` of models that take a batch and nothing else."""
    return model(batch)


class Arguments(NamedTuple):
    """What a block is called with."""

    args: tuple[Any, ...]
    options: dict[str, Any]


class _Recorded(nnx.Module, pytree=False):
    """Stands for a block that has been run."""

    def __init__(self) -> None:
        self.output: Any = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.output


class _Reached(Exception):
    """The arguments of a block that was called."""


class _Gate(nnx.Module, pytree=False):
    """Stands for a block that is to be run next."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        raise _Reached(Arguments(args, options))


def find_blocks(model: nnx.Module, paths: Sequence[str]) -> list[Reference]:
    """The blocks: of all lists of modules of one class, those that hold most of the layers `paths`.

    References in the order of the list; none if no list holds two of them or more.
    """
    lists: dict[tuple[int, type], list[Reference]] = {}
    for reference in references(model):
        name = reference.path.rpartition("/")[2]
        if name.isdecimal() and isinstance(reference.node, nnx.Module):
            lists.setdefault((id(reference.parent), type(reference.node)), []).append(reference)

    def count(blocks: list[Reference]) -> int:
        return sum(any(p.startswith(f"{b.path}/") for b in blocks) for p in paths)

    candidates = [blocks for blocks in lists.values() if len(blocks) > 1 and count(blocks) > 1]
    # Of lists inside one another, the outer holds as much and comes first.
    return max(candidates, key=count, default=[])


class Blocks:
    """Runs the blocks of a model in turn on batches.

    Args:
      model: with its blocks in place, where they stay but for the time of a call.
      blocks: from `find_blocks`.
      call: runs the model on a batch.
    """

    def __init__(self, model: nnx.Module, blocks: Sequence[Reference], call: Call):
        self.model, self.blocks, self.call = model, blocks, call

    def run_of(self, i: int, batch: Any, output: Any) -> Callable[[], Any]:
        """Runs block i in a batch, if block i - 1 gives `output`."""
        args, options = self.arguments(i, batch, output)
        block: Any = self.blocks[i].node
        return lambda: block(*args, **options)

    def arguments(self, i: int, batch: Any, output: Any) -> Arguments:
        """What block i is called with in a batch, if block i - 1 gives `output`."""
        recorded, gate = _Recorded(), _Gate()
        recorded.output = output
        with ExitStack() as stack:
            for reference, stand_in in zip(self.blocks, [recorded] * i + [gate], strict=False):
                stack.enter_context(reference.replaced(stand_in))
            try:
                self.call(self.model, batch)
            except _Reached as reached:
                return reached.args[0]
        raise ValueError(f"block {self.blocks[i].path!r} is not called")
