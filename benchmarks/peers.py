"""Other libraries' products of one layer, each a contestant in the class of its own.

All multiply by the same ternary weights, which every type holds well enough to check the result.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from .ggml import GgmlProduct
from .products import Copies, JaxProduct, rotation


class Peer(Protocol):
    """A contestant with a result that can be checked."""

    name: str
    tolerance: float
    weight_bytes: int

    def run(self, count: int) -> None: ...
    def output(self) -> np.ndarray: ...


def check(peer: Peer, x: np.ndarray, w: np.ndarray) -> None:
    """AssertionError unless the last product of `peer` has a small error relative to ``x @ w``."""
    expected = x.astype(np.float64) @ w.astype(np.float64)
    error = np.linalg.norm(peer.output() - expected) / np.linalg.norm(expected)
    assert error <= peer.tolerance, f"{peer.name}: relative error {error:.3g}"


class XlaFloat32(JaxProduct):
    """``x @ w`` as anyone writes it: the baseline."""

    tolerance = 1e-5

    def __init__(self, x: np.ndarray, w: np.ndarray, copies: Copies):
        name = f"XLA {importlib.metadata.version('jaxlib')} float32"
        super().__init__(name, jnp.matmul, jnp.asarray(x), jnp.asarray(w), copies)


class XlaBfloat16(JaxProduct):
    """bfloat16 by bfloat16 with a float32 result, which XLA computes faster than a bfloat16 one."""

    tolerance = 1e-2

    def __init__(self, x: np.ndarray, w: np.ndarray, copies: Copies):
        name = f"XLA {importlib.metadata.version('jaxlib')} bfloat16"
        product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
        operands = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
        super().__init__(name, product, *operands, copies)


class NumpyFloat32:
    """``x @ w`` by NumPy's BLAS, which is OpenBLAS in its wheels."""

    tolerance = 1e-5

    def __init__(self, x: np.ndarray, w: np.ndarray, copies: Copies):
        self.name = f"NumPy {np.__version__} float32"
        self.x, self.weight_bytes = x, w.nbytes
        self.copies = rotation(w, w.copy, copies(w.nbytes))
        self.y = np.empty((len(x), w.shape[1]), np.float32)

    def run(self, count: int) -> None:
        for _ in range(count):
            np.matmul(self.x, next(self.copies), out=self.y)

    def output(self) -> np.ndarray:
        return self.y


class TorchBfloat16:
    """PyTorch's linear layer in bfloat16."""

    tolerance = 1e-2

    def __init__(self, x: np.ndarray, w: np.ndarray, copies: Copies):
        torch = import_torch()
        self.name = f"PyTorch {importlib.metadata.version('torch')} bfloat16"
        self.linear = torch.nn.functional.linear
        self.x = torch.from_numpy(x).bfloat16()
        weights = torch.from_numpy(w).T.bfloat16().contiguous()
        self.weight_bytes = weights.nbytes
        self.copies = rotation(weights, weights.clone, copies(weights.nbytes))

    def run(self, count: int) -> None:
        for _ in range(count):
            self.y = self.linear(self.x, next(self.copies))

    def output(self) -> np.ndarray:
        return self.y.float().numpy()


class TorchInt8:
    """PyTorch's dynamically quantized linear layer: 8-bit weights, activations quantized on line.

    Its engine for x86 chooses between oneDNN and FBGEMM.
    """

    tolerance = 3e-2

    def __init__(self, x: np.ndarray, w: np.ndarray, copies: Copies):
        torch = import_torch()
        self.name = f"PyTorch {importlib.metadata.version('torch')} int8"
        self.linear = torch.ops.quantized.linear_dynamic
        self.x = torch.from_numpy(x)
        scales = torch.from_numpy(np.abs(w).max(axis=0).astype(np.float64) / 127)
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        rows = torch.from_numpy(np.ascontiguousarray(w.T))
        with warnings.catch_warnings(action="ignore"):  # a deprecation, with nothing in its place
            quantized = torch.quantize_per_channel(rows, scales, zeros, 0, torch.qint8)

        def pack() -> Any:
            return torch.ops.quantized.linear_prepack(quantized, None)

        self.weight_bytes = rows.numel()
        self.copies = rotation(pack(), pack, copies(self.weight_bytes))

    def run(self, count: int) -> None:
        for _ in range(count):
            self.y = self.linear(self.x, next(self.copies), False)

    def output(self) -> np.ndarray:
        return self.y.numpy()


@functools.cache
def import_torch() -> Any:
    """PyTorch, on the cores of this process."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_grad_enabled(False)
    return torch


BASELINE = XlaFloat32
PEERS: tuple[Callable[[np.ndarray, np.ndarray, Copies], Peer], ...] = (
    XlaBfloat16,
    NumpyFloat32,
    TorchBfloat16,
    TorchInt8,
    *(functools.partial(GgmlProduct, kind) for kind in ("Q8_0", "Q4_0", "Q4_K", "TQ2_0")),
)
"""Constructors; each raises ImportError, or ValueError where it can't multiply by such a matrix."""
