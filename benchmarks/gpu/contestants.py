"""Ways to multiply that take turns: ours at each precision, and XLA's own dots.

Each one knows what a sample of its result must be, from float64 and within a bound that is derived.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_anyprec as ap
from jax_anyprec import format as fmt
from tests.layers import Layer
from tests.oracle import OUT_ROUNDOFF, Bounded, float_matmul, gamma, quantized_matmul

from .data import draw
from .roofline import ways
from .shapes import Precision
from .timing import Program

SAMPLED_ROWS = 8
SAMPLED_TILES = 4
MOST_COPIES = 64
"""A program of more products would take long to compile."""


class Case(NamedTuple):
    """A layer with a number of tokens, on a chip that caches so many bytes."""

    layer: Layer
    m: int
    cache_bytes: int

    def __str__(self) -> str:
        return f"{self.layer}, M = {self.m}"

    @property
    def rows(self) -> np.ndarray:
        """The rows of a result that are checked, the first and the last among them."""
        return np.unique(np.linspace(0, self.m - 1, SAMPLED_ROWS).astype(int))

    @property
    def tiles(self) -> np.ndarray:
        """The tiles of columns that are checked, likewise."""
        last = self.layer.n // fmt.TILE - 1
        return np.unique(np.linspace(0, last, SAMPLED_TILES).astype(int))

    @property
    def columns(self) -> np.ndarray:
        return (self.tiles[:, None] * fmt.TILE + np.arange(fmt.TILE)).reshape(-1)

    def copies(self, set_bytes: int) -> int:
        """Sets of operands that exceed the cache twice, or the most that a program takes."""
        return min(MOST_COPIES, 2 + 2 * self.cache_bytes // set_bytes)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way, compiled; `about` names it in its row."""

    about: dict[str, Any]
    program: Program
    weight_bytes: int
    moved: int
    """Bytes of operands and results of one product, each once."""
    check: Callable[[Any], None]
    """AssertionError unless the result of the last set of operands is right."""

    @property
    def calls(self) -> list[str]:
        """Libraries' and our own kernels in the compiled program: what XLA made of a dot."""
        text = self.program.text()
        found = re.findall(r'custom_call_target="([^"]+)"', text)
        return sorted({*found, *re.findall(r"__triton_\w+", text)})

    @property
    def kernel(self) -> dict[str, str]:
        """What was planned for our product, such as its method, tile and splits along K."""
        return dict(re.findall(r'\b(method|tile|splits) = "?(\w+)', self.program.text()))


Operation = Callable[..., Any]


def _enter(
    case: Case,
    about: dict[str, Any],
    operation: Operation,
    make_set: Callable[[int], tuple[Any, ...]],
    sampled: tuple[np.ndarray, ...],
    expected: Callable[..., Bounded],
    compiler_options: dict[str, Any] | None = None,
) -> Contestant:
    """A contestant whose sets `make_set(seed)` gives, weights last if there are two operands.

    Of the last set's result, `expected` gives the `sampled` rows (and columns).
    """
    first = make_set(0)
    moved = _bytes((first, jax.eval_shape(operation, *first)))
    sets = [jax.device_put(make_set(seed)) for seed in range(case.copies(moved))]
    wanted = expected(*make_set(len(sets) - 1))

    def check(result: jax.Array) -> None:
        wanted.check(np.asarray(result)[np.ix_(*sampled)])

    program = Program(operation, sets, compiler_options)
    return Contestant(about, program, _bytes(first[1:]), moved, check)


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# --- ours ---


def ours(case: Case, precision: Precision, implementation: str) -> Contestant:
    """`ap.matmul` of bfloat16 activations, the prologue included."""
    operation = functools.partial(
        ap.matmul,
        act_bits=precision.pair.activations,
        act_scales="group" if precision.group_size else "token",
        implementation=implementation,
    )
    return quantized(case, precision, operation, implementation)


def quantized(
    case: Case, precision: Precision, operation: Operation, implementation: str
) -> Contestant:
    """An `operation` that multiplies bfloat16 activations by packed weights, as `ap.matmul`."""
    pair = precision.pair

    def make_set(seed: int) -> tuple[Any, ...]:
        return activations(case, seed), random_weights(seed, case.layer, precision)

    about = {
        "contestant": str(precision),
        "implementation": implementation,
        "weight_bits": pair.weights,
        "act_bits": pair.activations,
        "ways": ways(*pair),
    }
    sampled = (case.rows, case.columns)
    expected = functools.partial(_our_sample, case, precision)
    return _enter(case, about, operation, make_set, sampled, expected)


def prologue(case: Case, bits: int, group_size: int | None, implementation: str) -> Contestant:
    """`ap.quantize_activations` alone, which writes codes as bytes; only codes are compared."""

    def operation(x: jax.Array) -> jax.Array:
        return ap.quantize_activations(
            x, bits, group_size=group_size, implementation=implementation
        )[0]

    def expected(x: np.ndarray) -> Bounded:
        codes, _ = quantize_rows(x, case.rows, bits, group_size or case.layer.k)
        return Bounded(codes.astype(np.float64), np.zeros(codes.shape))

    name = f"quantize A{bits}" + (f" g{group_size}" if group_size else "")
    about = {"contestant": name, "implementation": implementation, "act_bits": bits, "ways": {}}
    return _enter(
        case, about, operation, lambda seed: (activations(case, seed),), (case.rows,), expected
    )


def activations(case: Case, seed: int) -> np.ndarray:
    return draw(2 * seed, (case.m, case.layer.k), jnp.bfloat16)


def random_weights(seed: int, layer: Layer, precision: Precision) -> ap.QuantizedTensor:
    """Prepared, of random bits; scales of groups in float16, of columns in float32.

    K and N must be multiples of 32, so that there is no padding, which would have to be 0.
    """
    bits, group_size = precision.pair.weights, precision.group_size or layer.k
    tiles, words = layer.n // fmt.TILE, layer.k // fmt.WORD_BITS
    planes = draw(2 * seed + 1, (tiles, words, bits, fmt.TILE), jnp.uint32)
    random = np.random.default_rng(seed)
    scales = random.uniform(1, 2, (tiles, layer.k // group_size, fmt.TILE)) / 2 ** (bits + 6)
    scales = scales.astype(np.float16 if precision.group_size else np.float32)
    return ap.QuantizedTensor(planes, scales, None, layer.k, group_size, None, layer.n)


def _our_sample(case: Case, precision: Precision, x: np.ndarray, w: ap.QuantizedTensor) -> Bounded:
    """The sampled rows and columns, as tests/oracle.py derives them."""
    part = dataclasses.replace(
        w,
        planes=w.planes[case.tiles],
        scales=w.scales[case.tiles],
        columns=len(case.columns),
    ).restore()
    weights = (fmt.unpack_planes(part.planes, w.k), w.bits, part.scales.astype(np.float32), None)
    bits = precision.pair.activations
    if bits is None:
        return float_matmul(x[case.rows].astype(np.float32), w.k, weights, None, "bfloat16")
    codes, scales = quantize_rows(x, case.rows, bits, w.group_size)
    return quantized_matmul((codes, bits, scales), weights, None, "bfloat16")


def quantize_rows(
    x: np.ndarray, rows: np.ndarray, bits: int, group_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of some rows, in NumPy: XLA's division on a GPU rounds in its own way."""
    values = x[rows].astype(np.float32)
    grouped = values.reshape(len(rows), -1, group_size)
    scales = np.abs(grouped).max(-1) * np.float32(1 / fmt.act_max_level(bits))
    return fmt.act_encode(grouped, scales[..., None], bits).reshape(values.shape), scales


# --- XLA's own dots: both operands [rows, K], as libraries for 8 bits want them ---


class Dot(NamedTuple):
    """A product of two dtypes into a third, and the error that float sums may add.

    `error(k)` is relative to the sum of magnitudes.
    """

    name: str
    operand: Any
    result: Any
    error: Callable[[int], float]


DOTS = (
    Dot("bf16", jnp.bfloat16, jnp.bfloat16, lambda k: gamma(k + 2)),
    Dot("int8", jnp.int8, jnp.int32, lambda k: 0.0),
    # Tensor cores of compute capability 8.9 and 9.0 keep 13 bits of partial sums of 32 products.
    Dot("fp8", jnp.float8_e4m3fn, jnp.float32, lambda k: max(1, k // 32) * 2.0**-13),
)
BASELINE = DOTS[0].name
CUBLAS = {"xla_gpu_enable_triton_gemm": False}
"""Else XLA compiles and times dozens of kernels of its own for each shape, and may take one."""


def dot(case: Case, kind: Dot) -> Contestant:
    layer = case.layer

    def operation(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.dot_general(
            x, w, (((1,), (1,)), ((), ())), preferred_element_type=kind.result
        )

    def make_set(seed: int) -> tuple[Any, ...]:
        x = draw(2 * seed, (case.m, layer.k), kind.operand)
        return x, draw(2 * seed + 1, (layer.n, layer.k), kind.operand)

    def expected(x: np.ndarray, w: np.ndarray) -> Bounded:
        rows, columns = x[case.rows].astype(np.float64), w[case.columns].astype(np.float64)
        value = rows @ columns.T
        error = kind.error(layer.k) * (np.abs(rows) @ np.abs(columns.T))
        # A library may split K, and cast its parts before it adds them; parts of random sums stay
        # within six standard deviations.
        parts = np.abs(value) + 6 * np.sqrt(rows**2 @ (columns**2).T)
        cast = OUT_ROUNDOFF.get(jnp.dtype(kind.result).name, 0)
        return Bounded(value, error + 2 * cast * parts)

    about = {"contestant": kind.name, "implementation": "XLA", "ways": {kind.name: 1}}
    sampled = (case.rows, case.columns)
    return _enter(case, about, operation, make_set, sampled, expected, CUBLAS)
