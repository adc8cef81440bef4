"""How models lie on the devices of a mesh: partition rules, and placing a model by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jax_anyprec as ap
from jax_anyprec.rules import pattern_expression

from .projections import Projections

COLUMN = PartitionSpec(None, "model")
"""Each device has some output features; nothing is communicated."""
ROW = PartitionSpec("model", None)
"""Each device has some input features; the devices' products are summed."""

TENSOR_PARALLEL: Mapping[str, PartitionSpec] = {
    "layers/*/attention/qkv/layers/*": COLUMN,
    "layers/*/attention/output": ROW,
    "layers/*/feed_forward/gate_up/layers/*": COLUMN,
    "layers/*/feed_forward/down": ROW,
    "embed": COLUMN,
    "head": COLUMN,
}
"""Of `Llama`: two sums over devices a layer. Heads stay whole where the mesh divides them."""


def shard_model(
    model: nnx.Module,
    mesh: Mesh,
    rules: Mapping[str, PartitionSpec] = TENSOR_PARALLEL,
    *,
    at: tuple[Any, ...] = (),
) -> None:
    """Place the weights of `model` on `mesh`, in place.

    Args:
      model: float or packed, with `Projections` that were not merged: cuts of merged ones would not
        lie between heads.
      mesh: may span processes, each of which calls this with the same model.
      rules: pattern of a module's path (as for `jax_anyprec.quantize_model`) -> spec of its matrix
        ``(K, N)``; of an embedding, ``(features, vocabulary)``. The first that matches decides; all
        other weights lie on every device.
      at: path of `model` in a larger one, which rules see.

    Raises:
      ValueError: projections are merged, or a size can't be cut evenly; the message has the path,
        and for packed weights what to pad.
    """
    expressions = [(pattern_expression(pattern), spec) for pattern, spec in rules.items()]
    for path, module in nnx.iter_modules(model):
        name = "/".join(map(str, (*at, *path)))
        if isinstance(module, Projections) and any(len(widths) > 1 for widths in module.widths):
            raise ValueError(f"{name}: projections are merged; load the model with mesh=...")
        spec = next((s for e, s in expressions if e.fullmatch(name)), PartitionSpec())
        for key, variable in vars(module).items():
            if isinstance(variable, nnx.Variable):
                along_n = PartitionSpec(*spec[1:]) if key in ("bias", "scale") else None
                transposed = isinstance(module, nnx.Embed)
                try:
                    value = variable.get_value()
                    variable.set_value(_place(value, mesh, spec, along_n, transposed))
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None


def _place(
    value: Any,
    mesh: Mesh,
    spec: PartitionSpec,
    along_n: PartitionSpec | None,
    transposed: bool,
) -> Any:
    """A variable's value on the mesh.

    `spec` is of the matrix ``(K, N)`` in its last two axes (`transposed`: ``(N, K)``), or `along_n`
    of the last axis of a bias or norm. Axes before them are of stacked layers, which stay whole.
    """
    if isinstance(value, ap.QuantizedTensor):
        full = _last(spec, 2, len(value.shape))
        return jax.tree.map(put_global, value, ap.tensor_sharding(value, mesh, full))
    if along_n is not None:
        return put_global(value, NamedSharding(mesh, _last(along_n, 1, value.ndim)))
    if value.ndim < 2:
        return put_global(value, NamedSharding(mesh, PartitionSpec()))
    *leading, k, n = _last(spec, 2, value.ndim)
    names = (n, k) if transposed else (k, n)
    return put_global(value, NamedSharding(mesh, PartitionSpec(*leading, *names)))


def _last(spec: PartitionSpec, axes: int, rank: int) -> PartitionSpec:
    """`spec` of the last `axes` of `rank` axes."""
    return PartitionSpec(*[None] * (rank - axes), *spec, *[None] * (axes - len(spec)))


def put_global(value: jax.Array, sharding: NamedSharding) -> jax.Array:
    """`value`, which every process has whole, on devices that may be of several processes."""
    whole = np.asarray(value)
    return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)
