"""`QuantLinear`: `nnx.Linear` with packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer, PrecisionLike, PromoteDtypeFn

from .. import ops
from ..before import Before
from ..format import check_bits
from ..quantize import quantize
from ..rotation import Rotation
from ..tensor import QuantizedTensor, check_tensor
from .float_layers import check_float_layer
from .metadata import NOTHING, metadata_of, packed


class QuantLinear(nnx.Module):
    """`nnx.Linear` with a packed kernel and, if asked, activations quantized on line.

    The arguments of `nnx.Linear` mean what they mean there, but `dot_general` is not one: the
    quantized product is what this layer is for. New layers draw a kernel and quantize it; trained
    ones come from `from_linear` or `from_tensor`.

    Args:
      weights: bits of the kernel, 1 to 8.
      activations: bits of the activations, 1 to 8, or None to leave them in float.
      group_size, scales, rotation: as for `jax_anyprec.quantize`.
      act_scales, implementation: as for `jax_anyprec.matmul`.
      dtype: the inputs' and the output's dtype (default: inferred from inputs and `param_dtype`).
      precision: accepted for compatibility; sums are float32 over exact integers whatever it says.
      preferred_element_type: the output's dtype (default: that of the promoted inputs). A bias of
        a wider dtype widens it, as in `nnx.Linear`.
      kernel, bias: packed weights ``(in_features, out_features)`` and ``float[out_features]`` to
        use instead of drawing new ones, which takes `rngs`. Both may have leading axes, in a layer
        that is mapped or scanned over.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weights: int = 4,
        activations: int | None = None,
        group_size: int | None = None,
        scales: Literal["mse", "absmax"] | jax.Array = "mse",
        rotation: Rotation | None = None,
        act_scales: Literal["group", "token"] = "group",
        implementation: str | None = None,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = nnx.nn.linear.default_kernel_init,
        bias_init: Initializer = nnx.nn.linear.default_bias_init,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        preferred_element_type: Dtype | None = None,
        kernel: QuantizedTensor | None = None,
        bias: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
        kernel_metadata: Mapping[str, Any] = NOTHING,
        bias_metadata: Mapping[str, Any] = NOTHING,
    ):
        if activations is not None:
            activations = check_bits(activations, "activations")
        if kernel is None:
            drawn = kernel_init(draw_key(rngs), (in_features, out_features), param_dtype)
            kernel = quantize(
                drawn, weights, group_size=group_size, scales=scales, rotation=rotation
            )
        check_tensor(kernel, "kernel")
        if kernel.shape[-2:] != (in_features, out_features):
            raise ValueError(
                f"kernel must have shape {(in_features, out_features)}, got {kernel.shape}"
            )
        self.kernel = packed(kernel, kernel_metadata)
        self.bias: nnx.Param[jax.Array] | None
        if use_bias:
            if bias is None:
                bias = bias_init(draw_key(rngs), (out_features,), param_dtype)
            self.bias = nnx.Param(bias, **bias_metadata)
        else:
            self.bias = nnx.data(None)
        self.in_features = in_features
        self.out_features = out_features
        self.activations = activations
        self.act_scales = act_scales
        self.implementation = implementation
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type

    def __call__(
        self,
        inputs: jax.Array,
        out_sharding: Any = None,
        *,
        before: Before = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """``[..., in_features]`` to ``[..., out_features]``; the others as in `matmul`."""
        inputs, bias = promoted(self, inputs, self.param_dtype)
        y = ops.matmul(
            inputs,
            self.kernel.get_value(),
            bias=bias,
            before=before,
            residual=residual,
            act_bits=self.activations,
            act_scales=self.act_scales,
            out_dtype=out_dtype(self.preferred_element_type, bias),
            implementation=self.implementation,
        )
        return reshard(y, out_sharding)

    @classmethod
    def from_tensor(
        cls, kernel: QuantizedTensor, *, bias: jax.Array | None = None, **options: Any
    ) -> QuantLinear:
        """A layer around packed weights ``(in_features, out_features)``.

        Args:
          kernel: the weights, stacked ones too; `options` can't say otherwise.
          bias: ``float[out_features]`` or None for a layer without bias.
          options: `activations` and other arguments of the constructor.
        """
        check_tensor(kernel, "kernel")
        return cls(
            *kernel.shape[-2:], kernel=kernel, bias=bias, use_bias=bias is not None, **options
        )

    @classmethod
    def from_linear(
        cls,
        linear: nnx.Linear,
        *,
        weights: int,
        group_size: int | None = None,
        scales: Literal["mse", "absmax"] | jax.Array = "mse",
        rotation: Rotation | None = None,
        **options: Any,
    ) -> QuantLinear:
        """`linear` with its kernel quantized; bias, dtypes, promotion and metadata stay."""
        check_float_layer(linear, nnx.Linear, "linear")
        kernel = quantize(
            linear.kernel[...], weights, group_size=group_size, scales=scales, rotation=rotation
        )
        return linear_like(linear, kernel, **options)


def linear_like(linear: Any, kernel: QuantizedTensor, **options: Any) -> QuantLinear:
    """A `QuantLinear` of a packed kernel, stacked or not, and else as `linear`.

    Args:
      linear: an `nnx.Linear`, `QuantLinear` or `FakeQuantLinear`.
      options: how it multiplies, see `QuantLinear`.
    """
    metadata = metadata_of(linear.kernel)
    return QuantLinear.from_tensor(
        kernel, kernel_metadata=metadata, **kept_options(linear), **options
    )


def promoted(layer: Any, inputs: jax.Array, dtype: Dtype) -> tuple[jax.Array, jax.Array | None]:
    """Inputs and bias (or None) in the dtypes of a float layer whose kernel has `dtype`."""
    bias = None if layer.bias is None else layer.bias[...]
    like_kernel = jnp.zeros((), dtype)  # takes the float kernel's part in promotion
    inputs, _, bias = layer.promote_dtype((inputs, like_kernel, bias), dtype=layer.dtype)
    return inputs, bias


def reshard(y: jax.Array, out_sharding: Any) -> jax.Array:
    """`y` with the sharding that a layer was called with; None leaves it."""
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def kept_options(layer: Any) -> dict[str, Any]:
    """The arguments of a packed layer that are those of the float layer it takes the place of."""
    return {
        "bias": None if layer.bias is None else layer.bias.get_value(),
        "bias_metadata": metadata_of(layer.bias),
        "dtype": layer.dtype,
        "param_dtype": param_dtype(layer, layer.kernel),
        "precision": layer.precision,
        "promote_dtype": layer.promote_dtype,
        "preferred_element_type": layer.preferred_element_type,
    }


def param_dtype(layer: Any, weight: nnx.Variable[Any]) -> Dtype:
    """The dtype that the weight of a layer has in promotion: a float one's own."""
    value = weight.get_value()
    return layer.param_dtype if isinstance(value, QuantizedTensor) else value.dtype


def out_dtype(preferred: Dtype | None, bias: jax.Array | None) -> Dtype | None:
    """The dtype of outputs as in Flax, which adds the bias to a product in the preferred dtype."""
    if preferred is None or bias is None:
        return preferred
    return jnp.result_type(preferred, bias.dtype)


def draw_key(rngs: nnx.Rngs | None) -> jax.Array:
    if rngs is None:
        raise TypeError("rngs must be an nnx.Rngs for a layer that draws its own kernel or bias")
    return rngs.params()
