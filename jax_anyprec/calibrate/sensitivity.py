"""What an error in the output of each dense layer costs a model: second moments of derivatives.

To second order, an error e in a layer's output changes the prediction by ``e' F e / 2`` nats, where
F is the second moment of the derivatives of the log-likelihood of labels drawn from the model
itself (its Fisher information). Of F the diagonal is kept, a value for each output, as in
SqueezeLLM (arXiv 2306.07629) and K-FAC's independence of inputs and derivatives (arXiv 1503.05671).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ..nnx.convert import Found
from .blocks import Call
from .moments import product
from .observe import put

Loss = Callable[[Any, jax.Array], jax.Array]
"""From a model's output and a `jax.random` key to a scalar, the sum over predictions."""


class Sensitivity(NamedTuple):
    """Means over the rows of a layer's inputs and outputs.

    Attributes:
      inputs: ``float32[K, K]``, of x' x.
      outputs: ``float32[N]``, of the squared derivatives by each output.
    """

    inputs: jax.Array
    outputs: jax.Array


class _Probe(nnx.Module, pytree=False):
    """A layer to whose output something is added; keeps the input that it saw first.

    Both are in a dict, because Flax lets no trace change the attributes of a module outside of it.
    """

    def __init__(self, layer: Any):
        self.layer = layer
        self.seen: dict[str, Any] = {}

    def __call__(self, x: Any, *args: Any, **options: Any) -> Any:
        y = self.layer(x, *args, **options)
        if "input" in self.seen:
            return y
        self.seen["input"] = x
        return y + self.seen["added"]


def sampled_loss(logits: jax.Array, key: jax.Array) -> jax.Array:
    """Minus the log-likelihood of labels drawn from ``logits [..., classes]``, summed."""
    labels = jax.random.categorical(key, logits)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_p, labels[..., None], axis=-1).sum()


def projected_loss(output: jax.Array, key: jax.Array) -> jax.Array:
    """A random projection of ``output [...]``: its derivatives measure ``|error|**2``."""
    return (output * jax.random.normal(key, output.shape, jnp.float32)).sum()


def sensitivities(
    model: nnx.Module,
    layers: Sequence[Found],
    batches: Sequence[Any],
    *,
    loss: Loss,
    call: Call,
    seed: int = 0,
) -> dict[str, Sensitivity]:
    """The `Sensitivity` of each layer that is called, by path; `model` is as it was afterwards."""
    sums: dict[str, Sensitivity] = {}
    rows: dict[str, int] = {}
    for i, batch in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(seed), i)
        for path, (x, g) in _derivatives(model, layers, batch, key, loss, call).items():
            new = _sums(x, g)
            sums[path] = jax.tree.map(jnp.add, sums[path], new) if path in sums else new
            rows[path] = rows.get(path, 0) + len(x)
    return {path: jax.tree.map(lambda s, n=rows[path]: s / n, sums[path]) for path in sums}


@jax.jit
def _sums(x: jax.Array, g: jax.Array) -> Sensitivity:
    x, g = x.astype(jnp.float32), g.astype(jnp.float32)
    return Sensitivity(product(x, x), (g * g).sum(0))


def _derivatives(
    model: nnx.Module, layers: Sequence[Found], batch: Any, key: jax.Array, loss: Loss, call: Call
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Rows of inputs ``[rows, K]`` and of derivatives by outputs ``[rows, N]``, by path."""
    probes = {found.layer.path: _Probe(found.module) for found in layers}

    def run(added: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        for path, probe in probes.items():
            probe.seen.clear()
            probe.seen["added"] = added.get(path, 0.0)
        value = loss(call(model, batch), key)
        return value, {p: x.seen["input"] for p, x in probes.items() if "input" in x.seen}

    with ExitStack() as stack:
        for found in layers:
            stack.enter_context(put(found, probes[found.layer.path]))
        _, seen = jax.eval_shape(run, {})
        zeros = {
            found.layer.path: jnp.zeros(_output_shape(found, seen[found.layer.path]))
            for found in layers
            if found.layer.path in seen
        }
        slopes, inputs = jax.grad(run, has_aux=True)(zeros)
    by_path = {found.layer.path: found for found in layers}
    return {
        path: (by_path[path].rows(inputs[path]), slope.reshape(-1, _columns(by_path[path])))
        for path, slope in slopes.items()
    }


def _columns(found: Found) -> int:
    assert found.layer.matrix is not None
    return found.layer.matrix[-1]


def _output_shape(found: Found, x: Any) -> tuple[int, ...]:
    module: Any = found.module
    return jax.eval_shape(module, x).shape
