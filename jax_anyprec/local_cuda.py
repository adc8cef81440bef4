"""The CUDA kernels: each operation of `local` on rows ``[M, K]`` as one XLA custom call.

Kernels take prepared weights and Hadamard blocks of MAX_BLOCK values at most. Other weights are
tiled, and other blocks rotated, by XLA in front of the call. Which kernel runs is decided by
``plan()`` of `csrc/cuda/plan.h`; what no kernel can do raises `Unavailable` with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _native
from . import format as fmt
from .choose import has_cuda_code
from .operands import absent, known_rows, output_columns, rotate, weight_bits
from .tensor import group_count

Params = dict[str, Any]

MAX_BLOCK = 1024
"""The longest Hadamard block that kernels transform, in the registers of a warp."""

DEFAULT_DEVICE = {"arch": 90, "multiprocessors": 132}
"""What programs are planned for where no GPU is in sight, as in `jax.export`: an H100."""


def quantize_activations(x: jax.Array, signs: jax.Array, **p: Any) -> tuple[jax.Array, jax.Array]:
    """``float[M, K]`` -> ``uint8[M, K]``, ``float32[M, groups]``."""
    x, signs, block = _rotated(x, signs, p["block"])
    m, k = x.shape
    # Rows that can be quantized are those that can be laid out for a product with floats.
    plan(
        1, k, rows=known_rows(x), weight_bits=1, act_bits=None, group_size=k, act_group_size=k,
        x_dtype=x.dtype, rotated=block != 0, implementation=p["implementation"],
    )  # fmt: skip
    results = (
        jax.ShapeDtypeStruct((m, k), jnp.uint8),
        jax.ShapeDtypeStruct((m, group_count(k, p["group_size"])), jnp.float32),
    )
    call = jax.ffi.ffi_call("jax_anyprec_cuda_quantize", results)
    codes, scales = call(x, signs, act_bits=p["bits"], block=block)
    return codes, scales


def int_matmul(codes: jax.Array, planes: jax.Array, **p: Any) -> jax.Array:
    """``uint8[M, K]``, planes or tiles -> ``int32[M, N, groups]``."""
    columns, group_size = p["columns"], p["group_size"]
    m, k = codes.shape
    n = output_columns(planes, columns)
    chosen = plan(
        n, k, rows=known_rows(codes), weight_bits=weight_bits(planes, columns),
        act_bits=p["act_bits"], group_size=group_size, act_group_size=group_size,
        x_dtype=codes.dtype, integers=True, implementation=p["implementation"],
    )  # fmt: skip
    results = (
        jax.ShapeDtypeStruct((m, n, group_count(k, group_size)), jnp.int32),
        jax.ShapeDtypeStruct((m, chosen["workspace_row_bytes"]), jnp.uint8),
    )
    call = jax.ffi.ffi_call("jax_anyprec_cuda_int_matmul", results)
    return call(
        codes, planes if columns is not None else fmt.tile_planes(planes),
        act_bits=p["act_bits"], group_size=group_size,
        method=chosen["method"], tile=chosen["tile"],
    )[0]  # fmt: skip


def matmul(
    x: jax.Array,
    planes: jax.Array,
    scales: jax.Array,
    offsets: jax.Array,
    bias: jax.Array,
    signs: jax.Array,
    peaks: jax.Array,
    **p: Any,
) -> jax.Array:
    """``float[M, K]`` and a packed ``[K, N]`` -> ``[M, N]`` in `out_dtype`."""
    columns = p["columns"]
    x, signs, block = _rotated(x, signs, p["block"])
    k = x.shape[1]
    n = output_columns(planes, columns)
    chosen = plan(
        n, k, rows=known_rows(x), weight_bits=weight_bits(planes, columns),
        act_bits=p["act_bits"], group_size=p["group_size"], act_group_size=p["act_group_size"],
        x_dtype=x.dtype, rotated=block != 0, implementation=p["implementation"],
    )  # fmt: skip
    if columns is None:
        planes, scales = fmt.tile_planes(planes), fmt.tile_groups(scales)
        offsets = offsets if offsets.ndim == 1 else fmt.tile_groups(offsets)
    operands = (x, planes, scales, offsets, bias, signs, peaks)
    return call_product("jax_anyprec_cuda_matmul", operands, chosen, n, p, block=block)


def call_product(
    target: str,
    operands: tuple[jax.Array, ...],
    chosen: dict[str, Any],
    n: int,
    p: Params,
    **attributes: Any,
) -> jax.Array:
    """The custom call of a product as planned, ``[M, N]`` in `out_dtype`.

    Args:
      operands: of the call; the first has M rows.
      chosen: from `plan`.
      p: parameters of `matmul`.
      attributes: of the call, beside those that are in `p` and `chosen`.
    """
    m = operands[0].shape[0]
    parts = 0 if chosen["splits"] == 1 or chosen["clustered"] else chosen["splits"]
    results = (
        jax.ShapeDtypeStruct((m, n), p["out_dtype"]),
        jax.ShapeDtypeStruct((m, chosen["workspace_row_bytes"]), jnp.uint8),  # activations
        jax.ShapeDtypeStruct((parts, m, n), jnp.float32),  # to be added by a launch
    )
    return jax.ffi.ffi_call(target, results)(
        *operands,
        act_bits=p["act_bits"] or 0, group_size=p["group_size"],
        act_group_size=p["act_group_size"],
        **{name: chosen[name] for name in ("method", "tile", "splits", "clustered", "quantizes")},
        **attributes,
    )[0]  # fmt: skip


def plan(
    n: int,
    k: int,
    *,
    rows: int | None,
    weight_bits: int,
    act_bits: int | None,
    group_size: int,
    act_group_size: int,
    x_dtype: Any,
    rotated: bool = False,
    integers: bool = False,
    implementation: str | None = None,
) -> dict[str, Any]:
    """The kernels for a product ``[rows, k] @ [k, n]``; `rows` is None where it is a symbol.

    Returns:
      method ("planes", "codes" or "float"), tile, splits (parts that K is summed in), clustered
      (they are added within the kernel, not by another launch), quantizes (each block does it with
      the single row, not a launch before), reason, and workspace_row_bytes, the scratch memory for
      each row.

    Raises:
      Unavailable: there is no extension, or it has no kernel for this product; the message says
        why.
    """
    module = _native.cuda().require(implementation)
    device = _device(module, implementation)
    # Tangents of a product by planes or codes are floats, which have a family of their own.
    family = implementation if implementation and act_bits is not None else ""
    try:
        return module.plan(
            rows=rows, n=n, k=k, act_bits=act_bits or 0, weight_bits=weight_bits,
            group_size=group_size, act_group_size=act_group_size, x_dtype=np.dtype(x_dtype).name,
            rotated=rotated, integers=integers, arch=device["arch"],
            multiprocessors=device["multiprocessors"],
            clusters=_has_clusters(device["arch"], module.architectures()),
            method=family.removeprefix("cuda").removeprefix("_"),
        )  # fmt: skip
    except ValueError as refusal:
        raise _native.unavailable(implementation, f"no CUDA kernel: {refusal}") from None


def _device(module: Any, implementation: str | None) -> dict[str, Any]:
    """The GPU to plan for: the first, which must run the kernels, or DEFAULT_DEVICE."""
    devices = _native.cuda_devices(module)
    if not devices:
        return DEFAULT_DEVICE
    why = _native.no_code(devices[0], module.architectures())
    if why is not None:
        raise _native.unavailable(implementation, why)
    return devices[0]


def _has_clusters(arch: int, compiled: Iterable[str]) -> bool:
    """Whether a GPU runs code for compute capability 9.0 or newer: with clusters of blocks, and
    launches that begin early."""
    return has_cuda_code(
        arch, [name for name in compiled if int(name.partition("-")[0].rstrip("a")) >= 90]
    )


def _rotated(x: jax.Array, signs: jax.Array, block: int) -> tuple[jax.Array, jax.Array, int]:
    """The operands of a kernel, which leave it a rotation that it can do itself, or none."""
    if block <= MAX_BLOCK:
        return x, signs, block
    return rotate(x, signs, block), absent(np.uint32), 0
