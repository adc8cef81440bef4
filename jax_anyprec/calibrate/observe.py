"""What goes into the dense layers of a model that is run eagerly: their order, and their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from flax import nnx

from ..nnx.convert import Found

Run = Callable[[], Any]
"""Runs a model, or a part of it, on one batch."""


class Observer(nnx.Module, pytree=False):
    """A layer that shows its input to a function before it is called."""

    def __init__(self, layer: Any, show: Callable[[Any], None]):
        self.layer = layer
        self.show = show

    def __call__(self, x: Any, *args: Any, **options: Any) -> Any:
        self.show(x)
        return self.layer(x, *args, **options)


@contextmanager
def put(found: Found, module: nnx.Module) -> Iterator[None]:
    """Within it, `module` is in the place of a layer."""
    for reference in found.references:
        reference.replace(module)
    try:
        yield
    finally:
        for reference in found.references:
            reference._replace(node=module).replace(found.module)


def order(layers: Sequence[Found], run: Run) -> list[list[Found]]:
    """Layers in the order of their first calls; neighbours that share an input are together.

    Layers that are not called are left out.
    """
    calls: list[tuple[Found, Any]] = []

    def record(position: int) -> None:
        if position == len(layers):
            run()
            return
        found = layers[position]
        with put(found, Observer(found.module, lambda x: calls.append((found, x)))):
            record(position + 1)

    record(0)
    stages: list[list[Found]] = []
    seen: set[str] = set()
    last: Any = None
    for found, x in calls:
        if found.layer.path in seen:
            continue
        seen.add(found.layer.path)
        if stages and x is last:
            stages[-1].append(found)
        else:
            stages.append([found])
        last = x
    return stages


class _Seen(Exception):
    """The input that was waited for, so that the rest of the model need not be run."""


def input_of(found: Found, run: Run) -> jax.Array:
    """What goes into a layer at its first call in a run, ``float[rows, K]``."""

    def show(x: Any) -> None:
        raise _Seen(x)

    with put(found, Observer(found.module, show)):
        try:
            run()
        except _Seen as seen:
            return found.rows(seen.args[0])
    raise ValueError(f"layer {found.layer.path!r} is not called")
