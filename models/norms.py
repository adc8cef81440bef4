"""Norms: as models that come from PyTorch have them, and as products take them in."""

from __future__ import annotations

from typing import Any

from flax import nnx

import jax_anyprec as ap


def layer_norm(features: int, epsilon: float, *, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm with float32 parameters, its variance that of centred values as in PyTorch.

    Flax's own choice, the mean square less the squared mean, cancels digits.
    """
    return nnx.LayerNorm(features, epsilon=epsilon, dtype=dtype, use_fast_variance=False, rngs=rngs)


def before_product(norm: nnx.RMSNorm) -> ap.RMSNorm:
    """`norm` for a product to begin with; its scale is rounded as `norm` rounds it."""
    if norm.scale is None or norm.dtype is None:
        raise ValueError("norm must have a scale and a dtype")
    return ap.RMSNorm(norm.scale[...].astype(norm.dtype), norm.epsilon)
