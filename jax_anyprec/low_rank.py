"""Matrices of low rank beside packed ones: the principal directions of a kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def principal_factors(kernel: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A ``[K, rank]`` and B ``[rank, N]`` in the kernel's dtype, and the rest ``float32[K, N]``."""
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(kernel.shape):
        raise ValueError(
            f"rank must be an int from 1 to {min(kernel.shape)} for a kernel of shape "
            f"{kernel.shape}, got {rank!r}"
        )
    whole = kernel.astype(jnp.float32)
    u, s, v = jnp.linalg.svd(whole, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    a = (u[:, :rank] * root).astype(kernel.dtype)
    b = (root[:, None] * v[:rank]).astype(kernel.dtype)
    return a, b, whole - low_rank(a, b)


def low_rank(a: jax.Array, b: jax.Array) -> jax.Array:
    """``A @ B`` in full float32."""
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
