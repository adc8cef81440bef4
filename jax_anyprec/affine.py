"""Integers of other formats, ``W = step u + minimum``, as a `QuantizedTensor` without loss."""

from __future__ import annotations

import numpy as np

from .tensor import QuantizedTensor


def from_affine(
    codes: np.ndarray, step: np.ndarray, minimum: np.ndarray, *, bits: int
) -> QuantizedTensor:
    """Pack ``step u + minimum``; scales ``step / 2`` and offsets ``minimum``.

    Where a step is negative the codes of its group are reversed, because the scales of a
    `QuantizedTensor` are not negative (ggml writes such steps); ``minimum + step (2**bits - 1)``
    then takes the place of the minimum.

    Args:
      codes: ``uint8[N, K]``.
      step: ``float32[N, groups]``, between neighbouring codes; finite.
      minimum: like `step`, the value of code 0.
      bits: 1 to 8.

    Returns:
      A `QuantizedTensor` of shape ``(K, N)`` in NumPy arrays. Scales and offsets are each float16
      where that is exact for all of them, else float32.
    """
    negative = step < 0
    if negative.any():
        top = np.uint8(2**bits - 1)
        grouped = codes.reshape(*step.shape, -1)
        codes = np.where(negative[..., None], top - grouped, grouped).reshape(codes.shape)
        minimum = np.where(negative, minimum + step * np.float32(top), minimum)
        step = np.abs(step)
    scales, offsets = _smallest_exact(step * np.float32(0.5)), _smallest_exact(minimum)
    return QuantizedTensor.from_codes(codes, scales, offsets, bits=bits)


def _smallest_exact(values: np.ndarray) -> np.ndarray:
    """As float16 if that loses nothing, else as they are, float32."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return half if (half == values).all() else values
