"""What goes into the dense layers of a model that is run eagerly: their order, and their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    with ExitStack() as stack:
        for reference in found.references:
            stack.enter_context(reference.replaced(module))
        yield


def observe(layers: Sequence[Found], run: Run, show: Callable[[Found, Any], None]) -> None:
    """Run, and show each call of one of `layers` and its input to a function."""
    if not layers:
        run()
        return
    found, *others = layers
    with put(found, Observer(found.module, lambda x: show(found, x))):
        observe(others, run, show)


def order(layers: Sequence[Found], run: Run) -> list[list[Found]]:
    """Layers in the order of their first calls; neighbours that share an input are together.

    Layers that are not called are left out.
    """
    stages: list[list[Found]] = []
    seen: set[str] = set()
    last: Any = None

    def show(found: Found, x: Any) -> None:
        nonlocal last
        if found.layer.path not in seen:
            if stages and x is last:
                stages[-1].append(found)
            else:
                stages.append([found])
            seen.add(found.layer.path)
            last = x

    observe(layers, run, show)
    return stages


def inputs_of(layers: Sequence[Found], run: Run) -> dict[str, jax.Array]:
    """What goes into layers at their first calls in a run, ``float[rows, K]`` by path."""
    inputs: dict[str, jax.Array] = {}

    def show(found: Found, x: Any) -> None:
        inputs.setdefault(found.layer.path, found.rows(x))

    observe(layers, run, show)
    return inputs


def mean_squares(layers: Sequence[Found], runs: Iterable[Run]) -> dict[str, np.ndarray]:
    """Of what goes into layers in all runs, ``float32[K]`` by path; not of layers never called."""
    sums: dict[str, Any] = {}
    rows: dict[str, int] = {}

    def show(found: Found, x: Any) -> None:
        path, x = found.layer.path, found.rows(x).astype(jnp.float32)
        sums[path] = sums.get(path, 0) + jnp.square(x).sum(0)
        rows[path] = rows.get(path, 0) + len(x)

    for run in runs:
        observe(layers, run, show)
    return {path: np.asarray(total) / rows[path] for path, total in sums.items()}


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
