"""`LoRADense`: low-rank adapters (LoRA, arXiv 2106.09685) on a packed dense layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Initializer

from ..low_rank import low_rank, principal_factors
from ..tensor import QuantizedTensor
from .dense import COLLECTION, QuantDense

LORA = "lora"
"""The variable collection of adapters: differentiate and update it alone to train only them."""


class LoRADense(nn.Module):
    """``base(x) + x @ A @ B``: a packed layer that stays, and an adapter that learns.

    A ``[in, rank]`` and B ``[rank, features]`` are in the collection "lora", the base's kernel in
    "packed" and its bias in "params". `init` draws A and sets B to 0, so outputs begin as those of
    the base. For a trained kernel put what `lora` or `pissa` gives into the variables.

    Attributes:
      base: the packed layer; its dtypes and promotion hold for the adapter too.
      rank: columns of A and rows of B.
      a_init, b_init: as for `flax.nnx.LoRA`.
    """

    base: QuantDense
    rank: int
    a_init: Initializer = nn.initializers.he_uniform()
    b_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """``[..., in]`` to ``[..., features]``."""
        a = self._factor("a", self.a_init, (jnp.shape(inputs)[-1], self.rank))
        b = self._factor("b", self.b_init, (self.rank, self.base.features))
        x, a, b = self.base.promote_dtype(inputs, a, b, dtype=self.base.dtype)
        return x @ a @ b + self.base(x)

    def lora(self, kernel: jax.Array, key: jax.Array) -> dict[str, Any]:
        """Variables for a float kernel ``[in, features]``: quantized, with an adapter that is 0."""
        key_a, key_b = jax.random.split(key)
        a = self.a_init(key_a, (kernel.shape[0], self.rank), self.base.param_dtype)
        b = self.b_init(key_b, (self.rank, self.base.features), self.base.param_dtype)
        return self._variables(kernel, a, b)

    def pissa(self, kernel: jax.Array) -> dict[str, Any]:
        """Variables for a float kernel: its principal part in the adapter, the rest quantized.

        See `jax_anyprec.nnx.pissa`.
        """
        a, b, rest = principal_factors(kernel, self.rank)
        return self._variables(rest, a, b)

    def merge(self, variables: Mapping[str, Any]) -> QuantizedTensor:
        """The kernel of one `QuantDense` like `base` in place of base and adapter, quantized anew.

        See `jax_anyprec.nnx.merge_lora` for what that costs.
        """
        adapter = variables[LORA]
        kernel = variables[COLLECTION]["base"]["kernel"].dequantize()
        return self.base.quantize_kernel(kernel + low_rank(adapter["a"], adapter["b"]))

    def _variables(self, kernel: jax.Array, a: jax.Array, b: jax.Array) -> dict[str, Any]:
        packed = self.base.quantize_kernel(kernel)
        return {COLLECTION: {"base": {"kernel": packed}}, LORA: {"a": a, "b": b}}

    def _factor(self, name: str, init: Initializer, shape: tuple[int, ...]) -> jax.Array:
        draw = lambda: init(self.make_rng("params"), shape, self.base.param_dtype)  # noqa: E731
        return self.variable(LORA, name, draw).value
