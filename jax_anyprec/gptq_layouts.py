"""How GPTQ, AWQ and compressed-tensors lay the integers of a linear layer out in 32-bit words.

Ground truth: AutoGPTQ's ``QuantLinear.pack``, AutoAWQ's ``WQLinear_GEMM`` and ``WQLinear_GEMV``,
and compressed-tensors' ``pack_to_int32``. Tensors are not trusted: dtypes and shapes are checked
before anything is unpacked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from .gptq_config import Scheme
from .safetensors import CheckpointError
from .tensor import check_group_size

INTEGERS = (np.dtype(np.int32), np.dtype(np.int64))
FLOATS = tuple(np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32))

WORD = 32
AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of its word holds each of eight columns in AWQ's "gemm" layout."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer ``scales (codes - zeros)``.

    Args:
      codes: ``uint8[N, K]``.
      scales: ``float[N, groups]``.
      zeros: ``uint8[N, groups]``.
      g_idx: the group of each of K features, ``int[K]``; None for stretches in order.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    g_idx: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Parts:
    """The tensors of one layer, checked as they are taken.

    Args:
      tensors: by name.
      name: of the layer.
      scheme: of the checkpoint.
    """

    tensors: Mapping[str, np.ndarray]
    name: str
    scheme: Scheme

    def shape(self) -> tuple[int, int]:
        """``(K, N)``, as the shapes of the tensors have it."""
        bits = self.scheme.bits
        if self.scheme.layout == "pack_quantized":
            n, k = (int(size) for size in self.take("weight_shape", INTEGERS, (2,)))
            if n <= 0 or k <= 0:
                raise self.error(f"has weight_shape {[n, k]}, whose sizes must be positive")
            return k, n
        rows, columns = self.words("qweight", (None, None)).shape
        if self.scheme.layout == "awq_gemm":
            return rows, columns * WORD // bits
        if self.scheme.layout == "awq_gemv":
            return columns * WORD // bits, rows
        if rows * WORD % bits or columns * bits % WORD:
            raise self.error(
                f"has qweight of shape {[rows, columns]}, which {bits}-bit words don't fill"
            )
        return rows * WORD // bits, columns

    def layer(self) -> Layer:
        """The layer, unpacked."""
        k, n = self.shape()
        try:
            groups = k // check_group_size(self.scheme.group_size, k)
        except ValueError as error:
            raise self.error(f"can't be held: {error}") from None
        return _LAYOUTS[self.scheme.layout](self, k, n, groups)

    def has(self, part: str) -> bool:
        return f"{self.name}.{part}" in self.tensors

    def take(
        self, part: str, dtypes: tuple[np.dtype, ...], shape: tuple[int | None, ...]
    ) -> np.ndarray:
        """A tensor of one of `dtypes` and of `shape`, in which None stands for any size but 0."""
        if not self.has(part):
            raise self.error(f"lacks {part}")
        array = self.tensors[f"{self.name}.{part}"]
        names = " or ".join(dtype.name for dtype in dtypes)
        if array.dtype not in dtypes:
            raise self.error(f"has {part} in {array.dtype.name}, which must be {names}")
        fits = array.ndim == len(shape) and all(
            got == want or (want is None and got > 0)
            for got, want in zip(array.shape, shape, strict=False)
        )
        if not fits:
            want = ", ".join("any" if size is None else str(size) for size in shape)
            raise self.error(f"has {part} of shape {list(array.shape)}, which must be [{want}]")
        return array

    def words(self, part: str, shape: tuple[int | None, int | None]) -> np.ndarray:
        return self.take(part, INTEGERS[:1], shape)

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.name} {problem}")


def _gptq(parts: Parts, k: int, n: int, groups: int) -> Layer:
    """Words along K for weights and along N for zero points."""
    bits = parts.scheme.bits
    scales = parts.take("scales", FLOATS, (groups, n))
    zeros = _fields(parts.words("qzeros", (groups, n * bits // WORD)), bits)
    if parts.scheme.layout == "gptq":
        # A zero point of 0 was stored as -1, which AutoGPTQ reads as 2**bits and others as 0.
        if (zeros == 2**bits - 1).any():
            raise parts.error(
                f"stores zero points minus one as {2**bits - 1}, which readers of this format "
                f"take for {2**bits} or for 0; save it as gptq_v2"
            )
        zeros = zeros + np.uint8(1)
    g_idx = parts.take("g_idx", INTEGERS, (k,)) if parts.has("g_idx") else None
    codes = _fields(parts.words("qweight", (None, n)).T, bits)
    return Layer(codes, scales.T, zeros.T, g_idx)


def _awq_gemm(parts: Parts, k: int, n: int, groups: int) -> Layer:
    """Words along N, the columns of each in the order that its kernel unpacks."""

    def columns(part: str, rows: int) -> np.ndarray:
        fields = _fields(parts.words(part, (rows, n // 8)), 4).reshape(rows, -1, 8)
        return fields[..., AWQ_COLUMNS].reshape(rows, n).T

    scales = parts.take("scales", FLOATS, (groups, n))
    return Layer(columns("qweight", k), scales.T, columns("qzeros", groups))


def _awq_gemv(parts: Parts, k: int, n: int, groups: int) -> Layer:
    """Words along K; scales and zero points are padded to whole words."""
    qzeros = parts.words("qzeros", (n, None))
    width = qzeros.shape[1] * 8
    if width < groups:
        raise parts.error(f"has qzeros for {width} groups, fewer than {groups}")
    scales = parts.take("scales", FLOATS, (n, width))[:, :groups]
    codes = _fields(parts.words("qweight", (n, k // 8)), 4)
    return Layer(codes, scales, _fields(qzeros, 4)[:, :groups])


def _pack_quantized(parts: Parts, k: int, n: int, groups: int) -> Layer:
    """Words along K for weights and along N for zero points, the last of each padded.

    Signed integers, stored plus ``2**(bits - 1)``.
    """
    bits, per_word = parts.scheme.bits, WORD // parts.scheme.bits
    packed = parts.words("weight_packed", (n, math.ceil(k / per_word)))
    scales = parts.take("weight_scale", FLOATS, (n, groups))
    if not parts.scheme.symmetric:
        words = parts.words("weight_zero_point", (math.ceil(n / per_word), groups))
        zeros = _fields(words.T, bits)[:, :n].T
    elif parts.has("weight_zero_point"):
        raise parts.error("has weight_zero_point, but its scheme is symmetric")
    else:
        zeros = np.full((n, groups), 1 << (bits - 1), np.uint8)
    g_idx = parts.take("weight_g_idx", INTEGERS, (k,)) if parts.has("weight_g_idx") else None
    if g_idx is not None and (g_idx == -1).all():  # so it is where nothing was reordered
        g_idx = None
    return Layer(_fields(packed, bits)[:, :k], scales, zeros, g_idx)


_LAYOUTS: Mapping[str, Callable[[Parts, int, int, int], Layer]] = {
    "gptq": _gptq,
    "gptq_v2": _gptq,
    "awq_gemm": _awq_gemm,
    "awq_gemv": _awq_gemv,
    "pack_quantized": _pack_quantized,
}


def _fields(words: np.ndarray, bits: int) -> np.ndarray:
    """``int32[rows, words]`` to ``uint8[rows, 32 words / bits]``, the lowest bits first.

    Fields of 3 bits may lie in two words: after three words they begin one again.
    """
    stretch = math.lcm(WORD, bits)
    words = np.ascontiguousarray(words, "<i4").view(np.uint32)
    words = words.reshape(len(words), -1, stretch // WORD)
    fields = np.empty((*words.shape[:2], stretch // bits), np.uint8)
    for i in range(stretch // bits):
        word, shift = divmod(i * bits, WORD)
        field = words[..., word] >> np.uint32(shift)
        if shift + bits > WORD:
            field |= words[..., word + 1] << np.uint32(WORD - shift)
        fields[..., i] = field & np.uint32(2**bits - 1)
    return fields.reshape(len(words), -1)
