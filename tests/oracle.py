"""Independent definitions in NumPy and Python integers, and the error bounds of float results.

Nothing here imports jax_anyprec: what the package computes is checked against a second derivation
from docs/format.md, not against itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

F32_ROUNDOFF = 2.0**-24
OUT_ROUNDOFF = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Relative error of the last cast; the one to float32 counts among the float32 roundings."""
OUT_TINY = {"float32": 0.0, "bfloat16": 2.0**-133, "float16": 2.0**-24}
"""Absolute error of the last cast where its result is subnormal."""

ZERO_BITS = 4
"""Activations of so many bits and more are even integers."""
MIN_SCALE, MAX_SCALE, ZERO_LEVEL = 2.0**-100, 2.0**100, 2.0**-24
SEGMENT = 2**15
"""Longest stretch of K that a kernel sums before it applies scales."""


# --- layout, one bit at a time ---


def planes_of(codes: list[list[int]], bits: int) -> list[list[list[int]]]:
    """Rows of codes to planes[bit][row][word], all Python integers."""
    planes = []
    for i in reversed(range(bits)):
        plane = []
        for row in codes:
            packed = sum(((code >> i) & 1) << k for k, code in enumerate(row))
            words = -(-len(row) // 32)
            plane.append([(packed >> (32 * j)) & 0xFFFFFFFF for j in range(words)])
        planes.append(plane)
    return planes


def odd_integer(code: int, bits: int) -> int:
    """The integer of a code by its bits: each contributes plus or minus its weight."""
    return sum(2**i if code >> i & 1 else -(2**i) for i in range(bits))


def ints(codes: np.ndarray, bits: int) -> np.ndarray:
    """`odd_integer` of an array, ``int64``."""
    return 2 * codes.astype(np.int64) - (2**bits - 1)


def act_integer(code: int, bits: int) -> int:
    """The integer of an activation's code: from ZERO_BITS on one less, which is even."""
    return odd_integer(code, bits) - (bits >= ZERO_BITS)


def act_ints(codes: np.ndarray, bits: int) -> np.ndarray:
    """`act_integer` of an array, ``int64``."""
    return ints(codes, bits) - (bits >= ZERO_BITS)


# --- products ---


def int_product(
    x: np.ndarray, act_bits: int, w: np.ndarray, weight_bits: int, group_size: int
) -> np.ndarray:
    """Codes ``[M, K]`` and ``[N, K]`` to the sums of each group, ``int64[M, N, groups]``."""
    m, k = x.shape
    groups = k // group_size if k else 1
    qx = act_ints(x, act_bits).reshape(m, groups, group_size)
    qw = ints(w, weight_bits).reshape(len(w), groups, group_size)
    return np.einsum("mgk,ngk->mng", qx, qw)


def int_product_slowly(
    x: np.ndarray, act_bits: int, w: np.ndarray, weight_bits: int, group_size: int
) -> list[list[list[int]]]:
    """The same in Python integers."""
    k = x.shape[1]
    starts = range(0, k, group_size) if k else [0]
    qx = [[act_integer(int(u), act_bits) for u in row] for row in x]
    qw = [[odd_integer(int(u), weight_bits) for u in row] for row in w]

    def dot(a: list[int], b: list[int], start: int) -> int:
        return sum(p * q for p, q in zip(a[start:][:group_size], b[start:][:group_size]))  # noqa: B905

    return [[[dot(a, b, start) for start in starts] for b in qw] for a in qx]


# --- the activation quantizer, to the bit ---


def signs(seed: int, k: int) -> np.ndarray:
    """Signs ``float32[k]`` of a rotation: bits of MurmurHash3's finalizer over word numbers."""

    def word(j: int) -> int:
        h = (seed * 0x9E3779B1 + j) % 2**32
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        return h ^ (h >> 16)

    return np.array([-1.0 if word(i // 32) >> (i % 32) & 1 else 1.0 for i in range(k)], np.float32)


def rotate(x: np.ndarray, block: int, seed: int) -> np.ndarray:
    """``float32[..., K]`` times random signs, then the Hadamard transform of each block.

    Sums at distance 1, 2, 4, ... in float32, then one product with 1 / sqrt(block).
    """
    x = x * signs(seed, x.shape[-1])
    at = np.arange(x.shape[-1])
    h = 1
    while h < block:
        upper = (at & h) != 0
        partner = x[..., at ^ h]
        x = np.where(upper, partner - x, x + partner)
        h *= 2
    return x * np.float32(1 / math.sqrt(block))


def hadamard_matrix(block: int) -> np.ndarray:
    """The orthonormal Hadamard matrix, entry by entry: parity of the common bits."""
    parity = [[(i & j).bit_count() % 2 for j in range(block)] for i in range(block)]
    return (1 - 2 * np.array(parity, np.float64)) / math.sqrt(block)


@np.errstate(all="ignore")
def encode_one(x: np.float32, scale: np.float32, bits: int) -> int:
    """Code of one value: one float32 product, floor, clip."""
    return encode([x], scale, bits)[0]


def levels(values: Iterable[np.float32], scale: np.float32) -> list[float]:
    """Values in steps between codes: one float32 product each, with 0 for scales out of range."""
    usable = MIN_SCALE <= scale <= MAX_SCALE
    inverse = np.float32(0.5) / scale if usable else np.float32(0)
    return [float(np.float32(x) * inverse) for x in values]


def encode(values: Iterable[np.float32], scale: np.float32, bits: int) -> list[int]:
    """Codes of values that share a scale."""
    largest, half = 2**bits - 1, 2 ** (bits - 1)

    def code(level: float) -> int:
        if math.isnan(level):
            return 0
        if math.isinf(level):
            return 0 if level < 0 else largest
        steps = 0 if abs(level) < ZERO_LEVEL else math.floor(level)
        return min(max(steps + half, 0), largest)

    return [code(level) for level in levels(values, scale)]


@np.errstate(all="ignore")
def act_encode(values: Iterable[np.float32], scale: np.float32, bits: int) -> list[int]:
    """Codes of activations that share a scale: from ZERO_BITS on to the nearest even integer."""
    if bits < ZERO_BITS:
        return encode(values, scale, bits)
    half = 2 ** (bits - 1)

    def code(level: float) -> int:
        if math.isnan(level):
            return 1
        if math.isinf(level):
            return 1 if level < 0 else 2 * half - 1
        return min(max(round(level) + half, 1), 2 * half - 1)  # round: ties to even

    return [code(level) for level in levels(values, scale)]


@np.errstate(all="ignore")
def quantize_activations(
    x: np.ndarray, bits: int, group_size: int, rotation: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Codes ``uint8[M, K]`` and scales ``float32[M, groups]`` of ``[M, K]``."""
    x = x.astype(np.float32)
    if rotation is not None:
        x = rotate(x, *rotation)
    m, k = x.shape
    codes = np.zeros((m, k), np.uint8)
    scales = np.zeros((m, k // group_size if k else 1), np.float32)
    for i in range(m):
        for g in range(k // group_size if k else 0):
            part = slice(g * group_size, (g + 1) * group_size)
            largest = np.max(np.abs(x[i, part]))  # NaN if one is NaN
            scale = largest * np.float32(1 / (2**bits - 1 - (bits >= ZERO_BITS)))
            if not scale <= MAX_SCALE:
                scale = np.float32(np.nan)
            elif scale < MIN_SCALE:
                scale = np.float32(0)
            scales[i, g] = scale
            codes[i, part] = act_encode(x[i, part], scale, bits)
    return codes, scales


# --- float products in float64, with the error that float32 may add ---


class Bounded(NamedTuple):
    """A result in float64 and the largest error that a right implementation can have."""

    value: np.ndarray
    error: np.ndarray

    def check(self, actual: np.ndarray) -> None:
        actual = np.asarray(actual).astype(np.float64)
        assert actual.shape == self.value.shape
        wrong = ~(np.abs(actual - self.value) <= self.error)
        assert not wrong.any(), (
            f"{wrong.sum()} of {wrong.size} outside of the bound; worst ratio "
            f"{np.max(np.abs(actual - self.value) / np.maximum(self.error, 1e-300)):.3g}"
        )


def gamma(roundings: int) -> float:
    """Largest relative error after so many float32 roundings (Higham, lemma 3.1)."""
    return roundings * F32_ROUNDOFF / (1 - roundings * F32_ROUNDOFF)


def rows_of(
    codes: np.ndarray, bits: int, scales: np.ndarray, offsets: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows ``float64[N, K]`` and, element by element, the size of the terms that make them.

    A kernel sums over codes and corrects for the zero point, so its terms are 2 s u and s L (or
    2 s u and the offset), or s q and s L + offset: never above 2 s L + |offset|, L = 2**bits - 1.
    """
    k = codes.shape[1]
    repeat = k // scales.shape[-1]  # 0 of an empty K: no element
    s = np.repeat(scales.astype(np.float64), repeat, axis=-1)
    largest = 2 * s * (2**bits - 1)
    if offsets is None:
        return s * ints(codes, bits), largest
    z = np.repeat(offsets.astype(np.float64), repeat, axis=-1)
    return 2 * s * codes + z, largest + np.abs(z)


def segments(k: int, group_size: int) -> int:
    """Stretches of K over which a kernel sums before it applies scales."""
    return (k // group_size if k else 0) * -(-group_size // SEGMENT)


def quantized_matmul(
    x: tuple[np.ndarray, int, np.ndarray],
    w: tuple[np.ndarray, int, np.ndarray, np.ndarray | None],
    bias: np.ndarray | None,
    out_dtype: str,
) -> Bounded:
    """``(codes, bits, scales)`` of activations by ``(codes, bits, scales, offsets)`` of weights.

    Float32 roundings on the way of a term into the result: its integer sum is exact in a segment
    and rounds once where it is converted [1]; weight scale [1]; the centre s L + offset [2] times
    the activation sum [1] and its addition [1]; activation scale [1]; the sum over segments [one
    each]; bias [1]; last cast, counted apart. A group beyond int32 is summed by XLA in float32, one
    rounding for each value.
    """
    codes, act_bits, act_scales = x
    k = codes.shape[1]
    rows, sizes = rows_of(*w)
    group_size = k // w[2].shape[-1] if k else 0
    s = np.repeat(act_scales.astype(np.float64), k // act_scales.shape[-1], axis=-1)
    values = s * act_ints(codes, act_bits)
    fits = group_size * (2**act_bits) * (2 ** w[1] - 1) < 2**31
    roundings = 8 + (segments(k, group_size) if fits else k)
    return _bounded(values, rows, sizes, roundings, bias, out_dtype)


def float_matmul(
    x: np.ndarray,
    act_group: int,
    w: tuple[np.ndarray, int, np.ndarray, np.ndarray | None],
    bias: np.ndarray | None,
    out_dtype: str,
) -> Bounded:
    """Product of float32 activations ``[M, K]`` (rotated already) with packed weights.

    A kernel takes the activations as integers c = rint(x F / largest), F = 0x7f7f7f, of each
    `act_group` values. That cuts them to half a unit, 2**-24 of the largest. Float32 roundings on
    the way of a term into the result: F / largest [1], its product with x [1], largest / F [1], the
    sums of three digits [1 each where they are converted, 1 each where they are added], weight
    scale or centre [2], their product [1], the addition of both [1], activation scale [1], bias
    [1]: 14 at most with the addition over segments [1 each]. XLA cuts nothing, forms the row [2]
    and sums K products in an order of its own [K + 2]. The larger of the two errors counts.
    """
    x = x.astype(np.float64)
    m, k = x.shape
    rows, sizes = rows_of(*w)
    groups = k // act_group if k else 0
    largest = np.abs(x.reshape(m, groups, act_group)).max(-1, initial=0)
    largest[~np.isfinite(largest)] = 0
    cut = F32_ROUNDOFF * np.repeat(largest, act_group, axis=-1) @ sizes.T
    kernel = _bounded(
        x, rows, sizes, 14 + segments(k, k // w[2].shape[-1] if k else 0), bias, out_dtype, cut
    )
    xla = _bounded(x, rows, sizes, k + 4, bias, out_dtype)
    return Bounded(kernel.value, np.maximum(kernel.error, xla.error))


def _bounded(
    values: np.ndarray,
    rows: np.ndarray,
    sizes: np.ndarray,
    roundings: int,
    bias: np.ndarray | None,
    out_dtype: str,
    cut: np.ndarray | float = 0.0,
) -> Bounded:
    y = values @ rows.T
    size = np.abs(values) @ sizes.T
    if bias is not None:
        y = y + bias.astype(np.float64)
        size = size + np.abs(bias.astype(np.float64))
    error = gamma(roundings) * size + cut + values.shape[1] * 2.0**-126  # a flushed subnormal each
    cast = OUT_ROUNDOFF[out_dtype] * (np.abs(y) + error) + OUT_TINY[out_dtype]
    return Bounded(y, error + cast)
