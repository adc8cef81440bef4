"""Codes and scales of one matrix that keep its products, not its entries.

With inputs f of the float model, x of the quantized one, and their second moments, the products
``f W`` are approached by ``x Q``. Of all real Q the best is ``T = W + (x'x)^-1 x'(f - x) W``, and
others differ from it by ``tr((T - Q)' x'x (T - Q))`` (the asymmetric calibration of GPTAQ,
arXiv 2504.02692, in closed form). `solve` lowers that in three steps: GPTQ (arXiv 2210.17323)
rounds row after row and lets later rows make up for the errors of earlier ones; scales are refitted
in closed form; each code is moved to its best value with all others fixed (coordinate descent, as
in QuantEase, arXiv 2309.01885); the latter two several times over.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import format as fmt
from ..quantize import choose_scales
from .moments import Moments

BLOCK = 32
"""Rows whose errors are carried to the others together; group sizes are multiples of it."""


@dataclasses.dataclass(frozen=True)
class Method:
    """How codes and scales are found.

    Args:
      damping: what is added to the diagonal of second moments, as a part of its mean.
      sweeps: times that scales are refitted and all codes improved.
      cross: how much of the difference between the float model's inputs and the quantized model's
        is made up for, 0 to 1.
      scale_dtype: of the scales.
      correct_bias: whether biases make up for the mean error of outputs.
    """

    damping: float = 0.01
    sweeps: int = 4
    cross: float = 1.0
    scale_dtype: str = "float16"
    correct_bias: bool = True


class Solution(NamedTuple):
    """A packed matrix, and what it does to products.

    Attributes:
      codes: ``uint8[K, N]``.
      scales: ``[N, groups]``.
      shift: ``float32[N]``, mean of the float model's outputs less those of the packed one.
      error: ``float32[]``, squared error of the outputs as a part of their squares.
    """

    codes: jax.Array
    scales: jax.Array
    shift: jax.Array
    error: jax.Array


@functools.partial(jax.jit, static_argnames=("method", "bits", "group_size", "scales"))
def solve(
    weights: jax.Array,
    moments: Moments,
    method: Method,
    *,
    bits: int,
    group_size: int,
    scales: str,
) -> Solution:
    """Codes and scales for ``weights float32[K, N]``.

    Args:
      weights: rotated as inputs are.
      moments: of the inputs.
      bits: 1 to 8.
      group_size: rows that share a scale, K or a multiple of `BLOCK` that divides K.
      scales: how GPTQ chooses scales, "mse" or "absmax".
    """
    k = weights.shape[0]
    moment, target = _problem(weights, moments, method)
    pad = -k % BLOCK  # of rows that are not there, whose values are 0
    grid = _Grid(k, bits, group_size if group_size < k else k + pad, scales, method.scale_dtype)
    target = jnp.pad(target, ((0, pad), (0, 0)))
    moment = jax.scipy.linalg.block_diag(moment, jnp.eye(pad)) if pad else moment
    codes, chosen = _gptq(grid, target, moment)
    for _ in range(method.sweeps):
        chosen = _refit(grid, target, moment, codes, chosen)
        codes = _descend(grid, target, moment, codes, chosen)
    values = grid.values(codes, chosen)[:k]
    shift = (moments.reference_sum @ weights - moments.own_sum @ values) / moments.rows
    return Solution(
        codes[:k], chosen.T.astype(method.scale_dtype), shift, _error(weights, values, moments)
    )


def _problem(weights: jax.Array, moments: Moments, method: Method) -> tuple[jax.Array, jax.Array]:
    """The damped second moment of inputs, of mean 1 on its diagonal, and T."""
    size = jnp.maximum(jnp.mean(jnp.diag(moments.own)), 1e-30)
    # Rows that no input reaches keep their weights.
    ridge = jnp.where(jnp.diag(moments.own) > 0, method.damping, 1.0)
    moment = moments.own / size + jnp.diag(ridge)
    if method.cross == 0:
        return moment, weights
    difference = (moments.cross - moments.own) / size
    shift = jax.scipy.linalg.solve(moment, difference @ weights, assume_a="pos")
    return moment, weights + method.cross * shift


def _error(weights: jax.Array, values: jax.Array, moments: Moments) -> jax.Array:
    """``|f W - x Q|**2 / |f W|**2`` summed over inputs."""
    exact = (weights * (moments.reference @ weights)).sum()
    mixed = (values * (moments.cross @ weights)).sum()
    own = (values * (moments.own @ values)).sum()
    return (exact - 2 * mixed + own) / jnp.maximum(exact, 1e-30)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The values that a column may have: K rows, padded to whole groups."""

    k: int
    bits: int
    group_size: int
    scales: str
    scale_dtype: str

    def choose(self, rows: jax.Array) -> jax.Array:
        """Scales ``float32[N]`` for the rows ``[group_size, N]`` of a group."""
        return self.kept(choose_scales(rows.T, self.bits, self.scales))

    def kept(self, scales: jax.Array) -> jax.Array:
        """Scales as they will be stored."""
        return scales.astype(self.scale_dtype).astype(jnp.float32)

    def encode(self, x: jax.Array, scales: jax.Array) -> jax.Array:
        return fmt.encode(x, scales, self.bits)

    def decode(self, codes: jax.Array, scales: jax.Array, first: jax.Array | int) -> jax.Array:
        """Values of codes ``[rows, N]``, rows `first` and on; 0 past the last one."""
        there = first + jnp.arange(codes.shape[0])[:, None] < self.k
        return jnp.where(there, fmt.codes_to_ints(codes, self.bits) * scales, 0.0)

    def values(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
        """``float32[K, N]`` of all codes and scales ``[groups, N]``."""
        return self.decode(codes, jnp.repeat(scales, self.group_size, axis=0), 0)


def _block_of(x: jax.Array, start: jax.Array, axis: int = 0) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, BLOCK, axis)


def _gptq(grid: _Grid, weights: jax.Array, moment: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes ``[K, N]`` and scales ``[groups, N]``: each row's error is carried to later rows."""
    k, n = weights.shape
    factor = _inverse_factor(moment)

    def round_block(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        weights, codes, scales = state
        start = i * BLOCK
        group = start // grid.group_size
        first = group * grid.group_size
        scales = jax.lax.cond(
            start == first,
            lambda: scales.at[group].set(
                grid.choose(jax.lax.dynamic_slice_in_dim(weights, first, grid.group_size))
            ),
            lambda: scales,
        )
        local = _block_of(_block_of(factor, start), start, axis=1)

        def round_row(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            rows, chosen, errors = state
            code = grid.encode(rows[j], scales[group])
            value = grid.decode(code[None], scales[group], start + j)[0]
            error = (rows[j] - value) / local[j, j]
            later = jnp.where(jnp.arange(BLOCK) > j, local[j], 0)
            rows = rows - later[:, None] * error
            return rows, chosen.at[j].set(code), errors.at[j].set(error)

        begin = (_block_of(weights, start), jnp.zeros((BLOCK, n), jnp.uint8), jnp.zeros((BLOCK, n)))
        _, chosen, errors = jax.lax.fori_loop(0, BLOCK, round_row, begin)
        carried = jnp.where(jnp.arange(k) >= start + BLOCK, _block_of(factor, start), 0)
        codes = jax.lax.dynamic_update_slice_in_dim(codes, chosen, start, 0)
        return weights - carried.T @ errors, codes, scales

    begin = (weights, jnp.zeros((k, n), jnp.uint8), jnp.zeros((k // grid.group_size, n)))
    _, codes, scales = jax.lax.fori_loop(0, k // BLOCK, round_block, begin)
    return codes, scales


def _inverse_factor(moment: jax.Array) -> jax.Array:
    """The upper triangular U with ``U' U`` the inverse of the moment."""
    factor = jax.scipy.linalg.cho_factor(moment, lower=True)
    inverse = jax.scipy.linalg.cho_solve(factor, jnp.eye(moment.shape[0]))
    return jnp.linalg.cholesky((inverse + inverse.T) / 2).T


def _refit(
    grid: _Grid, weights: jax.Array, moment: jax.Array, codes: jax.Array, scales: jax.Array
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
    grid: _Grid, weights: jax.Array, moment: jax.Array, codes: jax.Array, scales: jax.Array
) -> jax.Array:
    """Codes after each was moved once to its best value, all others as they are by then."""
    k, n = weights.shape
    gradient = moment @ (grid.values(codes, scales) - weights)

    def move_block(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        gradient, codes = state
        start = i * BLOCK
        scale = scales[start // grid.group_size]
        local = _block_of(_block_of(moment, start), start, axis=1)

        def move_row(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            slopes, chosen, moves = state
            value = grid.decode(chosen[j][None], scale, start + j)[0]
            code = grid.encode(value - slopes[j] / local[j, j], scale)
            move = grid.decode(code[None], scale, start + j)[0] - value
            slopes = slopes + local[:, j][:, None] * move
            return slopes, chosen.at[j].set(code), moves.at[j].set(move)

        begin = (_block_of(gradient, start), _block_of(codes, start), jnp.zeros((BLOCK, n)))
        _, chosen, moves = jax.lax.fori_loop(0, BLOCK, move_row, begin)
        codes = jax.lax.dynamic_update_slice_in_dim(codes, chosen, start, 0)
        return gradient + _block_of(moment, start, axis=1) @ moves, codes

    return jax.lax.fori_loop(0, k // BLOCK, move_block, (gradient, codes))[1]
