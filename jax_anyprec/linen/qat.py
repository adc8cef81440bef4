"""`FakeQuantDense`: a dense layer in training for its packed form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..fake_quant import fake_quant_matmul, magnitude
from ..quantize import quantize
from .boxes import box_like, unboxed
from .dense import COLLECTION, PRODUCT, QuantDense


class FakeQuantDense(QuantDense):
    """An `nn.Dense` that computes what its `QuantDense` will, with a float kernel to train.

    Attributes are those of `QuantDense`. "params" has `kernel`, `kernel_scales`
    ``float32[features, groups]`` and `bias`, which learn as `jax_anyprec.fake_quant_matmul` says.
    Outputs are those of the variables that `pack` gives, bit for bit. Scales are the parameter's
    magnitude: a sign that an optimizer gives them changes nothing. Weight decay should leave them
    out.
    """

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """``[..., in]`` to ``[..., features]``."""
        shape = (jnp.shape(inputs)[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        # Jitted, because Linen traces it for the shape while the kernel is no traced value.
        first_scales = jax.jit(lambda _, kernel: self.quantize_kernel(kernel).scales)
        boxed: Any = self.get_variable("params", "kernel")  # its names of axes are the scales' too
        scales = self.param("kernel_scales", first_scales, boxed)
        bias: Any = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        like_kernel = jnp.zeros((), kernel.dtype)  # takes the kernel's part in promotion
        inputs, _, bias = self.promote_dtype(inputs, like_kernel, bias, dtype=self.dtype)
        return fake_quant_matmul(
            inputs,
            kernel,
            magnitude(scales),
            self.weights,
            rotation=self.rotation,
            bias=bias,
            act_bits=self.activations,
            act_scales=self.act_scales,
            implementation=self.implementation,
        )

    def params_from_dense(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters of an `nn.Dense` with the scales that training begins with."""
        return {**params, "kernel_scales": self.quantize_kernel(params["kernel"]).scales}

    def pack(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """This layer's "params" to the variables of `packed_layer`."""
        scales, kernel = magnitude(unboxed(params["kernel_scales"])), unboxed(params["kernel"])
        packed = quantize(
            kernel,
            self.weights,
            group_size=kernel.shape[0] // scales.shape[-1],
            scales=scales,
            rotation=self.rotation,
        )
        packed = box_like(params["kernel"], packed, PRODUCT, ())
        rest = {name: params[name] for name in params if name not in ("kernel", "kernel_scales")}
        return {"params": rest, COLLECTION: {"kernel": packed}}

    @property
    def packed_layer(self) -> QuantDense:
        """The `QuantDense` with this layer's attributes.

        It promotes with `param_dtype`, which must be the kernel's dtype if that was cast.
        """
        names = [field.name for field in dataclasses.fields(QuantDense)]
        return QuantDense(**{name: getattr(self, name) for name in names if name != "parent"})
