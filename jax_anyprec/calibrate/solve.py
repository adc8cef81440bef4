"""Codes and scales of one matrix that keep its products, not its entries.

With inputs f of the float model, x of the quantized one, and their second moments, the products
``f W`` are approached by ``x Q``. Of all real Q the best is ``T = W + (x'x)^-1 x'(f - x) W``, and
others differ from it by ``tr((T - Q)' x'x (T - Q))`` (the asymmetric calibration of GPTAQ,
arXiv 2504.02692, in closed form); of T - W what chance adds is taken off. `solve` lowers that in
three steps: GPTQ (arXiv 2210.17323) rounds row after row and lets later rows make up for the errors
of earlier ones; scales are refitted in closed form; each code is moved to its best value with all
others fixed (coordinate descent, as in QuantEase, arXiv 2309.01885); the latter two several times.

Codes of nested precisions serve them all, as their first planes have to in Any-Precision LLM (arXiv
2402.10517): codes are moved to where the sum of all precisions' errors is least, each as a part of
what such a precision loses anyway, and each precision has scales of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import format as fmt
from ..format import check_bits
from ..quantization import Quantization
from ..quantize import DISTORTION, choose_scales
from .moments import Moments

BLOCK = 32
"""Rows whose errors are carried to the others together; group sizes are multiples of it."""


@dataclasses.dataclass(frozen=True)
class Method:
    """How codes and scales are found.

    Args:
      damping: what is added to the diagonal of second moments, as a part of its mean, besides K
        over the number of inputs.
      sweeps: times that scales are refitted and all codes improved.
      cross: how much of the difference between the float model's inputs and the quantized model's
        is made up for, 0 to 1, of what outlasts chance; nothing of it where activations have fewer
        than 8 bits.
      correct_bias: whether biases make up for the mean error of outputs.
      nested: fewer bits at which weights are to serve too, by their first planes: each 1 to 7, in
        any order. Layers that have no more bits than that stay as they are at it.
    """

    damping: float = 0.01
    sweeps: int = 4
    cross: float = 1.0
    correct_bias: bool = True
    nested: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for bits in self.nested:
            check_bits(bits, "Method.nested")
        if self.nested and not self.sweeps:
            raise ValueError("Method.sweeps must be at least 1 where nested is given, got 0")

    def below(self, bits: int) -> tuple[int, ...]:
        """The precisions of `nested` that a weight of `bits` has, most bits first."""
        return tuple(sorted({each for each in self.nested if each < bits}, reverse=True))


class Solution(NamedTuple):
    """A packed matrix, and what it does to products.

    Attributes:
      codes: ``uint8[K, N]``.
      scales: ``[N, groups]``.
      difference: ``float32[K, N]``, the weights, rotated, less what the codes stand for.
      shift: ``float32[N]``, mean of the float model's outputs less those of the packed one.
      error: ``float32[]``, ``|x T - x Q|**2 / |x T|**2``, what rounding does to the outputs.
      nested: scales ``[N, groups]`` of each of `Method.below`.
    """

    codes: jax.Array
    scales: jax.Array
    difference: jax.Array
    shift: jax.Array
    error: jax.Array
    nested: tuple[jax.Array, ...]


@functools.partial(jax.jit, static_argnames=("quantization", "method"))
def solve(
    weights: jax.Array, moments: Moments, quantization: Quantization, method: Method
) -> Solution:
    """Codes and scales for ``weights float[K, N]`` whose inputs have these `moments`."""
    assert quantization.weights is not None
    k = weights.shape[0]
    weights = weights.astype(jnp.float32)
    rotation = quantization.rotation(k)
    if rotation is not None:
        weights = rotation.apply(weights.T).T
    moment, target = _problem(weights, moments, method)
    pad = -k % BLOCK  # rows that are not there, whose values are 0
    group_size = quantization.group_size or k + pad
    grid = _Grid(
        k, quantization.weights, group_size, quantization.scale_method, quantization.scale_dtype
    )
    target = jnp.pad(target, ((0, pad), (0, 0)))
    moment = jax.scipy.linalg.block_diag(moment, jnp.eye(pad)) if pad else moment
    grids = (grid, *(grid.truncated(bits) for bits in method.below(grid.bits)))
    codes, all_scales = _gptq(grids, target, moment)
    refit = functools.partial(_refit, weights=target, moment=moment)

    def sweep(_: int, state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        codes, scales = state
        scales = tuple(map(functools.partial(refit, codes=codes), grids, scales))
        return _descend(grids, target, moment, codes, scales), scales

    codes, all_scales = jax.lax.fori_loop(0, method.sweeps, sweep, (codes, all_scales))
    lower = tuple(map(functools.partial(refit, codes=codes), grids[1:], all_scales[1:]))
    values = grid.values(codes, all_scales[0])[:k]
    stored = [each.T.astype(quantization.scale_dtype) for each in (all_scales[0], *lower)]
    return Solution(
        codes[:k],
        stored[0],
        weights - values,
        (moments.reference_sum @ weights - moments.own_sum @ values) / moments.rows,
        _energy(moments.own, target[:k] - values) / _energy(moments.own, target[:k]),
        tuple(stored[1:]),
    )


def _energy(moment: jax.Array, weights: jax.Array) -> jax.Array:
    """The sum of squares of products with inputs of this second moment; not 0."""
    return jnp.maximum((weights * (moment @ weights)).sum(), 1e-30)


def _problem(weights: jax.Array, moments: Moments, method: Method) -> tuple[jax.Array, jax.Array]:
    """The damped second moment of inputs, of mean 1 on its diagonal, and T."""
    moment = _damped(moments.own, moments.rows, method)
    if method.cross == 0:
        return moment, weights
    shift = _shift(moments.own, moments.cross, moments.rows, weights, method)
    return moment, weights + method.cross * _lasting(weights, moments, method) * shift


def _damped(own: jax.Array, rows: jax.Array, method: Method) -> jax.Array:
    # Fewer inputs say less of other inputs. Rows that no input reaches keep their weights.
    damping = method.damping + own.shape[0] / rows
    return own / _size(own) + jnp.diag(jnp.where(jnp.diag(own) > 0, damping, 1.0))


def _size(own: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.mean(jnp.diag(own)), 1e-30)


def _shift(
    own: jax.Array, cross: jax.Array, rows: jax.Array, weights: jax.Array, method: Method
) -> jax.Array:
    """T - W as these inputs show it."""
    wanted = ((cross - own) / _size(own)) @ weights
    return jax.scipy.linalg.solve(_damped(own, rows, method), wanted, assume_a="pos")


def _lasting(weights: jax.Array, moments: Moments, method: Method) -> jax.Array:
    """The part of T - W, 0 to 1, that inputs other than those that show it would show too.

    It is fitted, so it follows chance as well. What half of the inputs show is tried on the other
    half: a part `a` of it is best there, and 2 a / (1 + a) of what all show, as they halve chance.
    """
    halves = [
        (moments.half_own, moments.half_cross),
        (moments.own - moments.half_own, moments.cross - moments.half_cross),
    ]
    gain = size = jnp.float32(0)
    for (own, cross), (other_own, other_cross) in (halves, halves[::-1]):
        shift = _shift(own, cross, moments.rows / 2, weights, method)
        gain += (shift * ((other_cross - other_own) @ weights)).sum()
        size += _energy(other_own, shift)
    part = jnp.clip(gain / size, 0, 1)
    return 2 * part / (1 + part)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The values that a column may have: K rows, padded to whole groups.

    Codes have `dropped` low bits more than the values heed.
    """

    k: int
    bits: int
    group_size: int
    scales: str
    scale_dtype: str
    dropped: int = 0

    def truncated(self, bits: int) -> _Grid:
        """Of the first `bits` planes."""
        return dataclasses.replace(self, bits=bits, dropped=self.bits - bits)

    def choose(self, rows: jax.Array) -> jax.Array:
        """Scales ``float32[N]`` for the rows ``[group_size, N]`` of a group."""
        # Transposed once, and not anew by each step of the search.
        columns = jax.lax.optimization_barrier(rows.T)
        return self.kept(choose_scales(columns, self.bits, self.scales))

    def kept(self, scales: jax.Array) -> jax.Array:
        """Scales as they will be stored."""
        return scales.astype(self.scale_dtype).astype(jnp.float32)

    def encode(self, x: jax.Array, scales: jax.Array) -> jax.Array:
        return fmt.encode(x, scales, self.bits)

    def decode(self, codes: jax.Array, scales: jax.Array, first: jax.Array | int) -> jax.Array:
        """Values of codes ``[rows, N]``, rows `first` and on; 0 past the last one."""
        there = first + jnp.arange(codes.shape[0])[:, None] < self.k
        return jnp.where(there, fmt.codes_to_ints(codes >> self.dropped, self.bits) * scales, 0.0)

    def values(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
        """``float32[K, N]`` of all codes and scales ``[groups, N]``."""
        return self.decode(codes, jnp.repeat(scales, self.group_size, axis=0), 0)


def _choose(grids: tuple[_Grid, ...], rows: jax.Array) -> list[jax.Array]:
    """Scales ``float32[N]`` of all grids for the rows of a group, from what each would choose.

    Cells of a truncated grid are those of the first, so a mean of all wishes is taken.
    """
    wishes = [grid.choose(rows) * 0.5**grid.dropped for grid in grids]
    mean = math.prod(wishes[1:], start=wishes[0]) ** (1 / len(grids)) if wishes[1:] else wishes[0]
    return [grid.kept(mean * 2**grid.dropped) for grid in grids]


def _block_of(x: jax.Array, start: jax.Array, axis: int = 0) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, BLOCK, axis)


def _gptq(
    grids: tuple[_Grid, ...], weights: jax.Array, moment: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Codes ``[K, N]``, and scales ``[groups, N]`` of each grid.

    Each row's error is carried to later rows, of each grid its own.
    """
    k, n = weights.shape
    every, size = range(len(grids)), grids[0].group_size
    factor = _inverse_factor(moment)

    def round_group(group: jax.Array, state: Any) -> Any:
        weights, codes, scales = state
        first = group * size
        scale = _choose(grids, jax.lax.dynamic_slice_in_dim(weights[0], first, size))

        def round_block(i: jax.Array, state: Any) -> Any:
            weights, codes = state
            start = first + i * BLOCK
            local = _block_of(_block_of(factor, start), start, axis=1)

            def round_row(j: jax.Array, state: Any) -> Any:
                rows, chosen, errors = state
                code = _nearest(grids, [rows[p][j] for p in every], scale)
                value = [grids[p].decode(code[None], scale[p], start + j)[0] for p in every]
                error = [(rows[p][j] - value[p]) / local[j, j] for p in every]
                later = jnp.where(jnp.arange(BLOCK) > j, local[:, j], 0)
                rows = tuple(rows[p] - later[:, None] * error[p] for p in every)
                errors = tuple(errors[p].at[j].set(error[p]) for p in every)
                return rows, chosen.at[j].set(code), errors

            begin = (
                tuple(_block_of(each, start) for each in weights),
                jnp.zeros((BLOCK, n), jnp.uint8),
                tuple(jnp.zeros((BLOCK, n)) for _ in every),
            )
            _, chosen, errors = jax.lax.fori_loop(0, BLOCK, round_row, begin)
            later = jnp.arange(k)[:, None] >= start + BLOCK
            carried = jnp.where(later, _block_of(factor, start, axis=1), 0)
            codes = jax.lax.dynamic_update_slice_in_dim(codes, chosen, start, 0)
            return tuple(weights[p] - carried @ errors[p] for p in every), codes

        weights, codes = jax.lax.fori_loop(0, size // BLOCK, round_block, (weights, codes))
        return weights, codes, tuple(scales[p].at[group].set(scale[p]) for p in every)

    groups = k // size
    begin = (
        (weights,) * len(grids),
        jnp.zeros((k, n), jnp.uint8),
        tuple(jnp.zeros((groups, n)) for _ in every),
    )
    _, codes, scales = jax.lax.fori_loop(0, groups, round_group, begin)
    return codes, scales


def _inverse_factor(moment: jax.Array) -> jax.Array:
    """The lower triangular L with ``L L'`` the inverse of the moment."""
    factor = jax.scipy.linalg.cho_factor(moment, lower=True)
    inverse = jax.scipy.linalg.cho_solve(factor, jnp.eye(moment.shape[0]))
    return jnp.linalg.cholesky((inverse + inverse.T) / 2)


def _refit(
    grid: _Grid, scales: jax.Array, *, weights: jax.Array, moment: jax.Array, codes: jax.Array
) -> jax.Array:
    """The best scales ``[groups, N]`` for these codes: for each column, a system of equations."""
    groups, n = scales.shape
    q = grid.values(codes, jnp.ones_like(scales)).reshape(groups, grid.group_size, n)
    wanted = (q * (moment @ weights).reshape(q.shape)).sum(1)

    def equation(g: jax.Array) -> jax.Array:
        columns = jax.lax.dynamic_slice_in_dim(moment, g * grid.group_size, grid.group_size, 1)
        return (q * (columns @ q[g]).reshape(q.shape)).sum(1)

    matrices = jnp.moveaxis(jax.lax.map(equation, jnp.arange(groups)), -1, 0)
    # Groups whose inputs are nearly dependent stay near to what they had.
    ridge = 1e-3 * jnp.trace(matrices, axis1=-2, axis2=-1) / groups
    matrices = matrices + ridge[:, None, None] * jnp.eye(groups)
    wanted = wanted.T + ridge[:, None] * scales.T
    found = jnp.linalg.solve(matrices, wanted[..., None])[..., 0].T
    return grid.kept(jnp.clip(found, 0.5 * scales, 2 * scales))


def _descend(
    grids: tuple[_Grid, ...],
    weights: jax.Array,
    moment: jax.Array,
    codes: jax.Array,
    scales: tuple[jax.Array, ...],
) -> jax.Array:
    """Codes after each was moved once to its best value, all others as they are by then.

    Of several grids of the same codes, the sum of errors in proportion to `DISTORTION` is lowered.
    """
    k, n = weights.shape
    every = range(len(grids))
    gradients = tuple(
        moment @ (g.values(codes, s) - weights) for g, s in zip(grids, scales, strict=True)
    )

    def move_block(i: jax.Array, state: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        gradients, codes = state
        start = i * BLOCK
        scale = [each[start // grids[0].group_size] for each in scales]
        local = _block_of(_block_of(moment, start), start, axis=1)

        def move_row(j: jax.Array, state: tuple[Any, jax.Array, Any]) -> tuple[Any, jax.Array, Any]:
            slopes, chosen, moves = state
            value = [grids[p].decode(chosen[j][None], scale[p], start + j)[0] for p in every]
            wanted = [value[p] - slopes[p][j] / local[j, j] for p in every]
            code = _nearest(grids, wanted, scale)
            new = [grids[p].decode(code[None], scale[p], start + j)[0] for p in every]
            move = [new[p] - value[p] for p in every]
            slopes = tuple(slopes[p] + local[:, j][:, None] * move[p] for p in every)
            moves = tuple(moves[p].at[j].set(move[p]) for p in every)
            return slopes, chosen.at[j].set(code), moves

        begin = (
            tuple(_block_of(each, start) for each in gradients),
            _block_of(codes, start),
            tuple(jnp.zeros((BLOCK, n)) for _ in every),
        )
        _, chosen, moves = jax.lax.fori_loop(0, BLOCK, move_row, begin)
        codes = jax.lax.dynamic_update_slice_in_dim(codes, chosen, start, 0)
        carried = _block_of(moment, start, axis=1)
        return tuple(gradients[p] + carried @ moves[p] for p in every), codes

    return jax.lax.fori_loop(0, k // BLOCK, move_block, (gradients, codes))[1]


def _nearest(
    grids: tuple[_Grid, ...], wanted: list[jax.Array], scales: list[jax.Array]
) -> jax.Array:
    """Codes ``[N]`` whose values on all grids are nearest to what is `wanted` there, ``[N]``."""
    if len(grids) == 1:
        return grids[0].encode(wanted[0], scales[0])
    codes = jnp.arange(2 ** grids[0].bits, dtype=jnp.uint8)[:, None]
    errors = [
        jnp.square(fmt.codes_to_ints(codes >> grid.dropped, grid.bits) * scale - want)
        / DISTORTION[grid.bits]
        for grid, want, scale in zip(grids, wanted, scales, strict=True)
    ]
    return jnp.argmin(sum(errors), axis=0).astype(jnp.uint8)
