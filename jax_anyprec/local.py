"""What one device runs: each operation as a primitive with native and plain XLA lowerings.

Operands are complete here: what is absent (offsets, bias, signs, peaks) is an array without
elements. `partition` calls these on whole operands, or on a device's part of them; derivatives and
batching are of the primitives above, in `primitive`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _native, choose, local_cpu, local_cuda, reference
from ._compat import Primitive, ShapedArray, mlir
from .operands import in_planes, output_columns, rotate
from .tensor import group_count


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


def _native_or_xla(
    platform: str, run_native: Callable[..., Any], run_xla: Callable[..., Any]
) -> Callable[..., Any]:
    """The native definition where it can run, plain XLA where that is asked for or nothing was."""

    def run(*operands: Any, **p: Any) -> Any:
        asked = p["implementation"]
        if asked == "xla":
            return run_xla(*operands, **p)
        _check_platform(asked, platform)
        try:
            return run_native(*operands, **p)
        except _native.Unavailable as why:
            if asked is not None:
                raise
            warnings.warn(f"jax_anyprec runs in plain XLA, which is slow: {why}", stacklevel=2)
            return run_xla(*operands, **p)

    return run


def _elsewhere(run_xla: Callable[..., Any]) -> Callable[..., Any]:
    def run(*operands: Any, **p: Any) -> Any:
        _check_platform(p["implementation"], "xla")
        return run_xla(*operands, **p)

    return run


def _check_platform(asked: str | None, platform: str) -> None:
    """`Unavailable` if an implementation was asked for that is another platform's."""
    if asked is not None and choose.platform_of(asked) not in (platform, "xla"):
        raise _native.Unavailable(
            f"implementation={asked!r} runs on {choose.platform_of(asked).upper()} devices only"
        )


def _define(
    name: str,
    abstract: Callable[..., Any],
    run_xla: Callable[..., Any],
    run_cpu: Callable[..., Any],
    run_cuda: Callable[..., Any],
    multiple_results: bool = False,
) -> Primitive:
    primitive = Primitive(f"jax_anyprec_local_{name}")
    primitive.multiple_results = multiple_results
    primitive.def_abstract_eval(abstract)

    def lower(run: Callable[..., Any], platform: str | None = None) -> None:
        rule = mlir.lower_fun(_over_rows(run), multiple_results=multiple_results)
        mlir.register_lowering(primitive, rule, platform=platform)

    lower(_elsewhere(run_xla))
    lower(_native_or_xla("cpu", run_cpu, run_xla), "cpu")
    lower(_native_or_xla("cuda", run_cuda, run_xla), "cuda")
    return primitive


quantize_activations_p = _define(
    "quantize",
    _quantize_abstract,
    _quantize_xla,
    local_cpu.quantize_activations,
    local_cuda.quantize_activations,
    multiple_results=True,
)
int_matmul_p = _define(
    "int_matmul",
    _int_matmul_abstract,
    _int_matmul_xla,
    local_cpu.int_matmul,
    local_cuda.int_matmul,
)
matmul_p = _define("matmul", _matmul_abstract, _matmul_xla, local_cpu.matmul, local_cuda.matmul)
