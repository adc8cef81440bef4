"""What tuning is, and its steps: Adam on the numbers of a packed model, each by its own unit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import format as fmt
from ..checkpoint import load_into, save
from ..quantize import DISTORTION
from ..tensor import QuantizedTensor
from .blocks import Call

KEEP = 8
"""Steps after which what has been done is kept."""

Numbers = Mapping[str, jax.Array]
"""What is tuned, by path: "scales" and "offsets" below that of a packed weight, and vectors."""

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


def is_vector(value: Any) -> bool:
    """Whether a parameter is tuned, as norms' and biases are: of one axis, in float."""
    return value.ndim == 1 and jnp.issubdtype(value.dtype, jnp.floating)


class Pair(NamedTuple):
    """A packed model and the float one, as functions of their variables.

    Attributes:
      output: ``output(state, numbers, batch)`` of the packed model, with these numbers in place.
      wanted: ``wanted(exact_state, batch)`` of the float model.
      state, exact_state: their variables, which are no constants of what is compiled.
    """

    output: Callable[[Any, Numbers, Any], Any]
    wanted: Callable[[Any, Any], Any]
    state: Any
    exact_state: Any


class Weight(NamedTuple):
    """A packed weight, and the bits of the activations that it multiplies; None for float ones."""

    tensor: QuantizedTensor
    activations: int | None


def descend(
    pair: Pair,
    values: Numbers,
    weights: Mapping[str, Weight],
    tuning: Tuning,
    progress: Callable[[int, int], None] | None = None,
    unfinished: Path | None = None,
) -> tuple[dict[str, jax.Array], list[float]]:
    """A step for each batch, in their order, so that the packed model gives what the other does.

    Args:
      pair: the models.
      values: the numbers to begin with.
      weights: the packed model's, by the paths of `values`.
      tuning: with batches, each as `pair` takes it; its `call` is no matter here.
      progress, unfinished: as for `tune.tune`.

    Returns:
      New numbers, in the dtypes of `values`; and the loss of each batch before its step.

    Raises:
      ValueError, CheckpointError: as `tune.tune`.
    """
    batches = tuning.batches
    if batches is None:
        raise ValueError("Tuning.batches must hold at least one batch, got none")
    count, units = len(batches), _units(values, weights)
    optimizer = optax.adam(optax.cosine_decay_schedule(tuning.rate, count))
    scales = [f"{path}/scales" for path in weights]

    def moved(values: Any, units: Any, done: Any) -> dict[str, jax.Array]:
        """Numbers as the model holds them; what is less than their dtypes show is in `done`."""
        new = {p: values[p].astype(jnp.float32) + done[p] * units[p] for p in done}
        new |= {path: jnp.maximum(new[path], 0) for path in scales}
        return {path: new[path].astype(values[path].dtype) for path in done}

    def loss_of(done: Any, fixed: Any, wanted: Any, batch: Any) -> jax.Array:
        state, values, units = fixed
        return tuning.loss(pair.output(state, moved(values, units, done), batch), wanted)

    @jax.jit
    def advance(done: Any, momenta: Any, fixed: Any, exact_state: Any, batch: Any) -> Any:
        wanted = pair.wanted(exact_state, batch)
        loss, slopes = jax.value_and_grad(loss_of)(done, fixed, wanted, batch)
        updates, momenta = optimizer.update(slopes, momenta, done)
        return optax.apply_updates(done, updates), momenta, loss

    done = {path: jnp.zeros(value.shape) for path, value in values.items()}
    now: Any = (done, optimizer.init(done), jnp.zeros(count), jnp.int32(0))
    if unfinished is not None and unfinished.exists():
        now = load_into(now, unfinished)
    done, momenta, losses, first = now
    fixed = (pair.state, dict(values), units)
    for i in range(int(first), count):
        done, momenta, loss = advance(done, momenta, fixed, pair.exact_state, batches[i])
        losses = losses.at[i].set(loss)
        if not jnp.isfinite(loss):
            raise ValueError(f"Tuning.loss must be finite, got {loss} for batch {i}")
        if unfinished is not None and (i + 1) % KEEP == 0:
            save(unfinished, (done, momenta, losses, jnp.int32(i + 1)))
        if progress is not None:
            progress(i + 1, count)
    return moved(values, units, done), losses.tolist()


def _units(values: Numbers, weights: Mapping[str, Weight]) -> dict[str, jax.Array]:
    """What a step of 1 adds to each number: its size, or to an offset half of its group's range.

    That times the error of the layer's products, as a part of them; for vectors, of all layers'.
    """
    floats = {path: value.astype(jnp.float32) for path, value in values.items()}
    errors = {path: _squared_error(each) for path, each in weights.items()}
    sizes = [math.prod(each.tensor.shape) for each in weights.values()]
    mean = math.sqrt(np.average(list(errors.values()), weights=sizes))
    units = {path: mean * jnp.sqrt(jnp.square(value).mean()) for path, value in floats.items()}
    for path, (tensor, _) in weights.items():
        unit = math.sqrt(errors[path]) * floats[f"{path}/scales"]
        units[f"{path}/scales"] = unit
        if tensor.offsets is not None:
            units[f"{path}/offsets"] = unit * fmt.max_level(tensor.bits)
    return units


def _squared_error(weight: Weight) -> float:
    """Of products of a packed weight, as a part of their squares: of weights and of activations."""
    bits = (weight.tensor.bits, weight.activations)
    return sum(DISTORTION[each] for each in bits if each is not None)
