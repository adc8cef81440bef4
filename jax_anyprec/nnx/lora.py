"""Low-rank adapters (LoRA, arXiv 2106.09685) on packed layers, as `flax.nnx.LoRA` modules.

`nnx.LoRA` takes a `QuantLinear` for its base as it is: outputs are ``base(x) + x @ A @ B``, the
adapters are `nnx.LoRAParam`s, and gradients pass through the packed product. What is here makes
such modules from float layers and merges them again.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from ..low_rank import low_rank, principal_factors
from ..quantization import Quantization
from .float_layers import check_float_layer
from .linear import QuantLinear, linear_like


def lora(
    linear: nnx.Linear | QuantLinear,
    rank: int,
    quantization: Quantization | None = None,
    *,
    rngs: nnx.Rngs,
) -> nnx.LoRA:
    """An adapter that begins at nothing: A is random and B zero, so outputs are the packed layer's.

    Args:
      linear: a float layer, which is quantized, or a `QuantLinear`, which is taken as it is.
      rank: columns of A and rows of B.
      quantization: for a float layer; None for a packed one.
      rngs: A is drawn from its stream "params".
    """
    if isinstance(linear, QuantLinear):
        _check_matrix(linear)
        if quantization is not None:
            raise ValueError("quantization must be None for a QuantLinear, which is packed already")
        return _adapter(linear, rank, rngs=rngs)
    check_float_layer(linear, nnx.Linear, "linear")
    if quantization is None:
        raise ValueError("quantization must be a Quantization for a float layer, got None")
    _check_matrix(linear)
    return _adapter(_pack(linear, linear.kernel[...], quantization), rank, rngs=rngs)


def pissa(linear: nnx.Linear, rank: int, quantization: Quantization) -> nnx.LoRA:
    """An adapter that begins at the kernel's principal part, on the quantized rest of it.

    PiSSA (arXiv 2404.02948): with the singular value decomposition ``U S V`` of the kernel, A is
    ``U S**0.5`` and B ``S**0.5 V``, cut to the largest `rank` values. The rest is smaller than the
    kernel and has fewer outliers, so quantizing it loses less.

    Args:
      linear: a float layer; ``kernel[K, N]`` takes a full decomposition, O(K N min(K, N)).
      rank: at most min(K, N).
      quantization: of the rest.
    """
    check_float_layer(linear, nnx.Linear, "linear")
    _check_matrix(linear)
    a, b, rest = principal_factors(linear.kernel[...], rank)
    return with_factors(_pack(linear, rest, quantization), a, b)


def with_factors(base: QuantLinear, a: jax.Array, b: jax.Array) -> nnx.LoRA:
    """An adapter of given factors, ``float[K, rank]`` and ``float[rank, N]`` of one dtype.

    Raises:
      ValueError: they don't fit the layer.
    """
    _check_matrix(base)
    k, n = base.kernel.get_value().shape
    if a.ndim != 2 or a.shape != (k, b.shape[0]) or b.shape[1:] != (n,):
        raise ValueError(
            f"a and b must be ({k}, rank) and (rank, {n}) for this layer, got {a.shape}, {b.shape}"
        )
    return _adapter(
        base,
        b.shape[0],
        a_initializer=lambda *_: a,
        b_initializer=lambda *_: b,
        param_dtype=a.dtype,
        rngs=nnx.Rngs(0),  # unused, but LoRA asks for it
    )


def merge_lora(layer: nnx.LoRA, quantization: Quantization) -> QuantLinear:
    """One packed layer in place of a packed layer and its adapter.

    The sum ``base + A @ B`` is no longer on the base's grid, so it is quantized anew: that rounds
    once more (twice, counting the base's own rounding), and the float matrix ``[K, N]`` is in
    memory meanwhile. An adapter that is kept apart loses nothing.
    """
    base = layer.base_module if isinstance(layer, nnx.LoRA) else None
    if not isinstance(base, QuantLinear):
        raise TypeError(
            "layer must be an nnx.LoRA with a QuantLinear for its base_module, got "
            f"{type(layer).__name__} with {type(base).__name__}"
        )
    factors = layer.lora_a[...], layer.lora_b[...]
    kernel = base.kernel.get_value().dequantize() + low_rank(*factors)
    return _pack(base, kernel, quantization, implementation=base.implementation)


def _pack(layer: Any, kernel: jax.Array, quantization: Quantization, **options: Any) -> QuantLinear:
    """`layer`, float or packed, with another kernel, quantized."""
    return linear_like(layer, quantization.pack(kernel), **quantization.layer_options, **options)


def _adapter(base: QuantLinear, rank: int, **options: Any) -> nnx.LoRA:
    options.setdefault("param_dtype", base.param_dtype)
    return nnx.LoRA(
        base.in_features,
        rank,
        base.out_features,
        base_module=base,
        dtype=base.dtype,
        promote_dtype=base.promote_dtype,
        **options,
    )


def _check_matrix(linear: nnx.Linear | QuantLinear) -> None:
    shape = linear.kernel.get_value().shape
    if len(shape) != 2:
        raise ValueError(
            f"linear must be one layer, not a stack: its kernel has shape {shape}; make adapters "
            "of its layers under nnx.vmap"
        )
