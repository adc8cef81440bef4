"""Layer norms of models that come from PyTorch."""

from __future__ import annotations

from typing import Any

from flax import nnx


def layer_norm(features: int, epsilon: float, *, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm with float32 parameters, its variance that of centred values as in PyTorch.

    Flax's own choice, the mean square less the squared mean, cancels digits.
    """
    return nnx.LayerNorm(features, epsilon=epsilon, dtype=dtype, use_fast_variance=False, rngs=rngs)
