"""What one device runs: each operation as a primitive with a native and a plain XLA lowering.

Operands are complete here: what is absent (offsets, bias, signs, peaks) is an array without
elements. `partition` calls these on whole operands, or on a device's part of them; derivatives and
batching are of the primitives above, in `primitive`.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _native, choose, reference
from . import format as fmt
from ._compat import Primitive, ShapedArray, mlir
from .rotation import hadamard
from .tensor import group_count

Params = dict[str, Any]


def absent(dtype: Any = np.float32) -> jax.Array:
    """In the place of an operand that there is not."""
    return jnp.zeros(0, dtype)


def quantize_activations(
    x: jax.Array, signs: jax.Array, **params: Any
) -> tuple[jax.Array, jax.Array]:
    """``float[..., K]`` -> ``uint8[..., K]``, ``float32[..., groups]``."""
    codes, scales = quantize_activations_p.bind(x, signs, **params)
    return codes, scales


def int_matmul(codes: jax.Array, planes: jax.Array, **params: Any) -> jax.Array:
    """``uint8[..., K]``, planes or tiles -> ``int32[..., N, groups]``."""
    return int_matmul_p.bind(codes, planes, **params)


def matmul(
    x: jax.Array,
    planes: jax.Array,
    scales: jax.Array,
    offsets: jax.Array,
    bias: jax.Array,
    signs: jax.Array,
    peaks: jax.Array,
    **params: Any,
) -> jax.Array:
    """``float[..., K]`` and a packed ``[K, N]`` -> ``[..., N]`` in `out_dtype`.

    `signs` are the rotation's, ``uint32[ceil(K / 32)]``. `peaks`, ``float32[...]``, are largest
    magnitudes to choose a token's one activation scale by, in the place of its own.
    """
    return matmul_p.bind(x, planes, scales, offsets, bias, signs, peaks, **params)


def rotate(x: jax.Array, signs: jax.Array, block: int) -> jax.Array:
    """``float32[..., K]``: `x` with signs flipped and its blocks transformed, if there are any."""
    x = x.astype(jnp.float32)
    if block == 0:
        return x
    bits = (signs[:, None] >> np.arange(fmt.WORD_BITS, dtype=np.uint32)) & np.uint32(1)
    return hadamard(x * (1 - 2 * bits.astype(jnp.float32)).reshape(-1)[: x.shape[-1]], block)


def in_planes(planes: Any, scales: Any, offsets: Any, columns: int | None) -> tuple[Any, Any, Any]:
    """Planes, scales and offsets (or None) of a tensor that may be prepared."""
    if columns is None:
        return planes, scales, offsets
    scales, offsets = (
        None if x is None else fmt.untile_groups(x, columns) for x in (scales, offsets)
    )
    return fmt.untile_planes(planes, columns), scales, offsets


def output_columns(planes: Any, columns: int | None) -> int:
    """N, the columns of the result."""
    return planes.shape[1] if columns is None else columns


# --- definitions in plain XLA ---


def _quantize_xla(x: jax.Array, signs: jax.Array, **p: Any) -> tuple[jax.Array, jax.Array]:
    x = rotate(x, signs, p["block"])
    return reference.quantize_activations(
        x, bits=p["bits"], group_size=p["group_size"], rotation=None
    )


def _int_matmul_xla(codes: jax.Array, planes: jax.Array, **p: Any) -> jax.Array:
    planes, _, _ = in_planes(planes, None, None, p["columns"])
    return reference.int_matmul(codes, planes, act_bits=p["act_bits"], group_size=p["group_size"])


def _matmul_xla(
    x: jax.Array,
    planes: jax.Array,
    scales: jax.Array,
    offsets: jax.Array,
    bias: jax.Array,
    signs: jax.Array,
    peaks: jax.Array,
    **p: Any,
) -> jax.Array:
    given = None if offsets.ndim == 1 else offsets
    planes, scales, given = in_planes(planes, scales, given, p["columns"])
    return reference.matmul(
        rotate(x, signs, p["block"]),
        planes,
        scales,
        given,
        bias if bias.size else None,
        act_bits=p["act_bits"],
        act_group_size=p["act_group_size"],
        group_size=p["group_size"],
        rotation=None,
        out_dtype=p["out_dtype"],
        peaks=peaks if peaks.size else None,
    )


# --- native definitions: one XLA custom call each ---


def _quantize_cpu(x: jax.Array, signs: jax.Array, **p: Any) -> tuple[jax.Array, jax.Array]:
    m, k = x.shape
    results = (
        jax.ShapeDtypeStruct((m, k), jnp.uint8),
        jax.ShapeDtypeStruct((m, group_count(k, p["group_size"])), jnp.float32),
    )
    call = jax.ffi.ffi_call("jax_anyprec_cpu_quantize", results)
    codes, scales = call(x, signs, act_bits=p["bits"], block=p["block"])
    return codes, scales


def _int_matmul_cpu(codes: jax.Array, planes: jax.Array, **p: Any) -> jax.Array:
    act_bits, group_size = p["act_bits"], p["group_size"]
    method = _method(p, codes, planes)
    m, k = codes.shape
    row = _native.cpu().module.workspace_row_bytes(k, group_size, group_size, act_bits, method)
    n, groups = output_columns(planes, p["columns"]), group_count(k, group_size)
    results = (
        jax.ShapeDtypeStruct((m, n, groups), jnp.int32),
        jax.ShapeDtypeStruct((m, row), jnp.uint8),
    )
    call = jax.ffi.ffi_call("jax_anyprec_cpu_int_matmul", results)
    return call(codes, planes, act_bits=act_bits, group_size=group_size, method=method)[0]


def _matmul_cpu(x: jax.Array, planes: jax.Array, *rest: jax.Array, **p: Any) -> jax.Array:
    m, k = x.shape
    act_bits = p["act_bits"] or 0
    method = _method(p, x, planes)
    row = _native.cpu().module.workspace_row_bytes(
        k, p["group_size"], p["act_group_size"], act_bits, method
    )
    results = (
        jax.ShapeDtypeStruct((m, output_columns(planes, p["columns"])), p["out_dtype"]),
        jax.ShapeDtypeStruct((m, row), jnp.uint8),  # scratch for the quantized activations
    )
    call = jax.ffi.ffi_call("jax_anyprec_cpu_matmul", results)
    return call(
        x, planes, *rest,
        act_bits=act_bits, group_size=p["group_size"], act_group_size=p["act_group_size"],
        block=p["block"], method=method,
    )[0]  # fmt: skip


def _method(p: Params, x: jax.Array, planes: jax.Array) -> str:
    isa = _native.cpu().module.isa()
    rows = x.shape[0] if isinstance(x.shape[0], int) else None  # a symbolic size is not
    bits = planes.shape[0 if p["columns"] is None else 2]
    return choose.cpu_method(p["act_bits"], bits, rows, isa, p["implementation"] or "").method


# --- abstract evaluation ---


def _quantize_abstract(x: ShapedArray, signs: ShapedArray, **p: Any) -> list[ShapedArray]:
    groups = group_count(x.shape[-1], p["group_size"])
    return [x.update(dtype=jnp.uint8), x.update(shape=(*x.shape[:-1], groups), dtype=jnp.float32)]


def _int_matmul_abstract(codes: ShapedArray, planes: ShapedArray, **p: Any) -> ShapedArray:
    groups = group_count(codes.shape[-1], p["group_size"])
    shape = (*codes.shape[:-1], output_columns(planes, p["columns"]), groups)
    return ShapedArray(shape, np.dtype(np.int32))


def _matmul_abstract(x: ShapedArray, planes: ShapedArray, *_: ShapedArray, **p: Any) -> ShapedArray:
    return ShapedArray((*x.shape[:-1], output_columns(planes, p["columns"])), p["out_dtype"])


# --- putting a primitive together ---


def _over_rows(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, which takes ``[M, K]``, for ``[..., K]``; and peaks like the rows."""

    def flat(x: jax.Array, *rest: jax.Array, **p: Any) -> Any:
        rows = x.shape[:-1]
        m = math.prod(rows)
        if len(rest) == 6 and rest[5].size:
            rest = (*rest[:5], rest[5].reshape(m))
        out = run(x.reshape(m, x.shape[-1]), *rest, **p)
        return jax.tree.map(lambda y: y.reshape(*rows, *y.shape[1:]), out)

    return flat


def _on_cpu(run_cpu: Callable[..., Any], run_xla: Callable[..., Any]) -> Callable[..., Any]:
    def run(*operands: Any, **p: Any) -> Any:
        implementation, backend = p["implementation"], _native.cpu()
        if implementation is None and backend.module is None:
            warnings.warn(
                f"jax_anyprec runs in plain XLA, which is slow: {backend.reason}", stacklevel=2
            )
        if implementation == "xla" or (implementation is None and backend.module is None):
            return run_xla(*operands, **p)
        return run_cpu(*operands, **p)

    return run


def _elsewhere(run_xla: Callable[..., Any]) -> Callable[..., Any]:
    def run(*operands: Any, **p: Any) -> Any:
        if p["implementation"] not in (None, "xla"):
            raise _native.Unavailable(
                f"implementation={p['implementation']!r} runs on CPU devices only"
            )
        return run_xla(*operands, **p)

    return run


def _define(
    name: str,
    abstract: Callable[..., Any],
    run_cpu: Callable[..., Any],
    run_xla: Callable[..., Any],
    multiple_results: bool = False,
) -> Primitive:
    primitive = Primitive(f"jax_anyprec_local_{name}")
    primitive.multiple_results = multiple_results
    primitive.def_abstract_eval(abstract)
    lower = functools.partial(mlir.lower_fun, multiple_results=multiple_results)
    on_cpu = _over_rows(_on_cpu(run_cpu, run_xla))
    mlir.register_lowering(primitive, lower(on_cpu), platform="cpu")
    mlir.register_lowering(primitive, lower(_over_rows(_elsewhere(run_xla))))
    return primitive


quantize_activations_p = _define(
    "quantize", _quantize_abstract, _quantize_cpu, _quantize_xla, multiple_results=True
)
int_matmul_p = _define("int_matmul", _int_matmul_abstract, _int_matmul_cpu, _int_matmul_xla)
matmul_p = _define("matmul", _matmul_abstract, _matmul_cpu, _matmul_xla)
