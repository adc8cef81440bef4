"""Tuning of a packed Linen model: its numbers among the variables, and its run on a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax.core import meta

from ..calibrate.descend import Numbers, Pair, Tuning, Weight, descend, is_vector
from ..quantize import Grid
from ..tensor import QuantizedTensor
from .boxes import reboxed, unboxed
from .convert import with_collections
from .dense import COLLECTION
from .find import flatten
from .quantized import Quantized
from .weights import PARAMS

Path = tuple[str, ...]


def tune(
    quantized: Quantized,
    variables: Mapping[str, Any],
    exact: Mapping[str, Any],
    tuning: Tuning,
    call: Mapping[str, Any],
    progress: Callable[[int, int], None],
) -> Any:
    """The variables of a packed model, tuned so that it gives what the float model does.

    Args:
      quantized, variables: the packed model.
      exact: variables of the float model ``quantized.module``.
      tuning: with batches, each a tuple of a call's arguments.
      call: the keywords of every call.
      progress: called with the steps done so far and their number.

    Raises:
      ValueError: as `jax_anyprec.calibrate.tune`.
    """

    def output(state: Any, values: Numbers, batch: tuple[Any, ...]) -> Any:
        return quantized.apply(_with_numbers(state, values), *batch, **call)

    def wanted(state: Any, batch: tuple[Any, ...]) -> Any:
        return quantized.module.apply(state, *batch, **call)

    activations = {
        (*each.scope, each.name): each.quantization.activations for each in quantized.settings
    }
    weights = {
        _name(COLLECTION, path): Weight(_plain(tensor), activations[path])
        for path, tensor in flatten(variables[COLLECTION])
    }
    pair = Pair(output, wanted, variables, exact)
    values, _ = descend(pair, _numbers(variables), weights, tuning, progress)
    return _with_numbers(variables, values)


def _numbers(variables: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What can be tuned: scales and offsets of packed weights, and parameters of one axis."""
    found: dict[str, jax.Array] = {}
    for path, tensor in flatten(variables[COLLECTION]):
        values = {field: unboxed(getattr(tensor, field)) for field in Grid._fields}
        name = _name(COLLECTION, path)
        found |= {f"{name}/{f}": value for f, value in values.items() if value is not None}
    for path, box in flatten(variables[PARAMS]):
        if is_vector(unboxed(box)):
            found[_name(PARAMS, path)] = unboxed(box)
    return found


def _with_numbers(variables: Mapping[str, Any], values: Numbers) -> Any:
    """The variables with all numbers in their places, as `_numbers` names them."""
    packed: dict[Path, Any] = dict(flatten(variables[COLLECTION]))
    for path, tensor in packed.items():
        name = _name(COLLECTION, path)
        boxes = {field: getattr(tensor, field) for field in Grid._fields}
        new: dict[str, Any] = {
            f: reboxed(box, values[f"{name}/{f}"]) for f, box in boxes.items() if box is not None
        }
        packed[path] = dataclasses.replace(tensor, **new)
    params = {
        path: reboxed(box, values.get(_name(PARAMS, path), unboxed(box)))
        for path, box in flatten(variables[PARAMS])
    }
    return with_collections(variables, {PARAMS: params, COLLECTION: packed})


def _name(collection: str, path: Path) -> str:
    return "/".join((collection, *path))


def _plain(tensor: QuantizedTensor) -> QuantizedTensor:
    """A packed weight of arrays, out of the boxes that they may be in."""
    return jax.tree.map(unboxed, tensor, is_leaf=lambda x: isinstance(x, meta.AxisMetadata))
