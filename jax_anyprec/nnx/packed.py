"""`Packed`: the variable of NNX layers that holds packed weights."""

from __future__ import annotations

from flax import nnx


class Packed(nnx.Variable):
    """A `QuantizedTensor`. Not an `nnx.Param`, so gradients and optimizers leave it alone."""
