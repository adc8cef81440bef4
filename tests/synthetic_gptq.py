"""Random packed linear layers as GPTQ, AWQ and compressed-tensors write them, for tests.

The packers follow the public sources: AutoGPTQ's `QuantLinear.pack` (auto_gptq/nn_modules/qlinear/
qlinear_cuda.py) and GPTQModel's "gptq_v2", AutoAWQ's `WQLinear_GEMM` and `WQLinear_GEMV`
(awq/modules/linear), and compressed-tensors' `pack_to_int32` (compressors/quantized_compressors/
pack_quantized.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

K, N, GROUP = 96, 64, 32


@dataclasses.dataclass
class Weights:
    """Integers ``[K, N]``, and scales and zero points ``[groups, N]``; `group` of each of K."""

    bits: int
    integers: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    group: np.ndarray

    def values(self) -> np.ndarray:
        """``float32[K, N]``; float64 and the cast back show that nothing is rounded."""
        scales = self.scales.astype(np.float64)[self.group]
        exact = scales * (self.integers - self.zeros[self.group])
        assert (exact.astype(np.float32) == exact).all()
        return exact.astype(np.float32)


def random_weights(
    bits: int = 4,
    *,
    group_size: int | None = GROUP,
    k: int = K,
    n: int = N,
    dtype: Any = np.float16,
    zeros: tuple[int, int] | None = None,
    seed: int = 0,
) -> Weights:
    rng = np.random.default_rng(seed)
    size = group_size or k
    shape = k // size, n
    low, high = zeros or (1, 2**bits)
    return Weights(
        bits,
        rng.integers(0, 2**bits, (k, n)),
        rng.uniform(1e-3, 2e-2, shape).astype(dtype),
        rng.integers(low, high, shape),
        np.arange(k) // size,
    )


def words_of(fields: np.ndarray, bits: int) -> np.ndarray:
    """Rows of integers, each row one long number with the first in its lowest bits, in words."""
    numbers = [sum(int(u) << (bits * i) for i, u in enumerate(row)) for row in fields]
    size = fields.shape[1] * bits // 32
    rows = [[(x >> (32 * i)) & 0xFFFFFFFF for i in range(size)] for x in numbers]
    return np.array(rows, np.uint32).astype(np.int32)


def padded_words_of(fields: np.ndarray, bits: int) -> np.ndarray:
    """As `words_of`, the last word padded with zeros."""
    return words_of(np.pad(fields, [(0, 0), (0, -fields.shape[1] % (32 // bits))]), bits)


def pack_gptq(w: Weights, name: str = "layer", *, minus_one: bool = True) -> dict[str, np.ndarray]:
    return {
        f"{name}.qweight": words_of(w.integers.T, w.bits).T.copy(),
        f"{name}.qzeros": words_of(w.zeros - minus_one, w.bits),
        f"{name}.scales": w.scales,
        f"{name}.g_idx": w.group.astype(np.int32),
    }


def pack_awq(w: Weights, name: str = "layer") -> dict[str, np.ndarray]:
    def columns(fields: np.ndarray) -> np.ndarray:
        order = [8 * (c // 8) + (0, 2, 4, 6, 1, 3, 5, 7)[c % 8] for c in range(fields.shape[1])]
        return words_of(fields[:, order], 4)

    return {
        f"{name}.qweight": columns(w.integers),
        f"{name}.qzeros": columns(w.zeros),
        f"{name}.scales": w.scales,
    }


def pack_awq_gemv(w: Weights, name: str = "layer") -> dict[str, np.ndarray]:
    # Groups of 32 pad to multiples of four words of eight, 64 to two; larger to one.
    multiple = 8 * {32: 4, 64: 2}.get(len(w.group) // len(w.scales), 1)
    pad = [(0, 0), (0, -len(w.scales) % multiple)]
    return {
        f"{name}.qweight": words_of(w.integers.T, 4),
        f"{name}.qzeros": words_of(np.pad(w.zeros.T, pad), 4),
        f"{name}.scales": np.pad(w.scales.T, pad),
    }


def pack_compressed(
    w: Weights, name: str = "layer", *, symmetric: bool = False
) -> dict[str, np.ndarray]:
    zeros = {f"{name}.weight_zero_point": padded_words_of(w.zeros, w.bits).T.copy()}
    return {
        f"{name}.weight_packed": padded_words_of(w.integers.T, w.bits),
        f"{name}.weight_scale": w.scales.T.copy(),
        f"{name}.weight_shape": np.array(w.integers.T.shape, np.int64),
        **({} if symmetric else zeros),
    }
