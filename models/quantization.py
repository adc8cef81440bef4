"""The one switch between float and quantized layers of a model."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

import jax_anyprec as ap


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a model's linear layers are held and multiplied. None in its place means float layers.

    Args:
      weights: bits of the weights, 1 to 8; or None to take them as a checkpoint stores them,
        without loss (only for loading).
      activations: bits of the activations, 1 to 8, or None to leave them in float.
      group_size: values along K that share a weight scale, a multiple of 32 that divides each
        layer's K; None for one scale per output channel. Must be None where `weights` is.
      rotate: rotate weights and activations by the largest Hadamard block that fits each K.
      scales: how weight scales are chosen, "mse" or "absmax"; None picks what measures better:
        "mse" for rotated weights, "absmax" for others (outliers must not be clipped).
      act_scales: one activation scale per "token", or per token and "group".
    """

    weights: int | None = None
    activations: int | None = 8
    group_size: int | None = None
    rotate: bool = False
    scales: Literal["mse", "absmax"] | None = None
    act_scales: Literal["group", "token"] = "group"

    def __post_init__(self) -> None:
        if self.weights is None and (self.group_size is not None or self.rotate or self.scales):
            raise ValueError(
                "group_size, rotate and scales need Quantization.weights (1 to 8); "
                "weights=None takes the checkpoint's own"
            )

    def pack(self, kernel: jax.Array) -> ap.QuantizedTensor:
        """Quantize a float matrix ``float[K, N]`` to `weights` bits."""
        if self.weights is None:
            raise ValueError("Quantization.weights must be set (1 to 8) to quantize float weights")
        return ap.quantize(
            kernel,
            self.weights,
            group_size=self.group_size,
            scales=self.scales or ("mse" if self.rotate else "absmax"),
            rotation=ap.Rotation.for_size(kernel.shape[0]) if self.rotate else None,
        )

    def linear(self, weights: ap.QuantizedTensor, dtype: Any) -> ap.nnx.QuantLinear:
        """The layer that multiplies by packed `weights`."""
        return ap.nnx.QuantLinear.from_tensor(
            weights.prepare(), activations=self.activations, act_scales=self.act_scales, dtype=dtype
        )

    def embedding(self, weights: ap.QuantizedTensor, dtype: Any) -> ap.nnx.QuantEmbed:
        """The embedding that looks up, and multiplies by, packed `weights`."""
        return ap.nnx.QuantEmbed.from_tensor(
            weights.prepare(), activations=self.activations, dtype=dtype
        )


def make_linear(
    features_in: int,
    features_out: int,
    *,
    quantization: Quantization | None,
    dtype: Any,
    rngs: nnx.Rngs,
) -> nnx.Linear | ap.nnx.QuantLinear:
    """A linear layer without bias and with random weights, float or quantized."""
    layer = nnx.Linear(
        features_in, features_out, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs
    )
    if quantization is None:
        return layer
    return quantization.linear(quantization.pack(layer.kernel.get_value()), dtype)


def default_dtype() -> Any:
    """The dtype to compute in: float32 on a CPU, bfloat16 elsewhere."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
