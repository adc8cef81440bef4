"""`QuantEinsum` and `QuantLinearGeneral`: `nnx.Einsum` and `nnx.LinearGeneral`, packed."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer, PrecisionLike, PromoteDtypeFn

from ..einsum import Product, einsum, pack_einsum, parse
from ..quantization import Quantization
from ..tensor import QuantizedTensor, check_tensor
from .float_layers import check_float_layer
from .linear import draw_key, kept_options, out_dtype, promoted, reshard
from .metadata import NOTHING, folded, metadata_of

NO_AXES: Mapping[int, int] = MappingProxyType({})
FOUR_BITS = Quantization(weights=4, activations=None)


class QuantEinsum(nnx.Module):
    """`nnx.Einsum` with a packed kernel and, if asked, activations quantized on line.

    The arguments of `nnx.Einsum` mean what they mean there, but `einsum_op` is not one.

    Args:
      einsum_str: a product of the inputs with the kernel, see `jax_anyprec.einsum.parse`.
      kernel_shape, bias_shape: those of the float layer; no bias_shape, no bias.
      quantization: how a new kernel is packed, and how it multiplies.
      implementation: as for `jax_anyprec.matmul`.
      precision: accepted for compatibility; sums are float32 over exact integers whatever it says.
      kernel, bias: a packed kernel, as `jax_anyprec.einsum.pack_einsum` gives it, and a bias of
        `bias_shape` to use instead of drawing new ones, which takes `rngs`. Both may have leading
        axes, in a layer that is mapped or scanned over.
    """

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Sequence[int],
        bias_shape: Sequence[int] | None = None,
        *,
        quantization: Quantization = FOUR_BITS,
        implementation: str | None = None,
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
        product = parse(einsum_str)
        expected = product.packed_shape(kernel_shape)
        if kernel is None:
            drawn = kernel_init(draw_key(rngs), kernel_shape, param_dtype)
            kernel = pack_einsum(einsum_str, drawn, quantization)
        check_tensor(kernel, "kernel")
        if kernel.shape[-len(expected) :] != expected:
            raise ValueError(f"kernel must have shape {expected}, got {kernel.shape}")
        self.kernel = folded(kernel, kernel_metadata, kernel_shape, len(expected))
        self.bias: nnx.Param[jax.Array] | None = nnx.data(None)
        if bias_shape is not None:
            sizes = product.sizes(kernel_shape)
            values = math.prod(sizes[i] for i in product.biased)
            if math.prod(bias_shape) != values:
                raise ValueError(
                    f"bias_shape must have {values} values for {einsum_str!r}, got {bias_shape}"
                )
            if bias is None:
                bias = bias_init(draw_key(rngs), bias_shape, param_dtype)
            self.bias = nnx.Param(bias, **bias_metadata)
        self.einsum_str = einsum_str
        self.kernel_shape = tuple(kernel_shape)
        self.bias_shape = None if bias_shape is None else tuple(bias_shape)
        self.activations = quantization.activations
        self.act_scales = quantization.act_scales
        self.implementation = implementation
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type

    def __call__(
        self, inputs: jax.Array, einsum_str: str | None = None, out_sharding: Any = None
    ) -> jax.Array:
        """The product that `einsum_str` says, by default the layer's own.

        One that is given here may order inputs and output in another way, but must use each axis of
        the kernel as the layer's own does, because the kernel is packed for that.
        """
        spec = self.einsum_str if einsum_str is None else einsum_str
        if _parts(parse(spec)) != _parts(parse(self.einsum_str)):
            raise ValueError(
                f"einsum_str must use the kernel's axes as {self.einsum_str!r} does, which it is "
                f"packed for, got {spec!r}"
            )
        return self._multiply(spec, inputs, out_sharding)

    def _multiply(self, spec: str, inputs: jax.Array, out_sharding: Any) -> jax.Array:
        inputs, bias = promoted(self, inputs, self.param_dtype)
        if bias is not None:
            product = parse(spec)
            sizes = product.sizes(self.kernel_shape)
            bias = bias.reshape([sizes[i] for i in product.biased])
        y = einsum(
            spec,
            inputs,
            self.kernel.get_value(),
            weight_shape=self.kernel_shape,
            bias=bias,
            act_bits=self.activations,
            act_scales=self.act_scales,
            out_dtype=out_dtype(self.preferred_element_type, bias),
            implementation=self.implementation,
        )
        return reshard(y, out_sharding)

    @classmethod
    def from_einsum(
        cls, layer: nnx.Einsum, quantization: Quantization, *, implementation: str | None = None
    ) -> QuantEinsum:
        """`layer` with its kernel quantized; bias, dtypes, promotion and metadata stay."""
        check_float_layer(layer, nnx.Einsum, "layer")
        kernel = pack_einsum(layer.einsum_str, layer.kernel.get_value(), quantization)
        return einsum_like(layer, kernel, quantization, implementation=implementation)


class QuantLinearGeneral(QuantEinsum):
    """`nnx.LinearGeneral` with a packed kernel: an einsum that follows from axes.

    The arguments of `nnx.LinearGeneral` mean what they mean there, but `dot_general` and
    `dot_general_cls` are none.

    Args:
      options: the other arguments of `QuantEinsum`. A packed kernel is ``(batch..., K, N)``, with
        `in_features` flattened to K and `out_features` to N; a bias ``(batch..., *out_features)``.
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        axis: int | Sequence[int] = -1,
        batch_axis: Mapping[int, int] = NO_AXES,
        use_bias: bool = True,
        kernel_init: Initializer = nnx.nn.linear.default_kernel_init,
        bias_init: Initializer = nnx.nn.linear.default_bias_init,
        **options: Any,
    ):
        self.in_features = _as_tuple(in_features)
        self.out_features = _as_tuple(out_features)
        self.axis = _as_tuple(axis)
        self.batch_axis: FrozenDict[int, int] = FrozenDict(batch_axis)
        self.use_bias = use_bias
        if len(self.in_features) != len(self.axis):
            raise ValueError(
                f"axis must have one axis for each of in_features {self.in_features}, "
                f"got {self.axis}"
            )
        if sorted(self.batch_axis) != list(range(len(self.batch_axis))):
            raise ValueError(
                f"batch_axis must have the leading axes 0, 1, ..., got {dict(self.batch_axis)}"
            )
        batch, out = tuple(self.batch_axis.values()), math.prod(self.out_features)

        def draw_kernel(key: Any, shape: Any, dtype: Any) -> Any:
            return kernel_init(key, (math.prod(shape) // out, out), dtype).reshape(shape)

        def draw_bias(key: Any, shape: Any, dtype: Any) -> Any:
            return bias_init(key, (math.prod(shape),), dtype).reshape(shape)

        super().__init__(
            general_spec(len(batch), len(self.in_features), len(self.out_features)),
            (*batch, *self.in_features, *self.out_features),
            (*batch, *self.out_features) if use_bias else None,
            kernel_init=draw_kernel,
            bias_init=draw_bias,
            **options,
        )

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:  # type: ignore[override]
        """``[...]`` to ``[batch..., ..., *out_features]``."""
        product = parse(self.einsum_str)
        if any(not -inputs.ndim <= axis < inputs.ndim for axis in self.axis):
            raise ValueError(f"inputs must have the axes {self.axis}, got shape {inputs.shape}")
        axes = sorted(axis % inputs.ndim for axis in self.axis)  # in this order, as in Flax
        indices = dict(zip([*self.batch_axis, *axes], product.packed, strict=False))
        free = (i for i in string.ascii_letters if i not in product.weight)
        rows = {axis: next(free) for axis in range(inputs.ndim) if axis not in indices}
        x = "".join({**indices, **rows}[axis] for axis in range(inputs.ndim))
        out = product.batch + "".join(rows.values()) + product.features
        return self._multiply(f"{x},{product.weight}->{out}", inputs, out_sharding)

    @classmethod
    def from_linear_general(
        cls,
        layer: nnx.LinearGeneral,
        quantization: Quantization,
        *,
        implementation: str | None = None,
    ) -> QuantLinearGeneral:
        """`layer` with its kernel quantized; bias, dtypes, promotion and metadata stay."""
        check_float_layer(layer, nnx.LinearGeneral, "layer")
        kernel = pack_einsum(spec_of(layer), layer.kernel.get_value(), quantization)
        return general_like(layer, kernel, quantization, implementation=implementation)


def general_spec(batch: int, contracted: int, features: int) -> str:
    """The einsum of a weight with so many axes of each kind, for inputs without rows."""
    letters = iter(string.ascii_letters)
    b, c, f = ("".join(next(letters) for _ in range(n)) for n in (batch, contracted, features))
    return f"{b}{c},{b}{c}{f}->{b}{f}"


def spec_of(layer: nnx.LinearGeneral) -> str:
    """`general_spec` of a float layer."""
    return general_spec(len(layer.batch_axis), len(layer.in_features), len(layer.out_features))


def general_rows(layer: nnx.LinearGeneral, x: jax.Array) -> jax.Array:
    """An input of a layer without batch axes as ``[rows, K]``."""
    axes = sorted(axis % x.ndim for axis in _as_tuple(layer.axis))
    last = range(x.ndim - len(axes), x.ndim)
    return jnp.moveaxis(x, axes, last).reshape(-1, math.prod(layer.in_features))


def einsum_like(
    layer: nnx.Einsum, kernel: QuantizedTensor, quantization: Quantization, **options: Any
) -> QuantEinsum:
    """A `QuantEinsum` of a packed kernel, stacked or not, and else as `layer`."""
    return QuantEinsum(
        layer.einsum_str,
        layer.kernel_shape,
        layer.bias_shape,
        kernel=kernel,
        quantization=quantization,
        kernel_metadata=_kernel_metadata(layer, layer.einsum_str),
        **kept_options(layer),
        **options,
    )


def general_like(
    layer: nnx.LinearGeneral, kernel: QuantizedTensor, quantization: Quantization, **options: Any
) -> QuantLinearGeneral:
    """A `QuantLinearGeneral` of a packed kernel, stacked or not, and else as `layer`."""
    return QuantLinearGeneral(
        layer.in_features,
        layer.out_features,
        axis=layer.axis,
        batch_axis=layer.batch_axis,
        use_bias=layer.use_bias,
        kernel=kernel,
        quantization=quantization,
        kernel_metadata=_kernel_metadata(layer, spec_of(layer)),
        **kept_options(layer),
        **options,
    )


def _kernel_metadata(layer: Any, spec: str) -> dict[str, Any]:
    """The kernel's metadata, with axis names for the packed kernel."""
    product = parse(spec)
    stacked = len(layer.kernel.get_value().shape) - len(product.weight)
    where = {index: stacked + axis for axis, index in enumerate(product.weight)}
    axes = [[axis] for axis in range(stacked)]
    axes += [[where[i]] for i in product.batch]
    axes += [[where[i] for i in part] for part in (product.contracted, product.features)]
    return metadata_of(layer.kernel, axes)


def _parts(product: Product) -> list[str]:
    """The part that each axis of the weight plays."""
    parts = {"batch": product.batch, "contracted": product.contracted}
    return [
        next((name for name, indices in parts.items() if i in indices), "features")
        for i in product.weight
    ]


def _as_tuple(x: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(x) if isinstance(x, Sequence) else (x,)
