"""Matrices rounded to ggml's types, as llama.cpp would with or without an importance matrix."""

from __future__ import annotations

import ctypes
import math

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from . import ggml

Type = GGMLQuantizationType

FALLBACKS = {
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "Q2_K", "Q3_K"), "IQ4_NL"),
    "IQ4_XS": "IQ4_NL",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""What llama.cpp takes for rows that are no multiple of a type's block (llama-quant.cpp)."""


def type_for(name: str, k: int) -> Type:
    """The type of this name, or its fallback where it can't hold rows of K values."""
    block, _ = GGML_QUANT_SIZES[Type[name]]
    return Type[name if k % block == 0 else FALLBACKS[name]]


def bits_of(kind: Type) -> float:
    """Bits a weight, scales included."""
    block, size = GGML_QUANT_SIZES[kind]
    return 8 * size / block


def rounded(weights: np.ndarray, kind: Type, importance: np.ndarray | None) -> np.ndarray:
    """``float32[K, N]`` as this type holds it; `importance` ``float32[K]``, of the inputs.

    Where K is no multiple of the type's block, as many rows as are one are rounded as if they were
    one row, which llama.cpp does not do; N has to be a multiple of that many.
    """
    library, _ = ggml.load()
    block, _ = GGML_QUANT_SIZES[kind]
    join = block // math.gcd(block, weights.shape[0])
    rows = np.ascontiguousarray(weights.T, np.float32).reshape(weights.shape[1] // join, -1)
    n, k = rows.shape
    if importance is not None:
        importance = np.tile(importance, join)
    packed = np.empty(n * library.ggml_row_size(int(kind), k), np.uint8)
    weight = None if importance is None else np.ascontiguousarray(importance, np.float32)
    pointer = None if weight is None else weight.ctypes.data_as(ctypes.c_void_p)
    library.ggml_quantize_chunk(int(kind), rows.ctypes.data, packed.ctypes.data, 0, n, k, pointer)
    return dequantize(packed.reshape(n, -1), kind).reshape(weights.T.shape).T
