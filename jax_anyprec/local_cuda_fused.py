"""The CUDA kernels that do what surrounds a product of few rows too, as one XLA custom call.

What none of them can do raises `Unavailable`; `fusion` then composes it of several operations.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _native, local_cuda
from . import format as fmt
from .before import Before, RMSNorm, SwiGLU
from .choose import platform_of
from .operands import absent, output_columns, sign_words, weight_bits
from .rotation import Rotation

TARGET = "jax_anyprec_cuda_fused_matmul"

MAX_ROWS = 16
"""Of more, the activations are laid out by a kernel of its own in any case, and norms cost little
beside the product."""


def matmul(
    x: jax.Array,
    planes: jax.Array,
    scales: jax.Array,
    offsets: jax.Array | None,
    bias: jax.Array | None,
    before: Before,
    residual: jax.Array | None,
    **p: Any,
) -> jax.Array:
    """``residual + (before(x) @ W + bias)``, ``[..., N]`` in `out_dtype`; see `fusion.matmul`."""
    n = output_columns(planes, p["columns"])
    k = x.shape[-1] // 2 if isinstance(before, SwiGLU) else x.shape[-1]
    rows = x.shape[:-1]
    m = math.prod(rows)
    _check(m, k, n, p["rotation"], p["implementation"])
    chosen = local_cuda.plan(
        n, k, rows=m, weight_bits=weight_bits(planes, p["columns"]), act_bits=p["act_bits"],
        group_size=p["group_size"], act_group_size=p["act_group_size"], x_dtype=x.dtype,
        rotated=p["rotation"] is not None, implementation=p["implementation"],
    )  # fmt: skip
    if chosen["tile"] != "stream":
        raise _native.Unavailable("fused products stream the weights")
    if p["columns"] is None:
        planes, scales = fmt.tile_planes(planes), fmt.tile_groups(scales)
        offsets = None if offsets is None else fmt.tile_groups(offsets)
    signs, block = sign_words(p["rotation"], k)
    norm = before if isinstance(before, RMSNorm) else None
    operands = (
        x.reshape(m, x.shape[-1]), planes, scales, _or_absent(offsets), _or_absent(bias), signs,
        absent() if norm is None else norm.scale.astype(jnp.float32),
        absent() if residual is None else residual.reshape(m, n),
    )  # fmt: skip
    y = local_cuda.call_product(
        TARGET, operands, chosen, n, p, block=block,
        before={RMSNorm: "rms_norm", SwiGLU: "swiglu"}.get(type(before), "none"),
        eps=np.float32(0 if norm is None else norm.eps),
    )  # fmt: skip
    return y.reshape(*rows, n)


def _check(m: Any, k: int, n: int, rotation: Rotation | None, implementation: str | None) -> None:
    if implementation is not None and platform_of(implementation) != "cuda":
        raise _native.Unavailable(f"implementation={implementation!r} is none of CUDA's")
    if TARGET not in _native.cuda().require(implementation).registrations():
        raise _native.Unavailable("the CUDA extension has no fused products")
    if not isinstance(m, int) or m > MAX_ROWS or 0 in (m, k, n):
        raise _native.Unavailable(f"fused products are for 1 to {MAX_ROWS} rows of some values")
    if rotation is not None and rotation.block > local_cuda.MAX_BLOCK:
        raise _native.Unavailable(f"kernels rotate blocks of {local_cuda.MAX_BLOCK} at most")


def _or_absent(x: jax.Array | None) -> jax.Array:
    return absent() if x is None else x
