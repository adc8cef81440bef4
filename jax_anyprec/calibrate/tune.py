"""Tunes scales, norms and biases of a packed model together, by gradients of its outputs.

Calibration settles one layer after another, each on its own outputs. What the whole model makes of
them is seen here: codes stay as they are, and what is left, a number for each group of weights and
the model's vectors, follows the gradients of the difference between the model's outputs and the
float model's (the second phase of EfficientQAT, arXiv 2407.11062, with the float model as teacher).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from .. import format as fmt
from ..nnx.packed import Packed, packed_in
from ..nnx.references import Reference, references
from ..quantize import Grid
from ..tensor import QuantizedTensor
from .blocks import call_plainly
from .descend import Numbers, Pair, Tuning, Weight, descend, is_vector


def tune(
    model: nnx.Module,
    reference: nnx.Module,
    tuning: Tuning,
    progress: Callable[[int, int], None] | None = None,
    unfinished: Path | None = None,
    fixed: Collection[str] = (),
) -> list[float]:
    """Change scales, offsets and vectors of `model`, so that it gives what `reference` does.

    One step of Adam for each batch, in their order.

    Args:
      model: packed, of any bits, changed in place once all steps are done.
      reference: the float model.
      tuning: with batches.
      progress: called with the steps done so far and their number.
      unfinished: a file to keep what has been done in, every `KEEP` steps, and to go on from if it
        is there; whoever has kept the result removes it. None to keep nothing.
      fixed: paths of layers whose scales and offsets stay: steps are as long as packed weights are
        wrong, and those of exact ones would only get worse.

    Returns:
      The loss of each batch before its step.

    Raises:
      ValueError: no layer is packed or all are fixed, there are no batches, or a loss is not
        finite; the model is as it was then.
      CheckpointError: `unfinished` can't be read, or is of another model or other batches.
    """
    run = tuning.call or call_plainly
    graph, state = nnx.split(model)
    exact_graph, exact_state = nnx.split(reference)

    def output(state: Any, values: Numbers, batch: Any) -> Any:
        changed = nnx.merge(graph, state, copy=True)
        set_numbers(changed, values)
        return run(changed, batch)

    def wanted(state: Any, batch: Any) -> Any:
        return run(nnx.merge(exact_graph, state), batch)

    values, packed = numbers(model), packed_in(model)
    kept = {path for path in packed if path.rpartition("/")[0] in fixed}
    values = {name: v for name, v in values.items() if name.rpartition("/")[0] not in kept}
    weights = {
        path: Weight(_tensor(each), getattr(each.parent, "activations", None))
        for path, each in packed.items()
        if path not in kept
    }
    if not weights:
        raise ValueError("fixed must leave a packed layer to be tuned, got all of them")
    pair = Pair(output, wanted, state, exact_state)
    values, losses = descend(pair, values, weights, tuning, progress, unfinished)
    set_numbers(model, values)
    return losses


def numbers(model: nnx.Module) -> dict[str, jax.Array]:
    """What can be tuned of a model, by path: "scales" and "offsets" below a packed weight's.

    These are ``[..., N, groups]``; the rest are the model's parameters of one axis.

    Raises:
      ValueError: no layer is packed.
    """
    if not packed_in(model):
        raise ValueError("model must have packed layers, got none")
    found: dict[str, jax.Array] = {}
    for path, node in _nodes(model):
        if isinstance(node, Packed):
            tensor: QuantizedTensor = node.get_value()
            fields = {field: _restored(tensor, field) for field in Grid._fields}
            found |= {f"{path}/{f}": value for f, value in fields.items() if value is not None}
        elif isinstance(node, nnx.Param) and is_vector(node.get_value()):
            found[path] = node.get_value()
    return found


def set_numbers(model: nnx.Module, values: Numbers) -> None:
    """Put numbers in their places, as `numbers` names them: all of a packed weight, or none."""
    for path, node in _nodes(model):
        if isinstance(node, Packed) and f"{path}/scales" in values:
            tensor: QuantizedTensor = node.get_value()
            new: dict[str, Any] = {
                f: values[f"{path}/{f}"] for f in Grid._fields if getattr(tensor, f) is not None
            }
            if tensor.prepared:
                new = {field: fmt.tile_groups(value) for field, value in new.items()}
            node.set_value(dataclasses.replace(tensor, **new))
        elif isinstance(node, nnx.Param) and path in values:
            node.set_value(values[path])


def _nodes(model: nnx.Module) -> list[tuple[str, Any]]:
    return [(reference.path, reference.node) for reference in references(model)]


def _restored(tensor: QuantizedTensor, field: str) -> jax.Array | None:
    value, n = getattr(tensor, field), tensor.columns
    return value if value is None or n is None else fmt.untile_groups(value, n)


def _tensor(packed: Reference) -> QuantizedTensor:
    variable: Any = packed.node
    return variable.get_value()
