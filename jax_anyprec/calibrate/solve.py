"""Codes, scales and offsets of one matrix that keep its products, not its entries.

With inputs f of the float model, x of the quantized one, and their second moments, the products
``f W`` are approached by ``x Q``. Of all real Q the best is ``T = W + (x'x)^-1 x'(f - x) W``, and
others differ from it by ``tr((T - Q)' x'x (T - Q))`` (the asymmetric calibration of GPTAQ,
arXiv 2504.02692, in closed form); of T - W what chance adds is taken off. `solve` lowers that in
three steps: GPTQ (arXiv 2210.17323) rounds row after row and lets later rows make up for the errors
of earlier ones; scales and offsets are refitted in closed form; each code is moved to its best
value with all others fixed (coordinate descent, as in QuantEase, arXiv 2309.01885); the latter two
several times.

Codes of nested precisions serve them all, as their first planes have to in Any-Precision LLM (arXiv
2402.10517): codes are moved to where the sum of all precisions' errors is least, each as a part of
what such a precision loses anyway, and each precision has scales of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import format as fmt
from ..format import check_bits
from ..quantization import Quantization
from ..quantize import DISTORTION, Grid, choose_grid
from .moments import Moments

BLOCK = 32
"""Rows whose errors are carried to the others together; group sizes are multiples of it."""


@dataclasses.dataclass(frozen=True)
class Method:
    """How codes, scales and offsets are found.

    Args:
      damping: what is added to the diagonal of second moments, as a part of its mean, besides K
        over the number of inputs.
      sweeps: times that scales and offsets are refitted and all codes improved.
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
      grid: scales and offsets ``[N, groups]``.
      difference: ``float32[K, N]``, the weights, rotated, less what the codes stand for.
      shift: ``float32[N]``, mean of the float model's outputs less those of the packed one.
      error: ``float32[]``, ``|x T - x Q|**2 / |x T|**2``, what rounding does to the outputs.
      nested: scales and offsets ``[N, groups]`` for each of `Method.below`.
    """

    codes: jax.Array
    grid: Grid
    difference: jax.Array
    shift: jax.Array
    error: jax.Array
    nested: tuple[Grid, ...]


@functools.partial(jax.jit, static_argnames=("quantization", "method"))
def solve(
    weights: jax.Array, moments: Moments, quantization: Quantization, method: Method
) -> Solution:
    """Codes and grids for ``weights float[K, N]`` whose inputs have these `moments`."""
    assert quantization.weights is not None
    k = weights.shape[0]
    weights = weights.astype(jnp.float32)
    rotation = quantization.rotation(k)
    if rotation is not None:
        weights = rotation.apply(weights.T).T
    moment, target = _problem(weights, moments, method)
    pad = -k % BLOCK  # rows that are not there, whose values are 0
    group_size = quantization.group_size or k + pad
    bits = (quantization.weights, *method.below(quantization.weights))
    grids = _Grids(
        k, bits, group_size, quantization.scale_method, quantization.scale_dtype,
        quantization.offsets,
    )  # fmt: skip
    moment = jax.scipy.linalg.block_diag(moment, jnp.eye(pad)) if pad else moment
    every = grids.each(jnp.pad(target, ((0, pad), (0, 0))))
    codes, grid = _gptq(grids, every, moment)

    def sweep(_: int, state: tuple[jax.Array, Grid]) -> tuple[jax.Array, Grid]:
        codes, grid = state
        grid = _refit(grids, every, moment, codes, grid)
        return _descend(grids, every, moment, codes, grid), grid

    codes, grid = jax.lax.fori_loop(0, method.sweeps, sweep, (codes, grid))
    n = weights.shape[1]
    values = grids.values(codes, grid)[:k, :n]
    stored = grids.stored(grid, n)
    lower = grids.stored(_refit(grids, every, moment, codes, grid), n)
    return Solution(
        codes[:k],
        stored[0],
        weights - values,
        (moments.reference_sum @ weights - moments.own_sum @ values) / moments.rows,
        _energy(moments.own, target - values) / _energy(moments.own, target),
        lower[1:],
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
class _Grids:
    """The values that a column may have: K rows, padded to whole groups.

    Codes are of the first of `bits`, and are read at each. What they stand for at all of them lies
    side by side, a column for each and each of N outputs: P N columns.
    """

    k: int
    bits: tuple[int, ...]
    group_size: int
    scales: str
    scale_dtype: str
    offsets: bool

    def each(self, x: jax.Array) -> jax.Array:
        """``[..., N]`` once for each number of bits, ``[..., P N]``."""
        return jnp.concatenate([x] * len(self.bits), axis=-1)

    def largest(self, columns: int) -> jax.Array:
        """The largest code of each column, ``float32[P N]``."""
        each = [float(fmt.max_level(bits)) for bits in self.bits]
        return jnp.repeat(jnp.array(each), columns // len(self.bits))

    def choose(self, rows: jax.Array) -> Grid:
        """Grids ``float32[P N]`` for the rows ``[group_size, P N]`` of a group, which are alike.

        Cells of fewer bits are made of those of more, so a mean of what each would choose is taken.
        """
        # Transposed once, and not anew by each step of the search.
        n = rows.shape[1] // len(self.bits)
        columns = jax.lax.optimization_barrier(rows[:, :n].T)
        wishes = [choose_grid(columns, bits, self.scales, self.offsets) for bits in self.bits]
        if len(wishes) == 1:
            return self.kept(wishes[0])
        cells = [2.0 ** (self.bits[0] - bits) for bits in self.bits]
        shares = [wish.scales / cell for wish, cell in zip(wishes, cells, strict=True)]
        mean = math.prod(shares[1:], start=shares[0]) ** (1 / len(shares))
        scales = jnp.concatenate([mean * cell for cell in cells])
        if not self.offsets:
            return self.kept(Grid(scales, None))
        pairs = zip(wishes, self.bits, strict=True)
        centre = sum(wish.centres(fmt.max_level(bits)) for wish, bits in pairs) / len(wishes)
        return self.kept(Grid(scales, self.each(centre) - scales * self.largest(len(scales))))

    def kept(self, grid: Grid) -> Grid:
        """A grid as it will be stored, in float32."""
        kept = grid.kept(self.scale_dtype, self.largest(grid.scales.shape[-1]))
        return jax.tree.map(lambda x: x.astype(jnp.float32), kept)

    def stored(self, grid: Grid, n: int) -> tuple[Grid, ...]:
        """Grids ``[N, groups]`` for each number of bits, of ``[groups, P N]`` for all."""
        whole = jax.tree.map(lambda x: x.T.astype(self.scale_dtype), grid)
        return tuple(
            jax.tree.map(operator.itemgetter(slice(i * n, (i + 1) * n)), whole)
            for i in range(len(self.bits))
        )

    def encode(self, x: jax.Array, grid: Grid) -> jax.Array:
        """Codes ``[N]`` with values nearest to ``x [P N]``, errors as parts of `DISTORTION`."""
        x = x - grid.centres(self.largest(x.shape[-1]))
        if len(self.bits) == 1:
            return fmt.encode(x, grid.scales, self.bits[0])
        codes = jnp.arange(2 ** self.bits[0], dtype=jnp.uint8)[:, None]
        weight = jnp.array([1 / DISTORTION[bits] for bits in self.bits])
        levels = self.integers(codes)[..., None] * grid.scales.reshape(len(self.bits), -1)
        errors = jnp.square(levels - x.reshape(len(self.bits), -1)) * weight[:, None]
        return jnp.argmin(errors.sum(1), axis=0).astype(jnp.uint8)

    def integers(self, codes: jax.Array) -> jax.Array:
        """Codes ``[rows, N]`` as odd integers at all bits, ``int32[rows, P N]``."""
        return jnp.concatenate(
            [fmt.codes_to_ints(codes >> (self.bits[0] - bits), bits) for bits in self.bits], axis=-1
        )

    def there(self, rows: int, first: jax.Array | int) -> jax.Array:
        """Whether rows `first` and on are there, and not beyond K: ``bool[rows, 1]``."""
        return first + jnp.arange(rows)[:, None] < self.k

    def decode(self, codes: jax.Array, grid: Grid, first: jax.Array | int) -> jax.Array:
        """Values ``[rows, P N]`` of codes ``[rows, N]``, rows `first` and on; 0 past the last."""
        integers = self.integers(codes)
        values = integers * grid.scales + grid.centres(self.largest(integers.shape[-1]))
        return jnp.where(self.there(len(codes), first), values, 0.0)

    def values(self, codes: jax.Array, grid: Grid) -> jax.Array:
        """``float32[K, P N]`` of all codes and grids ``[groups, P N]``."""
        spread = jax.tree.map(lambda x: jnp.repeat(x, self.group_size, axis=0), grid)
        return self.decode(codes, spread, 0)


def _block_of(x: jax.Array, start: jax.Array, axis: int = 0) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, BLOCK, axis)


def _gptq(grids: _Grids, weights: jax.Array, moment: jax.Array) -> tuple[jax.Array, Grid]:
    """Codes ``[K, N]`` and grids ``[groups, P N]``: each row's error is carried to later rows."""
    k, columns = weights.shape
    n = columns // len(grids.bits)
    factor = _inverse_factor(moment)

    def round_group(group: jax.Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        weights, codes, grid = state
        first = group * grids.group_size
        chosen = grids.choose(jax.lax.dynamic_slice_in_dim(weights, first, grids.group_size))

        def round_block(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            weights, codes = state
            start = first + i * BLOCK
            local = _block_of(_block_of(factor, start), start, axis=1)

            def round_row(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                rows, found, errors = state
                code = grids.encode(rows[j], chosen)
                value = grids.decode(code[None], chosen, start + j)[0]
                error = (rows[j] - value) / local[j, j]
                later = jnp.where(jnp.arange(BLOCK) > j, local[:, j], 0)
                rows = rows - later[:, None] * error
                return rows, found.at[j].set(code), errors.at[j].set(error)

            zeros = jnp.zeros((BLOCK, n), jnp.uint8), jnp.zeros((BLOCK, columns))
            begin = (_block_of(weights, start), *zeros)
            _, found, errors = jax.lax.fori_loop(0, BLOCK, round_row, begin)
            later = jnp.arange(k)[:, None] >= start + BLOCK
            carried = jnp.where(later, _block_of(factor, start, axis=1), 0)
            codes = jax.lax.dynamic_update_slice_in_dim(codes, found, start, 0)
            return weights - carried @ errors, codes

        blocks = grids.group_size // BLOCK
        weights, codes = jax.lax.fori_loop(0, blocks, round_block, (weights, codes))
        return weights, codes, jax.tree.map(lambda all, one: all.at[group].set(one), grid, chosen)

    empty = jnp.zeros((k // grids.group_size, columns))
    begin = (
        weights,
        jnp.zeros((k, n), jnp.uint8),
        Grid(empty, empty if grids.offsets else None),
    )
    _, codes, grid = jax.lax.fori_loop(0, len(empty), round_group, begin)
    return codes, grid


def _inverse_factor(moment: jax.Array) -> jax.Array:
    """The lower triangular L with ``L L'`` the inverse of the moment."""
    factor = jax.scipy.linalg.cho_factor(moment, lower=True)
    inverse = jax.scipy.linalg.cho_solve(factor, jnp.eye(moment.shape[0]))
    return jnp.linalg.cholesky((inverse + inverse.T) / 2)


def _refit(
    grids: _Grids, weights: jax.Array, moment: jax.Array, codes: jax.Array, grid: Grid
) -> Grid:
    """The best grids ``[groups, P N]`` for these codes: for each column, a system of equations.

    Its unknowns are a scale for each group and, with offsets, a centre.
    """
    groups, n = grid.scales.shape
    there = jnp.broadcast_to(grids.there(len(codes), 0), weights.shape)
    unknowns = 2 if grids.offsets else 1
    kinds = [jnp.where(there, grids.integers(codes), 0.0), there.astype(jnp.float32)][:unknowns]
    shape = (groups, grids.group_size, n)
    parts = [kind.reshape(shape) for kind in kinds]
    now = [grid.scales, grid.centres(grids.largest(n))][:unknowns]

    def against(x: jax.Array) -> jax.Array:
        """Products of each part with ``x [K, P N]``, ``[unknowns, P N]``."""
        return jnp.concatenate([(part * x.reshape(shape)).sum(1) for part in parts])

    def equations(part: jax.Array) -> jax.Array:
        def equation(g: jax.Array) -> jax.Array:
            size = grids.group_size
            columns = jax.lax.dynamic_slice_in_dim(moment, g * size, size, 1)
            return against(columns @ part[g])

        return jax.lax.map(equation, jnp.arange(groups))

    matrices = jnp.moveaxis(jnp.concatenate([equations(part) for part in parts]), -1, 0)
    # Groups whose inputs are nearly dependent stay near to what they had.
    sizes = jnp.diagonal(matrices, axis1=-2, axis2=-1).reshape(n, len(parts), groups).mean(-1)
    ridge = 1e-3 * jnp.repeat(sizes, groups, axis=1)
    wanted = against(moment @ weights).T + ridge * jnp.concatenate(now).T
    matrices = matrices + ridge[..., None] * jnp.eye(ridge.shape[1])
    found = jnp.split(jnp.linalg.solve(matrices, wanted[..., None])[..., 0].T, len(parts))
    scales = jnp.clip(found[0], 0.5 * grid.scales, 2 * grid.scales)
    if not grids.offsets:
        return grids.kept(Grid(scales, None))
    return grids.kept(Grid(scales, found[1] - scales * grids.largest(n)))


def _descend(
    grids: _Grids, weights: jax.Array, moment: jax.Array, codes: jax.Array, grid: Grid
) -> jax.Array:
    """Codes after each was moved once to its best value, all others as they are by then."""
    k, columns = weights.shape
    gradient = moment @ (grids.values(codes, grid) - weights)

    def move_block(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        gradient, codes = state
        start = i * BLOCK
        own = jax.tree.map(lambda x: x[start // grids.group_size], grid)
        local = _block_of(_block_of(moment, start), start, axis=1)

        def move_row(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            slopes, chosen, moves = state
            value = grids.decode(chosen[j][None], own, start + j)[0]
            code = grids.encode(value - slopes[j] / local[j, j], own)
            move = grids.decode(code[None], own, start + j)[0] - value
            slopes = slopes + local[:, j][:, None] * move
            return slopes, chosen.at[j].set(code), moves.at[j].set(move)

        begin = (_block_of(gradient, start), _block_of(codes, start), jnp.zeros((BLOCK, columns)))
        _, chosen, moves = jax.lax.fori_loop(0, BLOCK, move_row, begin)
        codes = jax.lax.dynamic_update_slice_in_dim(codes, chosen, start, 0)
        return gradient + _block_of(moment, start, axis=1) @ moves, codes

    return jax.lax.fori_loop(0, k // BLOCK, move_block, (gradient, codes))[1]
