"""The JAX primitives: abstract evaluation, lowering, batching and differentiation.

Operands are checked and flattened to two axes by `ops`; optional operands (offsets, bias) are
absent, and the static parameters say which. Each primitive has one definition, in `reference`,
which is also its lowering wherever no native one applies.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _native, choose, reference
from . import format as fmt
from ._compat import Primitive, ShapedArray, ad, batching, mlir
from .tensor import dequantize_rows, group_count

Params = dict[str, Any]


def quantize_activations(x: jax.Array, **params: Any) -> tuple[jax.Array, jax.Array]:
    """``float[M, K]`` -> ``uint8[M, K]``, ``float32[M, groups]``."""
    codes, scales = quantize_activations_p.bind(x, **params)
    return codes, scales


def int_matmul(codes: jax.Array, planes: jax.Array, **params: Any) -> jax.Array:
    """``uint8[M, K]``, ``uint32[bits, N, words]`` -> ``int32[M, N, groups]``."""
    return int_matmul_p.bind(codes, planes, **params)


def matmul(
    x: jax.Array,
    planes: jax.Array,
    scales: jax.Array,
    offsets: jax.Array | None,
    bias: jax.Array | None,
    **params: Any,
) -> jax.Array:
    """``float[M, K]`` and a packed ``[K, N]`` -> ``[M, N]`` in `out_dtype`.

    The packed operands are planes, or with ``columns=N`` those of a prepared tensor.
    """
    optional = [v for v in (offsets, bias) if v is not None]
    flags = {"has_offsets": offsets is not None, "has_bias": bias is not None}
    return matmul_p.bind(x, planes, scales, *optional, **flags, **params)


# --- definitions in plain XLA ---


def _quantize_reference(x: jax.Array, **p: Any) -> tuple[jax.Array, jax.Array]:
    return reference.quantize_activations(x, **_without(p, "implementation"))


def _int_matmul_reference(codes: jax.Array, planes: jax.Array, **p: Any) -> jax.Array:
    planes, _, _ = _in_planes(planes, None, None, p["columns"])
    return reference.int_matmul(codes, planes, **_without(p, "implementation", "columns"))


def _matmul_reference(*operands: jax.Array, **p: Any) -> jax.Array:
    dropped = ("implementation", "has_offsets", "has_bias", "columns")
    x, planes, scales, offsets, bias = _fill(operands, p)
    planes, scales, offsets = _in_planes(planes, scales, offsets, p["columns"])
    return reference.matmul(x, planes, scales, offsets, bias, **_without(p, *dropped))


def _in_planes(planes: Any, scales: Any, offsets: Any, columns: int | None) -> tuple[Any, Any, Any]:
    """Planes, scales and offsets (or None) of a tensor that may be prepared."""
    if columns is None:
        return planes, scales, offsets
    scales, offsets = (
        None if x is None else fmt.untile_groups(x, columns) for x in (scales, offsets)
    )
    return fmt.untile_planes(planes, columns), scales, offsets


def _without(params: Params, *names: str) -> Params:
    return {k: v for k, v in params.items() if k not in names}


def _fill(operands: tuple[Any, ...], params: Params, missing: Any = None) -> list[Any]:
    """All five operands of `matmul`, with `missing` for the absent ones."""
    rest = list(operands[3:])
    offsets = rest.pop(0) if params["has_offsets"] else missing
    bias = rest.pop(0) if params["has_bias"] else missing
    return [*operands[:3], offsets, bias]


# --- native definitions: one XLA custom call each ---


def _sign_words(rotation: Any, k: int) -> tuple[np.ndarray, int]:
    """Operand and attribute that carry a rotation: packed signs and block, or nothing and 0."""
    if rotation is None:
        return np.zeros(0, np.uint32), 0
    return rotation.sign_words(k), rotation.block


def _quantize_cpu(x: jax.Array, **p: Any) -> tuple[jax.Array, jax.Array]:
    m, k = x.shape
    signs, block = _sign_words(p["rotation"], k)
    results = (
        jax.ShapeDtypeStruct((m, k), jnp.uint8),
        jax.ShapeDtypeStruct((m, group_count(k, p["group_size"])), jnp.float32),
    )
    call = jax.ffi.ffi_call("jax_anyprec_cpu_quantize", results)
    codes, scales = call(x, signs, act_bits=p["bits"], block=block)
    return codes, scales


def _int_matmul_cpu(codes: jax.Array, planes: jax.Array, **p: Any) -> jax.Array:
    module = _native.cpu().module
    act_bits, group_size = p["act_bits"], p["group_size"]
    method = _method(p, codes, planes)
    (m, k), n = codes.shape, _columns(planes, p)
    groups = group_count(k, group_size)
    row = module.workspace_row_bytes(k, group_size, group_size, act_bits, method)
    results = (
        jax.ShapeDtypeStruct((m, n, groups), jnp.int32),
        jax.ShapeDtypeStruct((m, row), jnp.uint8),
    )
    call = jax.ffi.ffi_call("jax_anyprec_cpu_int_matmul", results)
    return call(codes, planes, act_bits=act_bits, group_size=group_size, method=method)[0]


def _matmul_cpu(*operands: jax.Array, **p: Any) -> jax.Array:
    absent = np.zeros(0, np.float32)
    x, planes, scales, offsets, bias = _fill(operands, p, absent)
    m, k = x.shape
    signs, block = _sign_words(p["rotation"], k)
    act_bits = p["act_bits"] or 0
    method = _method(p, x, planes)
    row = _native.cpu().module.workspace_row_bytes(
        k, p["group_size"], p["act_group_size"], act_bits, method
    )
    results = (
        jax.ShapeDtypeStruct((m, _columns(planes, p)), p["out_dtype"]),
        jax.ShapeDtypeStruct((m, row), jnp.uint8),  # scratch for the quantized activations
    )
    call = jax.ffi.ffi_call("jax_anyprec_cpu_matmul", results)
    return call(
        x, planes, scales, offsets, bias, signs,
        act_bits=act_bits, group_size=p["group_size"], act_group_size=p["act_group_size"],
        block=block, method=method,
    )[0]  # fmt: skip


def _method(p: Params, x: jax.Array, planes: jax.Array) -> str:
    isa = _native.cpu().module.isa()
    rows = x.shape[0] if isinstance(x.shape[0], int) else None  # a symbolic size is not
    bits = planes.shape[0 if p["columns"] is None else 2]
    return choose.cpu_method(p["act_bits"], bits, rows, isa, p["implementation"] or "").method


def _columns(planes: Any, p: Params) -> int:
    """N, the columns of the result."""
    return planes.shape[1] if p["columns"] is None else p["columns"]


# --- abstract evaluation ---


def _quantize_abstract(x: ShapedArray, **p: Any) -> list[ShapedArray]:
    m, k = x.shape
    groups = group_count(k, p["group_size"])
    return [ShapedArray((m, k), np.dtype(np.uint8)), ShapedArray((m, groups), np.dtype(np.float32))]


def _int_matmul_abstract(codes: ShapedArray, planes: ShapedArray, **p: Any) -> ShapedArray:
    groups = group_count(codes.shape[1], p["group_size"])
    return ShapedArray((codes.shape[0], _columns(planes, p), groups), np.dtype(np.int32))


def _matmul_abstract(x: ShapedArray, planes: ShapedArray, *_: ShapedArray, **p: Any) -> ShapedArray:
    return ShapedArray((x.shape[0], _columns(planes, p)), p["out_dtype"])


# --- batching ---


def _batch(
    primitive: Primitive, batched: tuple[Any, ...], dims: tuple[Any, ...], **p: Any
) -> tuple[Any, Any]:
    """A batch over the activations alone folds into M; any other is a loop over products."""
    only_x = dims[0] is not None and all(d is None for d in dims[1:])
    front = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(batched, dims, strict=True)]
    if only_x:
        x = front[0]
        flat = x.reshape(x.shape[0] * x.shape[1], x.shape[2])
        out = primitive.bind(flat, *front[1:], **p)
        split = lambda y: y.reshape(*x.shape[:2], *y.shape[1:])  # noqa: E731
        out = jax.tree.map(split, out)
    else:
        mapped = [x for x, d in zip(front, dims, strict=True) if d is not None]

        def one(mapped: list[Any]) -> Any:
            rest = iter(mapped)
            operands = [x if d is None else next(rest) for x, d in zip(front, dims, strict=True)]
            return primitive.bind(*operands, **p)

        out = jax.lax.map(one, mapped)
    return out, ([0] * len(out) if primitive.multiple_results else 0)


# --- differentiation of matmul ---


def _matmul_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...], **p: Any) -> tuple[Any, Any]:
    """Straight-through: quantizing the activations counts as the identity.

    The product is linear in scales, offsets and bias, so their tangents take part exactly.
    """
    out = matmul_p.bind(*primals, **p)
    x, planes, scales, offsets, _ = _fill(primals, p)
    x_dot, _, scales_dot, offsets_dot, bias_dot = _fill(tangents, p)
    terms = []
    if _nonzero(x_dot):
        weight_only = _without(p, "act_bits", "has_bias", "has_offsets")
        terms.append(matmul(x_dot, planes, scales, offsets, None, act_bits=None, **weight_only))
    if _nonzero(scales_dot) or _nonzero(offsets_dot):
        ds = scales_dot if _nonzero(scales_dot) else jnp.zeros_like(scales)
        if offsets is None:
            dm = None
        else:
            dm = offsets_dot if _nonzero(offsets_dot) else jnp.zeros_like(offsets)
        rows_dot = dequantize_rows(*_in_planes(planes, ds, dm, p["columns"]), x.shape[-1])
        term = reference.dot_rows(_seen_activations(x, p), rows_dot)
        terms.append(term.astype(p["out_dtype"]))
    if _nonzero(bias_dot):
        terms.append(jnp.broadcast_to(bias_dot.astype(p["out_dtype"]), out.shape))
    if not terms:
        return out, ad.Zero(jax.typeof(out).to_tangent_aval())
    return out, functools.reduce(jnp.add, terms)


def _nonzero(tangent: Any) -> bool:
    return tangent is not None and type(tangent) is not ad.Zero


def _seen_activations(x: jax.Array, p: Params) -> jax.Array:
    """Activations as the product sees them, ``float32[M, K]``: rotated, quantized, dequantized."""
    rotated = reference.rotate(x, p["rotation"])
    if p["act_bits"] is None:
        return rotated
    group_size = p["act_group_size"]
    codes, scales = reference.quantize_activations(
        x, bits=p["act_bits"], group_size=group_size, rotation=p["rotation"]
    )
    q = fmt.act_codes_to_ints(codes, p["act_bits"]).astype(jnp.float32)
    grouped = q.reshape(*scales.shape, group_size)
    seen = (grouped * scales[..., None]).reshape(x.shape)
    return rotated + jax.lax.stop_gradient(seen - rotated)


def _matmul_transpose(ct: Any, x: Any, planes: Any, scales: Any, *rest: Any, **p: Any) -> list[Any]:
    """Cotangent of float activations: ``ct @ W.T``, rotated back."""
    others = [None] * (2 + len(rest))
    linear_in_x = ad.is_undefined_primal(x) and p["act_bits"] is None and not p["has_bias"]
    if not linear_in_x or any(map(ad.is_undefined_primal, (planes, scales, *rest))):
        raise NotImplementedError(
            "matmul can be transposed with respect to x alone, with act_bits=None and no bias"
        )
    if type(ct) is ad.Zero:
        return [ad.Zero(x.aval), *others]
    k = x.aval.shape[-1]
    offsets = rest[0] if p["has_offsets"] else None
    rows = dequantize_rows(*_in_planes(planes, scales, offsets, p["columns"]), k)
    x_ct = jnp.matmul(ct.astype(jnp.float32), rows, precision="highest")
    if p["rotation"] is not None:
        x_ct = p["rotation"].invert(x_ct)
    return [x_ct.astype(x.aval.dtype), *others]


# --- putting a primitive together ---


def _lower_with(run_cpu: Callable[..., Any], run_xla: Callable[..., Any]) -> tuple[Any, Any]:
    """Lowering functions for the CPU and for every other platform."""

    def on_cpu(*operands: Any, **p: Any) -> Any:
        implementation = p["implementation"]
        backend = _native.cpu()
        if implementation is None and backend.module is None:
            warnings.warn(
                f"jax_anyprec runs in plain XLA, which is slow: {backend.reason}", stacklevel=2
            )
        if implementation == "xla" or (implementation is None and backend.module is None):
            return run_xla(*operands, **p)
        return run_cpu(*operands, **p)

    def elsewhere(*operands: Any, **p: Any) -> Any:
        if p["implementation"] not in (None, "xla"):
            raise _native.Unavailable(
                f"implementation={p['implementation']!r} runs on CPU devices only"
            )
        return run_xla(*operands, **p)

    return on_cpu, elsewhere


def _define(
    name: str,
    abstract: Callable[..., Any],
    run_cpu: Callable[..., Any],
    run_xla: Callable[..., Any],
    multiple_results: bool = False,
) -> Primitive:
    primitive = Primitive(f"jax_anyprec_{name}")
    primitive.multiple_results = multiple_results
    primitive.def_abstract_eval(abstract)
    on_cpu, elsewhere = _lower_with(run_cpu, run_xla)
    lower = functools.partial(mlir.lower_fun, multiple_results=multiple_results)
    mlir.register_lowering(primitive, lower(on_cpu), platform="cpu")
    mlir.register_lowering(primitive, lower(elsewhere))
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)

    @functools.lru_cache(maxsize=512)
    def compiled(params: tuple[tuple[str, Any], ...]) -> Any:
        return jax.jit(functools.partial(primitive.bind, **dict(params)))

    def run_eagerly(*operands: Any, **p: Any) -> Any:
        # A call outside of jit is a jitted one, under jax.disable_jit too.
        with jax.disable_jit(False):
            return compiled(tuple(sorted(p.items())))(*operands)

    primitive.def_impl(run_eagerly)
    return primitive


quantize_activations_p = _define(
    "quantize", _quantize_abstract, _quantize_cpu, _quantize_reference, multiple_results=True
)
int_matmul_p = _define("int_matmul", _int_matmul_abstract, _int_matmul_cpu, _int_matmul_reference)
matmul_p = _define("matmul", _matmul_abstract, _matmul_cpu, _matmul_reference)
ad.primitive_jvps[matmul_p] = _matmul_jvp
ad.primitive_transposes[matmul_p] = _matmul_transpose
