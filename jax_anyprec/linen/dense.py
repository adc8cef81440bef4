"""`QuantDense`: `nn.Dense` with packed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PrecisionLike

from .. import ops
from ..einsum import parse
from ..quantize import quantize
from ..rotation import Rotation
from ..tensor import QuantizedTensor
from .boxes import box_like, unboxed

COLLECTION = "packed"
"""The variable collection of packed kernels; "params" keeps only what is trained."""


PRODUCT = parse("...a,ab->...b")


class QuantDense(nn.Module):
    """`nn.Dense` with a packed kernel and, if asked, activations quantized on line.

    The kernel is a `QuantizedTensor` in the collection "packed", the bias stays in "params".
    `init` draws a kernel and quantizes it; for a trained one put `quantize_kernel(kernel)` into
    the collection. Arguments of `nn.Dense` mean what they mean there; `dot_general` is not one.

    Attributes:
      weights: bits of the kernel, 1 to 8.
      activations: bits of the activations, 1 to 8, or None to leave them in float.
      group_size, scales, rotation: as for `jax_anyprec.quantize`.
      act_scales, implementation: as for `jax_anyprec.matmul`.
      precision: accepted for compatibility; sums are float32 over exact integers whatever it says.
    """

    features: int
    weights: int = 4
    activations: int | None = None
    group_size: int | None = None
    scales: Literal["mse", "absmax"] = "mse"
    rotation: Rotation | None = None
    act_scales: Literal["group", "token"] = "group"
    implementation: str | None = None
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.linear.default_kernel_init
    bias_init: Initializer = nn.initializers.zeros_init()
    promote_dtype: Callable[..., Any] = promote_dtype

    def quantize_kernel(self, kernel: jax.Array) -> QuantizedTensor:
        """A float kernel ``[in, features]``, packed as this layer packs it.

        Of one in a box with names of axes (`nn.Partitioned`) the packed arrays are in such boxes.
        """
        packed = quantize(
            unboxed(kernel),
            self.weights,
            group_size=self.group_size,
            scales=self.scales,
            rotation=self.rotation,
        )
        return box_like(kernel, packed, PRODUCT, ())

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """``[..., in]`` to ``[..., features]``."""
        kernel = self.variable(COLLECTION, "kernel", self._draw_kernel, jnp.shape(inputs)[-1])
        bias: Any = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        like_kernel = jnp.zeros((), self.param_dtype)  # takes the float kernel's part in promotion
        inputs, _, bias = self.promote_dtype(inputs, like_kernel, bias, dtype=self.dtype)
        return ops.matmul(
            inputs,
            kernel.value,
            bias=bias,
            act_bits=self.activations,
            act_scales=self.act_scales,
            implementation=self.implementation,
        )

    def _draw_kernel(self, in_features: int) -> QuantizedTensor:
        shape = (in_features, self.features)
        return self.quantize_kernel(
            self.kernel_init(self.make_rng("params"), shape, self.param_dtype)
        )
