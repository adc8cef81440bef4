"""Products under jax.jit that a benchmark times: ours, and how their results are checked."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_anyprec as ap
from tests.layers import Layer, Pair
from tests.oracle import Bounded, act_ints, gamma, segments

from .timing import CHAIN

ROWS = 16
"""Rows of a result that are checked, spread over all of it."""

Copies = Callable[[int], int]
"""How many copies of weights a contestant rotates over, given the bytes of one."""


class Grouping(NamedTuple):
    """How weights share scales; with groups, activations have a scale for each group too."""

    name: str
    group_size: int | None
    offsets: bool


CHANNEL = Grouping("channel", None, False)
GROUPS_64 = Grouping("64", 64, False)
GROUPS_32_OFFSETS = Grouping("32 + offsets", 32, True)


class JaxProduct:
    """``product(x, w)`` under jit, over copies of `weights` in turn.

    A call holds up to CHAIN products. Each waits for the one before it through one element of x,
    which stays what it is, so they run one after another as the layers of a model do.
    """

    def __init__(self, name: str, product: Any, x: jax.Array, weights: Any, copies: Copies):
        self.name = name
        self.x = x
        self.weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
        arena = ap.Arena()  # huge pages for all, ours and XLA's own
        self.copies = rotation(
            arena.place(weights), lambda: arena.place(weights), copies(self.weight_bytes)
        )
        self.chain = jax.jit(functools.partial(_chain, product))

    def run(self, count: int) -> None:
        for size in calls(count):
            weights = tuple(itertools.islice(self.copies, size))
            self.y = self.chain(self.x, weights).block_until_ready()

    def output(self) -> np.ndarray:
        """The last product that was run."""
        return np.asarray(self.y)


def _chain(product: Any, x: jax.Array, weights: Sequence[Any]) -> jax.Array:
    y = product(x, weights[0])
    for w in weights[1:]:
        same = x[:1, :1] + 0 * y[:1, :1].astype(x.dtype)
        y = product(jax.lax.dynamic_update_slice(x, same, (0, 0)), w)
    return y


def rotation(first: Any, copy: Callable[[], Any], count: int) -> Iterator[Any]:
    """`first` and copies of it, `count` together, again and again."""
    return itertools.cycle([first, *(copy() for _ in range(count - 1))])


def calls(count: int) -> list[int]:
    """`count` products in calls of at most CHAIN."""
    full, rest = divmod(count, CHAIN)
    return [CHAIN] * full + [rest] * (rest > 0)


class OurProduct(JaxProduct):
    """`ap.matmul` of a pair of precisions with random weights, prepared."""

    def __init__(self, layer: Layer, pair: Pair, grouping: Grouping, x: np.ndarray, copies: Copies):
        self.pair, self.grouping = pair, grouping
        self.act_scales: Literal["group", "token"] = (
            "token" if grouping.group_size is None else "group"
        )
        self.planes = random_weights(layer, pair.weights, grouping)
        dtype = jnp.bfloat16 if pair.activations is None else jnp.float32
        product = functools.partial(
            ap.matmul,
            act_bits=pair.activations,
            act_scales=self.act_scales,
            out_dtype=jnp.float32,
        )
        name, weights = f"{pair}, {grouping.name}", self.planes.prepare()
        super().__init__(name, product, jnp.asarray(x, dtype), weights, copies)

    def check(self) -> None:
        """AssertionError unless the last product that was run is right."""
        y = self.output()
        rows = np.unique(np.linspace(0, len(y) - 1, ROWS).astype(int))
        self.expected(rows).check(y[rows])

    def expected(self, rows: np.ndarray) -> Bounded:
        """Some rows of the product in float64, with the error that float32 may add.

        The bound counts roundings on the way of a term into the result. Of quantized activations
        there are as many as tests/oracle.py derives, of float ones as many as a sum over K in any
        order has; and two more of `dequantize`.
        """
        w, x = self.planes, self.x[rows]
        if self.pair.activations is None:
            values = np.asarray(x.astype(jnp.float32)).astype(np.float64)
            roundings = w.k + 4
        else:
            group_size = w.group_size if self.act_scales == "group" else None
            codes, scales = ap.quantize_activations(x, self.pair.activations, group_size=group_size)
            steps = np.repeat(np.asarray(scales), w.k // scales.shape[1], axis=1)
            values = steps * act_ints(np.asarray(codes), self.pair.activations)
            roundings = 8 + segments(w.k, w.group_size)
        largest = 2 * np.asarray(w.scales).astype(np.float64) * (2**w.bits - 1)
        if w.offsets is not None:
            largest += np.abs(np.asarray(w.offsets).astype(np.float64))
        sums = np.abs(values).reshape(len(rows), w.groups, w.group_size).sum(-1)
        y = values @ np.asarray(w.dequantize()).astype(np.float64)
        return Bounded(y, gamma(roundings + 2) * (sums @ largest.T))


def random_weights(layer: Layer, bits: int, grouping: Grouping) -> ap.QuantizedTensor:
    """Random codes; scales (and offsets) of groups in float16, of channels in float32."""
    random = np.random.default_rng(bits)
    codes = random.integers(0, 2**bits, (layer.n, layer.k), np.uint8)
    groups = layer.k // (grouping.group_size or layer.k)
    dtype = np.float32 if grouping.group_size is None else np.float16
    scales = random.uniform(1, 2, (layer.n, groups)).astype(dtype) / 2 ** (bits + 6)
    offsets = -scales * 2**bits if grouping.offsets else None
    tensor = ap.QuantizedTensor.from_codes(codes, scales, offsets, bits=bits)
    return jax.tree.map(jnp.asarray, tensor)
