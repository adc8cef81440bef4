"""How operations are split over the devices of a mesh: which of their axes belong together.

A rule names the factors of each axis, as Shardy does: the axis of x over K is ``(parts, unit)``,
and so is the axis of the packed words, so cutting K cuts both at the same place, between whole
words, scale groups and rotation blocks. From one rule follow the partitioner's propagation, the
operands of each device, and the sharding of results under explicit axes.

A device runs the operation of `local` on its part. Only a split of K needs communication: products
are summed, and where all of K has one activation scale, its largest magnitude is agreed on first,
so that the integers are those of a single device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from . import format as fmt
from . import local
from .operands import absent, rotate
from .tensor import group_count

Params = dict[str, Any]


class Factor(NamedTuple):
    """A named part of an axis; size 0 where that is a symbol."""

    name: str
    size: int
    role: Literal["split", "sum", "whole"] = "split"
    """May be cut and stays cut in the result; may be cut, and the results summed; can't be cut."""


CUT_K = "u"
"""The factor of K that counts the parts it may be cut in."""

Axis = tuple[Factor, ...]
"""Factors of an axis, the slowest first; it is the one that may be cut."""


class Rule(NamedTuple):
    """The axes of each operand and result."""

    operands: tuple[tuple[Axis, ...], ...]
    results: tuple[tuple[Axis, ...], ...]


# --- the rules of our operations ---


class _Contraction:
    """K in parts that may lie on different devices, each `unit` long: whole words and groups."""

    def __init__(self, k: int, unit: int, role: Literal["split", "sum"]):
        fits = unit > 0 and unit % fmt.WORD_BITS == 0 and k % unit == 0
        self.parts = Factor(CUT_K, max(1, k // unit) if fits else 1, role)

    def axis(self, length: int, name: str) -> Axis:
        """The axis of `length` entries over all of K; one entry for all of it is not cut."""
        if length == 1:
            return (Factor(name, 1, "whole"),)
        return (self.parts, Factor(name, length // self.parts.size, "whole"))


def _rows(x: jax.Array) -> tuple[Axis, ...]:
    sizes = (size if isinstance(size, int) else 0 for size in x.shape[:-1])
    return tuple((Factor(f"m{i}", size),) for i, size in enumerate(sizes))


def _columns(planes: jax.Array, columns: int | None) -> tuple[Axis, Axis]:
    """The axis of N as results have it, and as packed operands have it."""
    if columns is None:
        n = (Factor("n", planes.shape[1]),)
        return n, n
    tiles = planes.shape[0]
    if columns != tiles * fmt.TILE:  # the last tile is padded
        return (Factor("n", columns, "whole"),), (Factor("t", tiles, "whole"),)
    t = Factor("t", tiles)
    return (t, Factor("l", fmt.TILE, "whole")), (t,)


def _packed(
    planes: jax.Array,
    groups: jax.Array | None,
    over_k: _Contraction,
    packed_n: Axis,
    prepared: bool,
) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """Axes of planes, and of scales or offsets."""
    lane = (Factor("l", fmt.TILE, "whole"),)
    if prepared:
        word = over_k.axis(planes.shape[1], "w")
        bits = (Factor("b", planes.shape[2], "whole"),)
        planes_axes: tuple[Axis, ...] = (packed_n, word, bits, lane)
    else:
        word = over_k.axis(planes.shape[2], "w")
        planes_axes = ((Factor("b", planes.shape[0], "whole"),), packed_n, word)
    if groups is None:
        return planes_axes, ()
    group = over_k.axis(groups.shape[1], "g")
    return planes_axes, (packed_n, group, lane) if prepared else (packed_n, group)


def matmul_rule(x: Any, planes: Any, scales: Any, optional: Params, p: Params) -> Rule:
    """Of `local.matmul`; `optional` are the operands that are present, in order."""
    k = x.shape[-1]
    unit = fmt.WORD_BITS if p["group_size"] == k else p["group_size"]
    over_k = _Contraction(k, math.lcm(unit, fmt.WORD_BITS, p["block"] or 1), "sum")
    n, packed_n = _columns(planes, p["columns"])
    planes_axes, groups_axes = _packed(planes, scales, over_k, packed_n, p["columns"] is not None)
    axes = {"offsets": groups_axes, "bias": (n,)}
    if "signs" in optional:
        axes["signs"] = (over_k.axis(optional["signs"].shape[0], "w"),)
    operands = ((*_rows(x), over_k.axis(k, "r")), planes_axes, groups_axes)
    return Rule((*operands, *(axes[name] for name in optional)), ((*_rows(x), n),))


def int_matmul_rule(codes: Any, planes: Any, p: Params) -> Rule:
    """Of `local.int_matmul`."""
    k = codes.shape[-1]
    groups = group_count(k, p["group_size"])
    unit = fmt.WORD_BITS if groups == 1 else p["group_size"]
    over_k = _Contraction(k, unit, "sum" if groups == 1 else "split")
    n, packed_n = _columns(planes, p["columns"])
    planes_axes, _ = _packed(planes, None, over_k, packed_n, p["columns"] is not None)
    return Rule(
        ((*_rows(codes), over_k.axis(k, "r")), planes_axes),
        ((*_rows(codes), n, over_k.axis(groups, "g")),),
    )


def quantize_rule(x: Any, optional: Params, p: Params) -> Rule:
    """Of `local.quantize_activations`."""
    k = x.shape[-1]
    over_k = _Contraction(k, math.lcm(p["group_size"], p["block"] or 1), "split")
    rows, axis = _rows(x), over_k.axis(k, "r")
    groups = over_k.axis(group_count(k, p["group_size"]), "g")
    signs = [(over_k.axis(s.shape[0], "w"),) for s in optional.values()]
    return Rule(((*rows, axis), *signs), ((*rows, axis), (*rows, groups)))


# --- what follows from a rule ---


def shardy_rule(rule: Rule) -> tuple[str, dict[str, Any]]:
    """The rule in the notation of `custom_partitioning`, and its keyword arguments."""
    seen: dict[str, Factor] = {}
    alone: set[str] = set()

    def text(axis: Axis) -> str:
        factors = [f for f in axis if f.size != 1] or [axis[-1]]
        for f in factors:
            seen.setdefault(f.name, f)
        if len(factors) == 1:
            alone.add(factors[0].name)
            return factors[0].name
        return f"({' '.join(f.name for f in factors)})"

    sides = [
        ", ".join(" ".join(map(text, axes)) for axes in side)
        for side in (rule.operands, rule.results)
    ]
    named = lambda role: tuple(f.name for f in seen.values() if f.role == role)  # noqa: E731
    sizes = {name: f.size for name, f in seen.items() if name not in alone}
    options = {"reduction_factors": named("sum"), "need_replication_factors": named("whole")}
    return " -> ".join(sides), {**options, **sizes}


def assign(
    rule: Rule, specs: Sequence[Sequence[Any]], size_of: Callable[[Any], int]
) -> dict[str, Any]:
    """Mesh axes of each factor that the operands with these specs are cut in.

    An axis of the mesh goes to the first factor that has it, and to none that it does not divide.
    Weights come before activations, so what a product does follows from how they lie, and they
    never move.
    """
    chosen: dict[str, Any] = {}
    taken: set[Any] = set()
    activations, *weights = zip(rule.operands, specs, strict=True)
    for axes, spec in (*weights, activations):
        for axis, names in zip(axes, (*spec, *[None] * len(axes)), strict=False):
            major = axis[0]
            parts = names if isinstance(names, tuple) else (names,)
            if names is None or major.role == "whole" or major.name in chosen:
                continue
            if taken.isdisjoint(parts) and major.size % math.prod(map(size_of, parts)) == 0:
                chosen[major.name] = names
                taken.update(parts)
    return chosen


def specs_of(side: tuple[tuple[Axis, ...], ...], chosen: dict[str, Any]) -> list[PartitionSpec]:
    """The spec of each operand or result."""
    return [PartitionSpec(*(chosen.get(axis[0].name) for axis in axes)) for axes in side]


def split(
    rule: Rule, whole: Callable[..., Any], part: Callable[[Any], Callable[..., Any]]
) -> Callable[..., Any]:
    """An operation that devices share.

    Args:
      rule: its axes.
      whole: from all operands to the result, or a tuple of results.
      part: given the mesh axes that K is cut in (None: it is not), what a device runs on its
        operands.
    """

    def specs(shapes: Any) -> list[Any]:
        # Under a partly manual shard_map, shardings come without a spec.
        return [getattr(s.sharding, "spec", ()) for s in shapes]

    def shardings(mesh: Any, side: Any, chosen: dict[str, Any]) -> list[Any]:
        return [NamedSharding(mesh, spec) for spec in specs_of(side, chosen)]

    def results(mesh: Any, chosen: dict[str, Any]) -> Any:
        found = shardings(mesh, rule.results, chosen)
        return tuple(found) if len(found) > 1 else found[0]

    def infer(mesh: Any, args: Any, _: Any) -> Any:
        return results(mesh, assign(rule, specs(args), mesh.shape.__getitem__))

    def partition(mesh: Any, args: Any, _: Any) -> Any:
        chosen = assign(rule, specs(args), mesh.shape.__getitem__)
        operands = tuple(shardings(mesh, rule.operands, chosen))

        def run(*operands: jax.Array) -> Any:
            # A device's part is no array over the mesh of the context, whose axes may be explicit.
            with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
                return part(chosen.get(CUT_K))(*operands)

        return mesh, run, results(mesh, chosen), operands

    shared = custom_partitioning(whole)
    text, options = shardy_rule(rule)
    shared.def_partition(
        partition, infer_sharding_from_operands=infer, sharding_rule=text, **options
    )
    return shared


# --- our operations, split ---


def quantize_activations(x: jax.Array, signs: jax.Array, **p: Any) -> tuple[jax.Array, jax.Array]:
    """`local.quantize_activations` over devices."""
    if 0 in x.shape:
        return local.quantize_activations(x, signs, **p)
    optional = _present(signs=signs)

    def run(x: jax.Array, *given: jax.Array) -> tuple[jax.Array, jax.Array]:
        signs = given[0] if given else absent(np.uint32)
        return local.quantize_activations(x, signs, **p)

    return split(quantize_rule(x, optional, p), run, lambda _: run)(x, *optional.values())


def int_matmul(codes: jax.Array, planes: jax.Array, **p: Any) -> jax.Array:
    """`local.int_matmul` over devices."""
    if 0 in (*codes.shape, *planes.shape):
        return local.int_matmul(codes, planes, **p)
    k = codes.shape[-1]

    def run(names: Any, codes: jax.Array, planes: jax.Array) -> jax.Array:
        y = local.int_matmul(codes, planes, **_on_part(p, k, codes, planes))
        return jax.lax.psum(y, names) if names and p["group_size"] == k else y

    part = lambda names: functools.partial(run, names)  # noqa: E731
    return split(int_matmul_rule(codes, planes, p), part(None), part)(codes, planes)


def matmul(
    x: jax.Array,
    planes: jax.Array,
    scales: jax.Array,
    offsets: jax.Array,
    bias: jax.Array,
    signs: jax.Array,
    **p: Any,
) -> jax.Array:
    """`local.matmul` over devices."""
    if 0 in (*x.shape, *planes.shape):
        return local.matmul(x, planes, scales, offsets, bias, signs, absent(), **p)
    k = x.shape[-1]
    optional = _present(offsets=offsets, bias=bias, signs=signs)

    def run(names: Any, x: jax.Array, planes: jax.Array, scales: jax.Array, *rest: Any) -> Any:
        given = dict(zip(optional, rest, strict=True))
        offsets, bias = (given.get(name, absent()) for name in ("offsets", "bias"))
        signs, peaks = given.get("signs", absent(np.uint32)), absent()
        q = _on_part(p, k, x, planes)
        if not names:
            return local.matmul(x, planes, scales, offsets, bias, signs, peaks, **q)
        if p["act_bits"] is not None and p["act_group_size"] == k:
            x, signs, q["block"] = rotate(x, signs, p["block"]), absent(np.uint32), 0
            peaks = _largest(x, names)
        q["out_dtype"] = np.dtype(np.float32)
        y = local.matmul(x, planes, scales, offsets, absent(), signs, peaks, **q)
        y = jax.lax.psum(y, names)
        if bias.size:
            y = y + bias.astype(jnp.float32)
        return y.astype(p["out_dtype"])

    part = lambda names: functools.partial(run, names)  # noqa: E731
    rule = matmul_rule(x, planes, scales, optional, p)
    return split(rule, part(None), part)(x, planes, scales, *optional.values())


def _present(**operands: jax.Array) -> dict[str, jax.Array]:
    return {name: value for name, value in operands.items() if value.size}


def _on_part(p: Params, k: int, x: jax.Array, planes: jax.Array) -> Params:
    """Parameters for a device's part of operands that had `k` values along K.

    A group that was all of K is all of the part, and a prepared part has the columns of its tiles.
    """
    columns = p["columns"]
    if columns is not None and columns % fmt.TILE == 0:
        columns = planes.shape[0] * fmt.TILE
    sizes: Params = {
        name: x.shape[-1] if p[name] == k else p[name]
        for name in ("group_size", "act_group_size")
        if name in p
    }
    return {**p, **sizes, "columns": columns}


def _largest(x: jax.Array, names: Any) -> jax.Array:
    """Largest magnitude of each row over all devices, ``float32[...]``; NaN if any is."""
    return fmt.bits_float(jax.lax.pmax(fmt.largest_bits(x), names))
