"""Dense layers of a model, float or quantized: the one switch between them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jax_anyprec as ap
from jax_anyprec.before import Before
from jax_anyprec.quantization import Quantization


def packed_linear(
    quantization: Quantization,
    weights: ap.QuantizedTensor,
    dtype: Any,
    *,
    bias: jax.Array | None = None,
) -> ap.nnx.QuantLinear:
    """The layer that multiplies by packed `weights` and adds `bias`."""
    return ap.nnx.QuantLinear.from_tensor(
        weights.prepare(), bias=bias, dtype=dtype, **quantization.layer_options
    )


def packed_embedding(
    quantization: Quantization, weights: ap.QuantizedTensor, dtype: Any
) -> ap.nnx.QuantEmbed:
    """The embedding that looks up, and multiplies by, packed `weights`."""
    return ap.nnx.QuantEmbed.from_tensor(
        weights.prepare(), activations=quantization.activations, dtype=dtype
    )


def make_linear(
    features_in: int,
    features_out: int,
    *,
    quantization: Quantization | None,
    dtype: Any,
    rngs: nnx.Rngs,
    use_bias: bool = False,
) -> nnx.Linear | ap.nnx.QuantLinear:
    """A linear layer with random weights, float or quantized."""
    layer = nnx.Linear(
        features_in, features_out, use_bias=use_bias, dtype=dtype, param_dtype=dtype, rngs=rngs
    )
    if quantization is None:
        return layer
    bias = None if layer.bias is None else layer.bias.get_value()
    return packed_linear(
        quantization, quantization.pack(layer.kernel.get_value()), dtype, bias=bias
    )


def apply_linear(
    layer: nnx.Module,
    x: jax.Array,
    *,
    before: Before = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """``residual + layer(before(x))``, of a packed layer in one operation."""
    if isinstance(layer, ap.nnx.QuantLinear):
        return layer(x, before=before, residual=residual)
    y = layer(x if before is None else before(x))
    return y if residual is None else residual + y


def default_dtype() -> Any:
    """The dtype to compute in: float32 on a CPU, bfloat16 elsewhere."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
