"""Tunes scales, norms and biases of a packed model together, by gradients of its outputs.

Calibration settles one layer after another, each on its own outputs. What the whole model makes of
them is seen here: codes stay as they are, and what is left, a number for each group of weights and
the model's vectors, follows the gradients of the difference between the model's outputs and the
float model's (the second phase of EfficientQAT, arXiv 2407.11062, with the float model as teacher).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from .. import format as fmt
from ..checkpoint import load_into, save
from ..nnx.packed import Packed
from ..nnx.references import Reference, references
from ..quantize import DISTORTION, Grid
from ..tensor import QuantizedTensor
from .blocks import Call, call_plainly

KEEP = 8
"""Steps after which what has been done is kept."""

Difference = Callable[[Any, Any], jax.Array]
"""From the outputs of the packed and of the float model to a scalar."""


def relative_error(output: jax.Array, wanted: jax.Array) -> jax.Array:
    """``|output - wanted|**2 / |wanted|**2``, summed over all elements of ``[...]``."""
    output, wanted = output.astype(jnp.float32), wanted.astype(jnp.float32)
    return jnp.square(output - wanted).sum() / jnp.maximum(jnp.square(wanted).sum(), 1e-30)


def kl_divergence(logits: jax.Array, wanted: jax.Array) -> jax.Array:
    """Of predictions ``logits [..., classes]`` from `wanted`'s: nats a prediction, on average."""
    log_p = jax.nn.log_softmax(wanted.astype(jnp.float32))
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean()


@dataclasses.dataclass(frozen=True, eq=False)
class Tuning:
    """What a packed model is tuned on, and how. All are optional.

    Args:
      batches: inputs of one shape, each for one step; None for those of the calibration.
      call: ``call(model, batch)`` gives what `loss` takes; None for ``model(batch)``.
      loss: from the outputs of the packed and of the float model to a scalar: `relative_error`,
        or `kl_divergence` for logits.
      rate: the first step's. A step changes a number by about the rate times its size (of a
        vector, its root mean square) times the error of packed products, as a part of them: numbers
        of coarse layers move further, vectors of zeros not at all. Rates fall to 0 along a cosine.
    """

    batches: Sequence[Any] | None = None
    call: Call | None = None
    loss: Difference = relative_error
    rate: float = 0.01

    def __post_init__(self) -> None:
        if self.batches is not None and not len(self.batches):
            raise ValueError("Tuning.batches must hold at least one batch, got none")
        if not 0 <= self.rate < 1:
            raise ValueError(f"Tuning.rate must be in 0..1, below 1, got {self.rate}")


def tune(
    model: nnx.Module,
    reference: nnx.Module,
    tuning: Tuning,
    progress: Callable[[int, int], None] | None = None,
    unfinished: Path | None = None,
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

    Returns:
      The loss of each batch before its step.

    Raises:
      ValueError: no layer is packed, there are no batches, or a loss is not finite; the model is
        as it was then.
      CheckpointError: `unfinished` can't be read, or is of another model or other batches.
    """
    batches, run = tuning.batches, tuning.call or call_plainly
    if batches is None:
        raise ValueError("Tuning.batches must hold at least one batch, got none")
    values, units = numbers(model), _units(model)
    graph, state = nnx.split(model)
    exact_graph, exact_state = nnx.split(reference)
    optimizer = optax.adam(optax.cosine_decay_schedule(tuning.rate, len(batches)))
    scales = [f"{path}/scales" for path in _packed(model)]

    def moved(values: Any, units: Any, steps: Any) -> Any:
        """Numbers as the model holds them; what is less than their dtypes show is in the steps."""
        new = {p: values[p].astype(jnp.float32) + steps[p] * units[p] for p in steps}
        new |= {path: jnp.maximum(new[path], 0) for path in scales}
        return {path: new[path].astype(values[path].dtype) for path in steps}

    def loss_of(steps: Any, fixed: Any, wanted: Any, batch: Any) -> jax.Array:
        state, values, units = fixed
        changed = nnx.merge(graph, state, copy=True)
        set_numbers(changed, moved(values, units, steps))
        return tuning.loss(run(changed, batch), wanted)

    @jax.jit
    def advance(steps: Any, momenta: Any, fixed: Any, exact_state: Any, batch: Any) -> Any:
        wanted = run(nnx.merge(exact_graph, exact_state), batch)
        loss, slopes = jax.value_and_grad(loss_of)(steps, fixed, wanted, batch)
        updates, momenta = optimizer.update(slopes, momenta, steps)
        return optax.apply_updates(steps, updates), momenta, loss

    steps = {path: jnp.zeros(value.shape) for path, value in values.items()}
    done: Any = (steps, optimizer.init(steps), jnp.zeros(len(batches)), jnp.int32(0))
    if unfinished is not None and unfinished.exists():
        done = load_into(done, unfinished)
    steps, momenta, losses, first = done
    for i in range(int(first), len(batches)):
        fixed = (state, values, units)
        steps, momenta, loss = advance(steps, momenta, fixed, exact_state, batches[i])
        losses = losses.at[i].set(loss)
        if not jnp.isfinite(loss):
            raise ValueError(f"Tuning.loss must be finite, got {loss} for batch {i}")
        if unfinished is not None and (i + 1) % KEEP == 0:
            save(unfinished, (steps, momenta, losses, jnp.int32(i + 1)))
        if progress is not None:
            progress(i + 1, len(batches))
    set_numbers(model, moved(values, units, steps))
    return losses.tolist()


def numbers(model: nnx.Module) -> dict[str, jax.Array]:
    """What can be tuned of a model, by path: "scales" and "offsets" below a packed weight's.

    These are ``[..., N, groups]``; the rest are the model's parameters of one axis.

    Raises:
      ValueError: no layer is packed.
    """
    if not _packed(model):
        raise ValueError("model must have packed layers, got none")
    found: dict[str, jax.Array] = {}
    for path, node in _nodes(model):
        if isinstance(node, Packed):
            tensor: QuantizedTensor = node.get_value()
            fields = {field: _restored(tensor, field) for field in Grid._fields}
            found |= {f"{path}/{f}": value for f, value in fields.items() if value is not None}
        elif isinstance(node, nnx.Param) and _is_vector(node.get_value()):
            found[path] = node.get_value()
    return found


def set_numbers(model: nnx.Module, values: Mapping[str, jax.Array]) -> None:
    """Put all numbers in their places, as `numbers` names them."""
    for path, node in _nodes(model):
        if isinstance(node, Packed):
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


def _packed(model: nnx.Module) -> dict[str, Reference]:
    return {x.path: x for x in references(model) if isinstance(x.node, Packed)}


def _restored(tensor: QuantizedTensor, field: str) -> jax.Array | None:
    value, n = getattr(tensor, field), tensor.columns
    return value if value is None or n is None else fmt.untile_groups(value, n)


def _is_vector(value: Any) -> bool:
    return value.ndim == 1 and jnp.issubdtype(value.dtype, jnp.floating)


def _units(model: nnx.Module) -> dict[str, jax.Array]:
    """What a step of 1 adds to each number: its size, or to an offset half of its group's range.

    That times the error of the layer's products, as a part of them; for vectors, of all layers'.
    """
    values = {path: value.astype(jnp.float32) for path, value in numbers(model).items()}
    packed = _packed(model)
    tensors = {path: _tensor(each) for path, each in packed.items()}
    errors = {path: _squared_error(each) for path, each in packed.items()}
    sizes = [math.prod(tensor.shape) for tensor in tensors.values()]
    mean = math.sqrt(np.average(list(errors.values()), weights=sizes))
    units = {path: mean * jnp.sqrt(jnp.square(value).mean()) for path, value in values.items()}
    for path, tensor in tensors.items():
        unit = math.sqrt(errors[path]) * values[f"{path}/scales"]
        units[f"{path}/scales"] = unit
        if tensor.offsets is not None:
            units[f"{path}/offsets"] = unit * fmt.max_level(tensor.bits)
    return units


def _tensor(packed: Reference) -> QuantizedTensor:
    variable: Any = packed.node
    return variable.get_value()


def _squared_error(packed: Reference) -> float:
    """Of products of a packed weight, as a part of their squares: of weights and of activations."""
    bits = (_tensor(packed).bits, getattr(packed.parent, "activations", None))
    return sum(DISTORTION[each] for each in bits if each is not None)
