"""What activations may go through on their way into a product: `RMSNorm` and `SwiGLU`."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from .quantize import check_floats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RMSNorm:
    """``x / sqrt(mean(x**2) + eps) * scale`` over the last axis (arXiv 1910.07467).

    Computed in float32, as ``x * (rsqrt(mean(x**2) + eps) * scale)``; rounded to the dtype of x.

    Args:
      scale: ``float[K]``; float32, bfloat16 or float16.
      eps: at least 0 and finite; known at trace time.
    """

    scale: jax.Array
    eps: float = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        if not isinstance(self.eps, numbers.Real) or isinstance(self.eps, bool):
            raise TypeError(f"eps must be a number known at trace time, got {self.eps!r}")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps must be finite and at least 0, got {self.eps!r}")

    def __call__(self, x: jax.Array) -> jax.Array:
        """``float[..., K]`` to the same shape and dtype."""
        y = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
        y = y * (jax.lax.rsqrt(mean_square + self.eps) * self.scale.astype(jnp.float32))
        return y.astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SwiGLU:
    """``silu(gate) * up`` of the two halves of the last axis, gate first (arXiv 2002.05202).

    ``silu(v) = v / (1 + exp(-v))``. Computed in float32 and rounded to the dtype of x.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """``float[..., 2 K]`` to ``[..., K]`` in the same dtype."""
        gate, up = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return (jax.nn.silu(gate) * up).astype(x.dtype)


Before = RMSNorm | SwiGLU | None


def check_before(before: Any, x_shape: tuple[int, ...], k: int) -> Before:
    """`before` if it makes K values of the last axis of x, else TypeError or ValueError."""
    size = x_shape[-1]
    if isinstance(before, SwiGLU):
        if size != 2 * k:
            raise ValueError(
                f"x must have {2 * k} values in its last axis, gate and up for the {k} that w has, "
                f"got {x_shape}"
            )
        return before
    if size != k:
        raise ValueError(f"x must have {k} values in its last axis as w has, got {x_shape}")
    if before is None:
        return None
    if not isinstance(before, RMSNorm):
        raise TypeError(f"before must be None, an RMSNorm or a SwiGLU, got {before!r}")
    scale = check_floats(before.scale, "scale of RMSNorm")
    if scale.shape != (k,):
        raise ValueError(f"scale of RMSNorm must have shape ({k},), got {scale.shape}")
    return RMSNorm(scale, float(before.eps))
