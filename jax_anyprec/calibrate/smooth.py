"""Makes channels between two parts of a model alike in size, without changing what it computes.

A channel that is larger than others costs activations their precision, because it sets the scale of
all. Where one part gives channels and linear layers take them, with nothing between but products,
each can be divided by a factor in the one and multiplied by it in the other (SmoothQuant,
arXiv 2211.10438). Here factors are powers of the channels' root mean square, because rotations
spread what is left over many of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from ..nnx.convert import Found, find
from ..nnx.references import references
from .blocks import call_plainly
from .observe import mean_squares


@dataclasses.dataclass(frozen=True)
class Link:
    """Channels that one part of a model gives, and linear layers take.

    Args:
      giver: path of a norm with a scale, or of a linear layer.
      takers: paths of `flax.nnx.Linear` layers, all on the same input, that take them. Nothing else
        may.
      first: of the giver's channels, the first that they take; they take all from there on.
      head: channels that stay together where the takers get each several times over, as heads of
        values do whose queries have several: None where they get them once.
    """

    giver: str
    takers: tuple[str, ...]
    first: int = 0
    head: int | None = None


def smooth(
    model: nnx.Module,
    links: Iterable[Link],
    batches: Sequence[Any],
    *,
    call: Callable[[Any, Any], Any] | None = None,
    strength: float = 0.5,
) -> dict[str, jax.Array]:
    """Divide the channels of all links by ``rms**strength``, of mean 1, and make up for it.

    Args:
      model: of float layers, changed in place; what it computes changes by roundings only.
      links: which channels; no two of the same.
      batches: inputs of the model that the root mean squares are of.
      call: ``call(model, batch)`` runs the model; None for ``model(batch)``.
      strength: 0 changes nothing, 1 makes all channels alike in activations, at the expense of
        weights.

    Returns:
      The variables that have changed, by path.

    Raises:
      ValueError: a path of a link is of no such module, sizes don't fit, or `strength` is not in
        0..1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in 0..1, got {strength!r}")
    modules = {reference.path: reference.node for reference in references(model)}
    layers = {found.layer.path: found for found in find(model)}
    chosen = list(links)
    for link in chosen:
        _check(link, modules, layers)
    run = call or call_plainly
    runs = [functools.partial(run, model, batch) for batch in batches]
    squares = mean_squares([layers[link.takers[0]] for link in chosen], runs)
    changed: dict[str, jax.Array] = {}
    for link in chosen:
        if link.takers[0] in squares:
            changed |= _apply(link, modules, squares[link.takers[0]], strength)
    return changed


def _check(link: Link, modules: dict[str, Any], layers: dict[str, Found]) -> None:
    giver = modules.get(link.giver)
    channels = getattr(giver, "kernel", getattr(giver, "scale", None))
    if not isinstance(channels, nnx.Variable):
        raise ValueError(f"giver must be a norm with a scale or a linear layer: {link.giver!r}")
    count = channels.shape[-1] - link.first
    for path in link.takers:
        taker = modules.get(path)
        if path not in layers or not isinstance(taker, nnx.Linear):
            raise ValueError(f"takers must be of nnx.Linear: {path!r}")
        fits = taker.in_features == count
        if link.head is not None:
            fits = count > 0 and count % link.head == 0 and taker.in_features % count == 0
        if not fits:
            raise ValueError(
                f"{path!r} takes {taker.in_features} channels, of which {link.giver!r} gives "
                f"{count}"
            )


def _apply(
    link: Link, modules: dict[str, Any], squares: np.ndarray, strength: float
) -> dict[str, jax.Array]:
    """Move the factors of a link from its giver to its takers."""
    giver = modules[link.giver]
    given = "kernel" if hasattr(giver, "kernel") else "scale"
    head = link.head or 1
    groups = (getattr(giver, given).shape[-1] - link.first) // head
    squares = squares.reshape(groups, -1, head)
    factors = _factors(squares.mean(1), strength)
    before = np.ones(link.first, np.float32)
    divided = np.concatenate([before, factors.reshape(-1)])
    times = np.broadcast_to(factors[:, None], squares.shape).reshape(-1)
    changes = [(link.giver, giver, name, 1 / divided) for name in (given, "bias")]
    changes += [(path, modules[path], "kernel", times[:, None]) for path in link.takers]
    changed = {}
    for path, module, name, factor in changes:
        variable = getattr(module, name, None)
        if variable is not None:
            value = variable[...]
            variable.set_value((value * factor).astype(value.dtype))
            changed[f"{path}/{name}"] = variable[...]
    return changed


def _factors(squares: np.ndarray, strength: float) -> np.ndarray:
    """Powers of root mean squares with a geometric mean of 1; 1 for channels that are always 0."""
    seen = squares > 1e-12 * max(float(squares.max()), 1e-30)
    sizes = np.where(seen, squares, 1.0) ** (strength / 2)
    sizes = sizes / np.exp(np.log(sizes[seen]).mean()) if seen.any() else sizes
    return np.where(seen, sizes, 1.0).astype(np.float32)
