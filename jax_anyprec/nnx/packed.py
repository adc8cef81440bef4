"""`Packed`: the variable of NNX layers that holds packed weights."""

from __future__ import annotations

from flax import nnx

from .references import Reference, references


class Packed(nnx.Variable):
    """A `QuantizedTensor`. Not an `nnx.Param`, so gradients and optimizers leave it alone."""


def packed_in(model: nnx.Module) -> dict[str, Reference]:
    """Where a model has packed weights, by path."""
    return {each.path: each for each in references(model) if isinstance(each.node, Packed)}
