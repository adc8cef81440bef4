"""The CPU kernels: each operation of `local` on rows ``[M, K]`` as one XLA custom call.

They raise `Unavailable` where there is no extension.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from . import _native, choose
from .operands import known_rows, output_columns, weight_bits
from .tensor import group_count

Params = dict[str, Any]


def quantize_activations(x: jax.Array, signs: jax.Array, **p: Any) -> tuple[jax.Array, jax.Array]:
    """``float[M, K]`` -> ``uint8[M, K]``, ``float32[M, groups]``."""
    _native.cpu().require(p["implementation"])
    m, k = x.shape
    results = (
        jax.ShapeDtypeStruct((m, k), jnp.uint8),
        jax.ShapeDtypeStruct((m, group_count(k, p["group_size"])), jnp.float32),
    )
    call = jax.ffi.ffi_call("jax_anyprec_cpu_quantize", results)
    codes, scales = call(x, signs, act_bits=p["bits"], block=p["block"])
    return codes, scales


def int_matmul(codes: jax.Array, planes: jax.Array, **p: Any) -> jax.Array:
    """``uint8[M, K]``, planes or tiles -> ``int32[M, N, groups]``."""
    act_bits, group_size = p["act_bits"], p["group_size"]
    m, k = codes.shape
    method, row_bytes = _method(codes, planes, {**p, "act_group_size": group_size})
    n, groups = output_columns(planes, p["columns"]), group_count(k, group_size)
    results = (
        jax.ShapeDtypeStruct((m, n, groups), jnp.int32),
        jax.ShapeDtypeStruct((m, row_bytes), jnp.uint8),
    )
    call = jax.ffi.ffi_call("jax_anyprec_cpu_int_matmul", results)
    return call(codes, planes, act_bits=act_bits, group_size=group_size, method=method)[0]


def matmul(x: jax.Array, planes: jax.Array, *rest: jax.Array, **p: Any) -> jax.Array:
    """``float[M, K]`` and a packed ``[K, N]`` -> ``[M, N]`` in `out_dtype`."""
    method, row_bytes = _method(x, planes, p)
    m = x.shape[0]
    results = (
        jax.ShapeDtypeStruct((m, output_columns(planes, p["columns"])), p["out_dtype"]),
        jax.ShapeDtypeStruct((m, row_bytes), jnp.uint8),  # scratch for the quantized activations
    )
    call = jax.ffi.ffi_call("jax_anyprec_cpu_matmul", results)
    return call(
        x, planes, *rest,
        act_bits=p["act_bits"] or 0, group_size=p["group_size"],
        act_group_size=p["act_group_size"], block=p["block"], method=method,
    )[0]  # fmt: skip


def _method(x: jax.Array, planes: jax.Array, p: Params) -> tuple[str, int]:
    """The kernel family, and the bytes of scratch that it needs for each row."""
    asked = p["implementation"]
    module = _native.cpu().require(asked)
    bits = weight_bits(planes, p["columns"])
    method = choose.cpu_method(p["act_bits"], bits, known_rows(x), module.isa(), asked or "").method
    row_bytes = module.workspace_row_bytes(
        x.shape[1], p["group_size"], p["act_group_size"], p["act_bits"] or 0, method
    )
    return method, row_bytes
