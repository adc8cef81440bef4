"""Tensor-core instructions: all warps at once.

In every shape a row of A is a row of 32-bit words (K from low bits to high), and lane 4 g + t holds
word t of row g in a0, of row g + 8 in a1, word t + 4 of these rows in a2 and a3; likewise for the
columns of B with b0 and b1; and of the result columns 2 t and 2 t + 1 of row g in c0 and c1, of row
g + 8 in c2 and c3. (PTX ISA, "Matrix Fragments for mma"; the same for b1, 8 and 16 bits.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .faults import Unsupported
from .floats import to_bits

Product = Callable[[np.ndarray, np.ndarray], np.ndarray]

WORDS = {"b1": 32, "s8": 4, "u8": 4, "f16": 2, "bf16": 2}
"""Elements in a word."""


def row_words(registers: Sequence[np.ndarray]) -> np.ndarray:
    """Fragments of 8 rows, ``uint32[lanes]`` each, to ``uint32[warps, 8, words]``."""
    parts = [r.reshape(-1, 8, 4) for r in registers]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, -1)


def a_words(registers: Sequence[np.ndarray]) -> np.ndarray:
    """A's 2 or 4 fragments to ``uint32[warps, 16, words]``."""
    return np.concatenate([row_words(registers[0::2]), row_words(registers[1::2])], 1)


def to_lanes(result: np.ndarray) -> np.ndarray:
    """``[warps, 16, 8]`` to the fragments c0 ... c3, ``[4, lanes]``."""
    warps = len(result)
    return result.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, warps * 32)


def bit_product(combine: np.ufunc) -> Product:
    """Ones of a row of A and a column of B combined."""

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a64 = np.ascontiguousarray(a).view(np.uint64)
        b64 = np.ascontiguousarray(b).view(np.uint64)
        out = np.zeros((len(a), 16, 8), np.uint32)
        for k in range(a64.shape[-1]):
            out += np.bitwise_count(combine(a64[:, :, None, k], b64[:, None, :, k]))
        return out

    return product


def byte_product(a_type: str, b_type: str) -> Product:
    """Integers of 8 bits; every sum is exact in float32."""
    types = {"s8": np.int8, "u8": np.uint8}

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(a).view(types[a_type]).astype(np.float32)
        y = np.ascontiguousarray(b).view(types[b_type]).astype(np.float32)
        return (x @ y.transpose(0, 2, 1)).astype(np.int32).view(np.uint32)

    return product


def half_values(words: np.ndarray, kind: str) -> np.ndarray:
    """Words to the floats of 16 bits in them, as ``float64``."""
    halves = np.ascontiguousarray(words).view(np.uint16)
    if kind == "f16":
        return halves.view(np.float16).astype(np.float64)
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def integer_mma(product: Product) -> Callable[..., np.ndarray]:
    """Sums wrap."""

    def call(
        a: Sequence[np.ndarray], b: Sequence[np.ndarray], c: Sequence[np.ndarray]
    ) -> np.ndarray:
        return to_lanes(product(a_words(a), row_words(b))) + np.stack(c)

    return call


def float_mma(kind: str) -> Callable[..., np.ndarray]:
    """The sum of all products and c, computed in float64, rounded once to float32."""

    def call(
        a: Sequence[np.ndarray], b: Sequence[np.ndarray], c: Sequence[np.ndarray]
    ) -> np.ndarray:
        x, y = half_values(a_words(a), kind), half_values(row_words(b), kind)
        total = to_lanes(x @ y.transpose(0, 2, 1)) + np.stack(c).view(np.float32)
        return to_bits(total, "f32")

    return call


def function(op: tuple[str, ...]) -> tuple[Callable[..., np.ndarray], int, int]:
    """The function of an mma, and how many registers A and B take."""
    shape = next((m for m in op if m.startswith("m16n8k")), "")
    types = [m for m in op if m in (*WORDS, "s32", "f32")]
    if not shape or "row" not in op or "col" not in op or len(types) != 4:
        raise Unsupported(".".join(op))
    result, a_type, b_type, accumulator = types
    words = int(shape.removeprefix("m16n8k")) // WORDS.get(a_type, 1)
    if words not in (4, 8) or result != accumulator or "satfinite" in op:
        raise Unsupported(".".join(op))
    counts = words // 2, words // 4
    if a_type == b_type == "b1" and result == "s32" and "popc" in op:
        combine = np.bitwise_and if "and" in op else np.bitwise_xor
        return integer_mma(bit_product(combine)), *counts
    if {a_type, b_type} <= {"s8", "u8"} and result == "s32":
        return integer_mma(byte_product(a_type, b_type)), *counts
    if a_type == b_type and a_type in ("f16", "bf16") and result == "f32":
        return float_mma(a_type), *counts
    raise Unsupported(".".join(op))
