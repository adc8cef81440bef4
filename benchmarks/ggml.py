"""Single products by ggml, through the shared library that llama-cpp-python brings."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .products import Copies, calls
from .timing import CHAIN

TYPES = {"Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "TQ2_0": 35}
"""Numbers of `enum ggml_type`, which files hold too, so they stay."""
FLOAT32 = 0

P, N, Z = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
INT, TEXT = ctypes.c_int, ctypes.c_char_p
LOG = ctypes.CFUNCTYPE(None, INT, TEXT, P)


@LOG
def ignore(level: int, text: bytes, user: Any) -> None:
    """A log callback for a library that says every tensor it repacks."""


class InitParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("mem_size", Z), ("mem_buffer", P), ("no_alloc", ctypes.c_bool))


SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ggml_version": (TEXT,),
    "ggml_log_set": (None, LOG, P),
    "ggml_init": (P, InitParams),
    "ggml_free": (None, P),
    "ggml_tensor_overhead": (Z,),
    "ggml_graph_overhead_custom": (Z, Z, ctypes.c_bool),
    "ggml_new_tensor_2d": (P, P, INT, N, N),
    "ggml_mul_mat": (P, P, P, P),
    "ggml_new_graph_custom": (P, P, Z, ctypes.c_bool),
    "ggml_build_forward_expand": (None, P, P),
    "ggml_blck_size": (N, INT),
    "ggml_row_size": (Z, INT, N),
    "ggml_quantize_chunk": (Z, INT, P, P, N, N, N, P),
    "ggml_backend_cpu_init": (P,),
    "ggml_backend_cpu_reg": (P,),
    "ggml_backend_cpu_set_n_threads": (None, P, INT),
    "ggml_backend_reg_dev_get": (P, P, Z),
    "ggml_backend_reg_get_proc_address": (P, P, TEXT),
    "ggml_backend_get_default_buffer_type": (P, P),
    "ggml_backend_buft_name": (TEXT, P),
    "ggml_backend_alloc_ctx_tensors_from_buft": (P, P, P),
    "ggml_backend_buffer_free": (None, P),
    "ggml_backend_supports_op": (ctypes.c_bool, P, P),
    "ggml_backend_tensor_set": (None, P, P, Z, Z),
    "ggml_backend_tensor_get": (None, P, P, Z, Z),
    "ggml_backend_graph_compute": (INT, P, P),
}
"""Result and arguments of the functions that are used."""


@functools.cache
def load() -> tuple[Any, int]:
    """The library, and its CPU backend on the cores of this process; ImportError without one."""
    spec = importlib.util.find_spec("llama_cpp")
    folders = spec.submodule_search_locations if spec else None
    paths = [path for folder in folders or () for path in Path(folder).glob("lib/libggml-cpu.so")]
    if not paths:
        raise ImportError("no llama-cpp-python with a shared library libggml-cpu.so")
    library = ctypes.CDLL(str(paths[0]))  # finds what libggml-base exports too
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.ggml_log_set(ignore, None)
    backend = library.ggml_backend_cpu_init()
    library.ggml_backend_cpu_set_n_threads(backend, len(os.sched_getaffinity(0)))
    return library, backend


class GgmlProduct:
    """``ggml_mul_mat`` with weights of one type, in the layout that llama.cpp would choose.

    A graph holds up to CHAIN products, which run one after another.
    """

    def __init__(self, kind: str, x: np.ndarray, w: np.ndarray, copies: Copies):
        self.library, self.backend = load()
        self.k, self.n = w.shape
        self.m = len(x)
        self.type = TYPES[kind]
        block = self.library.ggml_blck_size(self.type)
        if self.k % block:
            raise ValueError(f"ggml {kind} needs K in multiples of {block}, got {self.k}")
        self.tolerance = 0.15 if kind.startswith("Q4") else 2e-2
        self.weight_bytes = self.n * self.library.ggml_row_size(self.type, self.k)
        self.copies = copies(self.weight_bytes)
        layout = self._choose_layout()
        self.weights = self._tensors([(self.type, self.n)] * self.copies, layout)
        (self.x,) = self._tensors([(FLOAT32, self.m)], self._host())
        packed = self._quantize(w)
        for tensor in self.weights:
            self.library.ggml_backend_tensor_set(tensor, packed.ctypes.data, 0, packed.nbytes)
        x = np.ascontiguousarray(x, np.float32)
        self.library.ggml_backend_tensor_set(self.x, x.ctypes.data, 0, x.nbytes)
        self.graphs: dict[int, Iterator[tuple[int, int]]] = {}
        repacked = "no repack" if layout == self._host() else "repacked"
        self.name = f"ggml {self.library.ggml_version().decode()} {kind}, {repacked}"

    def run(self, count: int) -> None:
        for size in calls(count):
            if size not in self.graphs:
                self.graphs[size] = itertools.cycle(self._build_graphs(size))
            graph, self.y = next(self.graphs[size])
            status = self.library.ggml_backend_graph_compute(self.backend, graph)
            if status:
                raise RuntimeError(f"{self.name}: ggml status {status}")

    def output(self) -> np.ndarray:
        """The last product that was run."""
        y = np.empty((self.m, self.n), np.float32)
        self.library.ggml_backend_tensor_get(self.y, y.ctypes.data, 0, y.nbytes)
        return y

    def _choose_layout(self) -> int:
        """The buffer type of weights: as in llama.cpp, the first special one that multiplies."""
        for layout in [*self._special_layouts(), self._host()]:
            (weights,) = self._tensors([(self.type, self.n)], layout)
            (x,) = self._tensors([(FLOAT32, self.m)], self._host())
            product = self.library.ggml_mul_mat(self._context(1), weights, x)
            if self.library.ggml_backend_supports_op(self.backend, product):
                return layout
        raise ValueError(f"ggml can't multiply by weights of type {self.type}")

    def _special_layouts(self) -> list[int]:
        registry = self.library.ggml_backend_cpu_reg()
        name = b"ggml_backend_dev_get_extra_bufts"
        address = self.library.ggml_backend_reg_get_proc_address(registry, name)
        if not address:
            return []
        device = self.library.ggml_backend_reg_dev_get(registry, 0)
        layouts = ctypes.CFUNCTYPE(ctypes.POINTER(P), P)(address)(device)
        return list(itertools.takewhile(bool, (layouts[i] for i in itertools.count())))

    def _host(self) -> int:
        return self.library.ggml_backend_get_default_buffer_type(self.backend)

    def _quantize(self, w: np.ndarray) -> np.ndarray:
        rows = np.ascontiguousarray(w.T, np.float32)
        packed = np.empty(self.weight_bytes, np.uint8)
        self.library.ggml_quantize_chunk(
            self.type, rows.ctypes.data, packed.ctypes.data, 0, self.n, self.k, None
        )
        return packed

    def _build_graphs(self, size: int) -> list[tuple[int, int]]:
        """Graphs that together go over all copies once, `size` products each; and last results."""
        starts = range(0, self.copies, size)
        overhead = self.library.ggml_graph_overhead_custom(4 * CHAIN, False)
        context = self._context(len(starts) * size, len(starts) * overhead)
        graphs = []
        for start in starts:
            graph = self.library.ggml_new_graph_custom(context, 4 * CHAIN, False)
            for i in range(start, start + size):
                weights = self.weights[i % self.copies]
                y = self.library.ggml_mul_mat(context, weights, self.x)
                self.library.ggml_build_forward_expand(graph, y)
            graphs.append((graph, y))
        self._allocate(context, self._host())
        return graphs

    def _tensors(self, shapes: list[tuple[int, int]], layout: int) -> list[int]:
        """Tensors of a type and a number of rows of K values."""
        context = self._context(len(shapes))
        tensors = [
            self.library.ggml_new_tensor_2d(context, kind, self.k, rows) for kind, rows in shapes
        ]
        self._allocate(context, layout)
        return tensors

    def _context(self, tensors: int, extra: int = 0) -> int:
        size = tensors * self.library.ggml_tensor_overhead() + extra
        context = self.library.ggml_init(InitParams(size, None, True))
        weakref.finalize(self, self.library.ggml_free, context)
        return context

    def _allocate(self, context: int, layout: int) -> None:
        buffer = self.library.ggml_backend_alloc_ctx_tensors_from_buft(context, layout)
        if not buffer:
            raise MemoryError("ggml could not allocate tensors")
        weakref.finalize(self, self.library.ggml_backend_buffer_free, buffer)
