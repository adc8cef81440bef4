"""`Projections`: linear layers that share an input, in as few products as their weights allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_anyprec as ap
from jax_anyprec.before import Before

from .dense import apply_linear, make_linear


class Projections(nnx.Module):
    """Linear layers over the same features, such as query, key and value.

    They begin as one layer for each output, as checkpoints hold them. `merge_projections` joins
    those whose weights are held alike, so that activations are quantized once, and one long product
    takes the place of several short ones.

    Args:
      features_in: features of the input.
      features_out: features of each output.
      options: for `make_linear`.
    """

    def __init__(self, features_in: int, features_out: Sequence[int], **options: Any):
        self.layers = nnx.List([make_linear(features_in, n, **options) for n in features_out])
        # Of the outputs that each layer has.
        self.widths: tuple[tuple[int, ...], ...] = tuple((n,) for n in features_out)

    def __call__(self, x: jax.Array, before: Before = None) -> list[jax.Array]:
        """``x [..., features_in]`` to the outputs ``[..., n]``, one for each of `features_out`.

        With `before` it is ``before(x)`` that is projected.
        """
        return self.split(self.products(x, before))

    def products(self, x: jax.Array, before: Before = None) -> list[jax.Array]:
        """What each layer gives, before outputs of merged ones are taken apart."""
        if before is not None and len(self.layers) > 1:
            x, before = before(x), None  # once, not in each product
        return [apply_linear(layer, x, before=before) for layer in self.layers]

    def split(self, products: Sequence[jax.Array]) -> list[jax.Array]:
        """The outputs in `products`."""
        return [
            output
            for product, widths in zip(products, self.widths, strict=True)
            for output in jnp.split(product, np.cumsum(widths)[:-1], axis=-1)
        ]

    def merge(self) -> None:
        """Join neighbouring layers whose weights are held alike."""
        layers: list[nnx.Module] = []
        widths: list[tuple[int, ...]] = []
        for layer, width in zip(self.layers, self.widths, strict=True):
            joined = _join(layers[-1], layer) if layers else None
            if joined is None:
                layers.append(layer)
                widths.append(width)
            else:
                layers[-1] = joined
                widths[-1] += width
        self.layers, self.widths = nnx.List(layers), tuple(widths)


def merge_projections(module: nnx.Module) -> None:
    """Merge all `Projections` inside `module`."""
    for _, inner in list(nnx.iter_modules(module)):
        if isinstance(inner, Projections):
            inner.merge()


def _join(a: nnx.Module, b: nnx.Module) -> nnx.Module | None:
    """One layer with the outputs of `a` and then of `b`; None if their weights are held unlike."""
    match a, b:
        case (nnx.Linear(), nnx.Linear()) if (
            a.kernel.dtype,
            a.use_bias,
        ) == (b.kernel.dtype, b.use_bias):
            kernels = jnp.concatenate([a.kernel[...], b.kernel[...]], axis=1)
            biases = _join_biases(a, b)
            return nnx.Linear(
                *kernels.shape,
                use_bias=a.use_bias,
                dtype=a.dtype,
                param_dtype=a.param_dtype,
                kernel_init=lambda *_: kernels,
                bias_init=lambda *_: biases,
                rngs=nnx.Rngs(0),
            )
        case (ap.nnx.QuantLinear(), ap.nnx.QuantLinear()) if (
            a.activations,
            a.act_scales,
            a.dtype,
            a.use_bias,
        ) == (b.activations, b.act_scales, b.dtype, b.use_bias):
            try:
                kernel = ap.concatenate([a.kernel.get_value(), b.kernel.get_value()])
            except ValueError:
                return None
            return ap.nnx.QuantLinear.from_tensor(
                kernel,
                bias=_join_biases(a, b),
                activations=a.activations,
                act_scales=a.act_scales,
                dtype=a.dtype,
            )
    return None


def _join_biases(*layers: nnx.Linear | ap.nnx.QuantLinear) -> jax.Array | None:
    """The biases of `layers`, which all have one or none, in one."""
    biases = [layer.bias[...] for layer in layers if layer.bias is not None]
    return jnp.concatenate(biases) if biases else None
