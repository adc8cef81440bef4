"""The JAX primitives: abstract evaluation, batching and differentiation.

Operands are checked by `ops`; optional operands (offsets, bias) are absent, and the static
parameters say which. `partition` says how devices share an operation, `local` what one of them
runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from . import format as fmt
from . import partition, reference
from ._compat import Primitive, ShapedArray, ad, batching, mlir, needs_devices, varying_axes
from .operands import absent, in_planes, output_columns, sign_words
from .tensor import dequantize_rows, group_count

Params = dict[str, Any]


def quantize_activations(x: jax.Array, **params: Any) -> tuple[jax.Array, jax.Array]:
    """``float[..., K]`` -> ``uint8[..., K]``, ``float32[..., groups]``."""
    codes, scales = quantize_activations_p.bind(x, **params)
    return codes, scales


def int_matmul(codes: jax.Array, planes: jax.Array, **params: Any) -> jax.Array:
    """``uint8[..., K]``, ``uint32[bits, N, words]`` -> ``int32[..., N, groups]``."""
    return int_matmul_p.bind(*_alike(codes, planes), **params)


def matmul(
    x: jax.Array,
    planes: jax.Array,
    scales: jax.Array,
    offsets: jax.Array | None,
    bias: jax.Array | None,
    **params: Any,
) -> jax.Array:
    """``float[..., K]`` and a packed ``[K, N]`` -> ``[..., N]`` in `out_dtype`.

    The packed operands are planes, or with ``columns=N`` those of a prepared tensor.
    """
    optional = [v for v in (offsets, bias) if v is not None]
    flags = {"has_offsets": offsets is not None, "has_bias": bias is not None}
    return matmul_p.bind(*_alike(x, planes, scales, *optional), **flags, **params)


def _alike(*operands: jax.Array) -> list[jax.Array]:
    """Operands that all vary over the mesh axes of a shard_map that any of them varies over.

    So derivatives of those that did not are summed over these axes.
    """
    axes = [varying_axes(x) for x in operands]
    missing = [frozenset().union(*axes) - own for own in axes]
    return [
        jax.lax.pcast(x, tuple(sorted(names)), to="varying") if names else x
        for x, names in zip(operands, missing, strict=True)
    ]


# --- lowering ---


def _quantize(x: jax.Array, *, rotation: Any, **p: Any) -> tuple[jax.Array, jax.Array]:
    signs, block = sign_words(rotation, x.shape[-1])
    return partition.quantize_activations(x, signs, block=block, **p)


def _matmul(*operands: jax.Array, rotation: Any, **p: Any) -> jax.Array:
    x, planes, scales, offsets, bias = _fill(operands, p, absent())
    signs, block = sign_words(rotation, x.shape[-1])
    params = _without(p, "has_offsets", "has_bias")
    return partition.matmul(x, planes, scales, offsets, bias, signs, block=block, **params)


def _without(params: Params, *names: str) -> Params:
    return {k: v for k, v in params.items() if k not in names}


def _fill(operands: tuple[Any, ...], params: Params, missing: Any = None) -> list[Any]:
    """All five operands of `matmul`, with `missing` for the absent ones."""
    rest = list(operands[3:])
    offsets = rest.pop(0) if params["has_offsets"] else missing
    bias = rest.pop(0) if params["has_bias"] else missing
    return [*operands[:3], offsets, bias]


# --- abstract evaluation ---


def _typed(
    rule: partition.Rule, operands: tuple[Any, ...], results: list[tuple[Any, Any]]
) -> list[ShapedArray]:
    """Results of these shapes and dtypes, cut over a mesh with explicit axes as operands are."""
    like = next((x for x in operands if not x.sharding.mesh.empty), None)
    if like is None:
        return [ShapedArray(shape, np.dtype(dtype)) for shape, dtype in results]
    specs = [x.sharding.spec for x in operands]
    chosen = partition.assign(rule, specs, like.sharding.mesh.shape.__getitem__)
    return [
        like.update(
            shape=shape,
            dtype=np.dtype(dtype),
            weak_type=False,
            sharding=like.sharding.update(spec=spec),
        )
        for (shape, dtype), spec in zip(
            results, partition.specs_of(rule.results, chosen), strict=True
        )
    ]


def _quantize_abstract(x: ShapedArray, **p: Any) -> list[ShapedArray]:
    shape = (*x.shape[:-1], group_count(x.shape[-1], p["group_size"]))
    rotation = p["rotation"]
    rule = partition.quantize_rule(x, {}, {**p, "block": rotation.block if rotation else 0})
    return _typed(rule, (x,), [(x.shape, np.uint8), (shape, np.float32)])


def _int_matmul_abstract(codes: ShapedArray, planes: ShapedArray, **p: Any) -> ShapedArray:
    groups = group_count(codes.shape[-1], p["group_size"])
    shape = (*codes.shape[:-1], output_columns(planes, p["columns"]), groups)
    rule = partition.int_matmul_rule(codes, planes, p)
    return _typed(rule, (codes, planes), [(shape, np.int32)])[0]


def _matmul_abstract(*operands: ShapedArray, **p: Any) -> ShapedArray:
    x, planes, scales, offsets, bias = _fill(operands, p)
    shape = (*x.shape[:-1], output_columns(planes, p["columns"]))
    optional = {
        name: value for name, value in (("offsets", offsets), ("bias", bias)) if value is not None
    }
    rotation = p["rotation"]
    params = {**p, "block": rotation.block if rotation else 0}
    rule = partition.matmul_rule(x, planes, scales, optional, params)
    return _typed(rule, operands, [(shape, p["out_dtype"])])[0]


# --- batching ---


def _batch(
    primitive: Primitive, batched: tuple[Any, ...], dims: tuple[Any, ...], **p: Any
) -> tuple[Any, Any]:
    """A batch over the activations alone is one more axis of theirs; any other is a loop."""
    only_x = dims[0] is not None and all(d is None for d in dims[1:])
    front = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(batched, dims, strict=True)]
    if only_x:
        out = primitive.bind(*front, **p)
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
        rows_dot = dequantize_rows(*in_planes(planes, ds, dm, p["columns"]), x.shape[-1])
        out_sharding = _explicit(jax.typeof(out))
        term = reference.dot_rows(_seen_activations(x, p), rows_dot, out_sharding)
        terms.append(term.astype(p["out_dtype"]))
    if _nonzero(bias_dot):
        terms.append(jnp.broadcast_to(bias_dot.astype(p["out_dtype"]), out.shape))
    if not terms:
        return out, ad.Zero(jax.typeof(out).to_tangent_aval())
    return out, functools.reduce(jnp.add, terms)


def _explicit(aval: ShapedArray) -> Any:
    """The sharding of an array if its mesh has explicit axes, for products; else None."""
    explicit = AxisType.Explicit in aval.sharding.mesh.axis_types
    return aval.sharding if explicit else None


def _nonzero(tangent: Any) -> bool:
    return tangent is not None and type(tangent) is not ad.Zero


def _seen_activations(x: jax.Array, p: Params) -> jax.Array:
    """Activations as the product sees them, ``float32[..., K]``: rotated, rounded."""
    rotated = reference.rotate(x, p["rotation"])
    if p["act_bits"] is None:
        return rotated
    group_size = p["act_group_size"]
    codes, scales = reference.quantize_activations(
        rotated, bits=p["act_bits"], group_size=group_size, rotation=None
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
    rows = dequantize_rows(*in_planes(planes, scales, offsets, p["columns"]), k)
    contract = (((ct.ndim - 1,), (0,)), ((), ()))
    x_ct = jax.lax.dot_general(
        ct.astype(jnp.float32), rows, contract, precision="highest", out_sharding=_explicit(x.aval)
    )
    if p["rotation"] is not None:
        x_ct = p["rotation"].invert(x_ct)
    return [x_ct.astype(x.aval.dtype), *others]


def _refuse_to_differentiate(*_: Any, **__: Any) -> Any:
    raise NotImplementedError(
        "quantize_activations rounds and has no derivative; matmul has one, straight through the "
        "rounding, and jax.lax.stop_gradient(x) takes x as a constant"
    )


# --- putting a primitive together ---


def define(
    name: str,
    abstract: Callable[..., Any],
    run: Callable[..., Any],
    multiple_results: bool = False,
) -> Primitive:
    """A primitive that each platform lowers as `run` says, with batching and evaluation."""
    primitive = Primitive(f"jax_anyprec_{name}")
    primitive.multiple_results = multiple_results
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=multiple_results))
    needs_devices(primitive)  # because the partitioner does
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


quantize_activations_p = define("quantize", _quantize_abstract, _quantize, multiple_results=True)
int_matmul_p = define("int_matmul", _int_matmul_abstract, partition.int_matmul)
matmul_p = define("matmul", _matmul_abstract, _matmul)
ad.primitive_jvps[quantize_activations_p] = _refuse_to_differentiate
ad.primitive_jvps[matmul_p] = _matmul_jvp
ad.primitive_transposes[matmul_p] = _matmul_transpose
