"""`FakeQuantLinear`: a dense layer in training for its packed form."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ..fake_quant import fake_quant_matmul, magnitude
from ..format import check_bits
from ..quantization import Quantization
from ..quantize import quantize
from ..rotation import Rotation
from .float_layers import check_float_layer
from .linear import QuantLinear, linear_like, out_dtype, promoted, reshard
from .metadata import metadata_of


class FakeQuantLinear(nnx.Module):
    """An `nnx.Linear` that computes what its `QuantLinear` will, with a float kernel to train.

    `kernel`, `kernel_scales` and `bias` are `nnx.Param`s and learn as
    `jax_anyprec.fake_quant_matmul` says. Outputs are those of `pack()`, bit for bit. Scales are the
    parameter's magnitude: a sign that an optimizer gives them changes nothing. Weight decay should
    leave them out.

    Args:
      linear: the float layer to begin with. It is copied; dtypes, promotion, precision and metadata
        stay as they are.
      scales: ``float[out_features, groups]`` to begin with; kept in float32.
      bits: of the weights, 1 to 8.
      rotation: as for `jax_anyprec.quantize`.
      activations, act_scales, implementation: as for `QuantLinear`.
    """

    def __init__(
        self,
        linear: nnx.Linear,
        scales: jax.Array,
        *,
        bits: int,
        rotation: Rotation | None = None,
        activations: int | None = None,
        act_scales: Literal["group", "token"] = "group",
        implementation: str | None = None,
    ):
        check_float_layer(linear, nnx.Linear, "linear")
        linear = nnx.clone(linear)
        self.kernel = linear.kernel
        self.kernel_scales = nnx.Param(scales.astype(jnp.float32))
        self.bias = nnx.data(None) if linear.bias is None else linear.bias
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bits = check_bits(bits)
        self.rotation = rotation
        self.activations = activations
        self.act_scales = act_scales
        self.implementation = implementation
        self.dtype = linear.dtype
        self.param_dtype = linear.param_dtype
        self.precision = linear.precision
        self.promote_dtype = linear.promote_dtype
        self.preferred_element_type = linear.preferred_element_type

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """``[..., in_features]`` to ``[..., out_features]``."""
        inputs, bias = promoted(self, inputs, self.kernel.dtype)
        y = fake_quant_matmul(
            inputs,
            self.kernel[...],
            magnitude(self.kernel_scales[...]),
            self.bits,
            rotation=self.rotation,
            bias=bias,
            act_bits=self.activations,
            act_scales=self.act_scales,
            out_dtype=out_dtype(self.preferred_element_type, bias),
            implementation=self.implementation,
        )
        return reshard(y, out_sharding)

    @classmethod
    def from_linear(
        cls, linear: nnx.Linear, quantization: Quantization, *, implementation: str | None = None
    ) -> FakeQuantLinear:
        """`linear` in training for `quantization`, which also says where scales begin.

        Raises:
          ValueError: the quantization is one with offsets.
        """
        check_float_layer(linear, nnx.Linear, "linear")
        if quantization.offsets:
            raise ValueError("quantization has offsets; weights can be trained without them only")
        w = quantization.pack(linear.kernel[...])
        return cls(
            linear,
            w.scales,
            bits=w.bits,
            rotation=w.rotation,
            implementation=implementation,
            **quantization.layer_options,
        )

    @classmethod
    def from_packed(cls, layer: QuantLinear) -> FakeQuantLinear:
        """A packed layer back in training, its kernel at the values that it holds.

        Raises:
          ValueError: its weights have offsets, which the symmetric grid can't hold.
        """
        if not isinstance(layer, QuantLinear):
            raise TypeError(f"layer must be a QuantLinear, got {type(layer).__name__}")
        w = layer.kernel.get_value().restore()
        if w.offsets is not None:
            raise ValueError("layer has offsets (an imported affine checkpoint); can't train those")
        bias = layer.bias
        linear = nnx.Linear(
            layer.in_features,
            layer.out_features,
            use_bias=bias is not None,
            dtype=layer.dtype,
            param_dtype=layer.param_dtype,
            precision=layer.precision,
            promote_dtype=layer.promote_dtype,
            preferred_element_type=layer.preferred_element_type,
            kernel_init=lambda *_: w.dequantize(layer.param_dtype),
            bias_init=lambda *_: None if bias is None else bias[...],
            kernel_metadata=metadata_of(layer.kernel),
            bias_metadata=metadata_of(bias),
            rngs=nnx.Rngs(0),
        )
        return cls(
            linear,
            w.scales,
            bits=w.bits,
            rotation=w.rotation,
            activations=layer.activations,
            act_scales=layer.act_scales,
            implementation=layer.implementation,
        )

    def pack(self) -> QuantLinear:
        """The packed layer, which gives the same outputs."""
        scales = magnitude(self.kernel_scales[...])
        kernel = quantize(
            self.kernel[...],
            self.bits,
            group_size=self.in_features // scales.shape[-1],
            scales=scales,
            rotation=self.rotation,
        )
        return linear_like(
            self,
            kernel,
            activations=self.activations,
            act_scales=self.act_scales,
            implementation=self.implementation,
        )
