"""A product with what surrounds it in a transformer as one primitive: norm or gate, and residual.

What it means is `composed`, and that is what it becomes under every transform and wherever no
kernel does it all in one: on every platform but CUDA, with more than one device, for many rows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from . import _native, local_cuda_fused, primitive
from ._compat import ShapedArray, ad, batching, mlir, single_device
from .before import Before
from .operands import output_columns


def matmul(
    x: jax.Array,
    planes: jax.Array,
    scales: jax.Array,
    offsets: jax.Array | None,
    bias: jax.Array | None,
    before: Before,
    residual: jax.Array | None,
    **params: Any,
) -> jax.Array:
    """``residual + (before(x) @ W + bias)``, ``[..., N]`` in `out_dtype`.

    Args:
      x: ``float[..., K]``, or ``[..., 2 K]`` for `SwiGLU`.
      residual: ``float[..., N]``.
      params: as of `primitive.matmul`, with its operands.
    """
    operands = (x, planes, scales, offsets, bias, before, residual)
    if before is None and residual is None:
        return primitive.matmul(*operands[:5], **params)
    leaves, tree = jax.tree.flatten(operands)
    # Arrays over a mesh with explicit axes, or a device's part of one, have rules of their own.
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(v).sharding.mesh for v in leaves)]
    if not all(mesh.empty for mesh in meshes):
        return composed(*operands, **params)
    return matmul_p.bind(*leaves, tree=tree, **params)


def composed(
    x: jax.Array,
    planes: jax.Array,
    scales: jax.Array,
    offsets: jax.Array | None,
    bias: jax.Array | None,
    before: Before,
    residual: jax.Array | None,
    *,
    out_dtype: Any,
    **params: Any,
) -> jax.Array:
    """The definition. The residual meets the product in float32, so that results round once."""
    x = x if before is None else before(x)
    operands = (x, planes, scales, offsets, bias)
    if residual is None:
        return primitive.matmul(*operands, out_dtype=out_dtype, **params)
    y = primitive.matmul(*operands, out_dtype=jnp.dtype(jnp.float32), **params)
    return (residual.astype(jnp.float32) + y).astype(out_dtype)


def _fused(*operands: Any, **params: Any) -> jax.Array:
    """By one call of a kernel where there is one for it."""
    try:
        return local_cuda_fused.matmul(*operands, **params)
    except _native.Unavailable:
        return composed(*operands, **params)


def _of_leaves(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`run` as the primitive has its operands: those that there are, with their tree."""

    def on_leaves(*leaves: Any, tree: Any, **params: Any) -> jax.Array:
        return run(*jax.tree.unflatten(tree, leaves), **params)

    return on_leaves


_composed = _of_leaves(composed)


def _abstract(*leaves: ShapedArray, tree: Any, **params: Any) -> ShapedArray:
    x, planes, *_ = jax.tree.unflatten(tree, leaves)
    shape = (*x.shape[:-1], output_columns(planes, params["columns"]))
    return ShapedArray(shape, params["out_dtype"])


def _batch(leaves: tuple[Any, ...], dims: tuple[Any, ...], **params: Any) -> tuple[Any, int]:
    return jax.vmap(functools.partial(_composed, **params), dims)(*leaves), 0


def _jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...], **params: Any) -> tuple[Any, Any]:
    moves = [type(t) is not ad.Zero for t in tangents]

    def run(*moving: Any) -> jax.Array:
        rest = iter(moving)
        leaves = [next(rest) if m else x for m, x in zip(moves, primals, strict=True)]
        return _composed(*leaves, **params)

    moving, directions = (list(itertools.compress(v, moves)) for v in (primals, tangents))
    return jax.jvp(run, moving, directions)


matmul_p = primitive.define("fused_matmul", _abstract, _composed)
batching.primitive_batchers[matmul_p] = _batch
ad.primitive_jvps[matmul_p] = _jvp

_lower_composed = mlir.lower_fun(_composed, multiple_results=False)
_lower_fused = mlir.lower_fun(_of_leaves(_fused), multiple_results=False)


def _lower_cuda(ctx: Any, *leaves: Any, **params: Any) -> Any:
    lower = _lower_fused if single_device(ctx) else _lower_composed
    return lower(ctx, *leaves, **params)


mlir.register_lowering(matmul_p, _lower_cuda, platform="cuda")
