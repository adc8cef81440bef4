"""Llama models whose random weights are drawn on the device, packed in the order of kernels."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import jax_anyprec as ap
from jax_anyprec import format as fmt
from jax_anyprec import models

from .shapes import Precision

CONFIGS = {
    "llama-2-7b": models.LlamaConfig(
        vocab_size=32000, num_layers=32, hidden_size=4096, intermediate_size=11008, num_heads=32,
        num_kv_heads=32, head_dim=128, context_length=4096, tied_embeddings=False,
    ),
    "llama-3-8b": models.LlamaConfig(
        vocab_size=128256, num_layers=32, hidden_size=4096, intermediate_size=14336, num_heads=32,
        num_kv_heads=8, head_dim=128, context_length=8192, tied_embeddings=False,
        rope_theta=500000.0,
    ),
    "tiny": models.LlamaConfig(
        vocab_size=512, num_layers=2, hidden_size=256, intermediate_size=512, num_heads=4,
        num_kv_heads=2, head_dim=64, context_length=512, tied_embeddings=False,
    ),
}  # fmt: skip


class Model(NamedTuple):
    """A model as functions take it: its structure, and the shapes of its weights.

    `precision` is None for bfloat16, and `state` a tree of `jax.ShapeDtypeStruct`.
    """

    config: models.LlamaConfig
    precision: Precision | None
    graph: Any
    state: Any

    def build(self, weights: list[jax.Array]) -> models.Llama:
        """The module with these leaves of `state`, for use inside of a compiled function."""
        return nnx.merge(self.graph, jax.tree.unflatten(jax.tree.structure(self.state), weights))

    @property
    def weight_bytes(self) -> int:
        return nbytes(self.state)

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that every call reads: all but the embedding, of which it looks up rows.

        An embedding that is the output head too is read.
        """
        if self.config.tied_embeddings:
            return self.weight_bytes
        return self.weight_bytes - nbytes(self.state["embed"])


def nbytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def describe(
    config: models.LlamaConfig,
    precision: Precision | None,
    implementation: str | None,
    dtype: Any = jnp.bfloat16,
) -> Model:
    """The model of that precision, its projections merged, without making an array.

    Args:
      config: its sizes.
      precision: of its linear layers and the output head; None for floats, which XLA multiplies.
      implementation: of packed products.
      dtype: of activations, float weights and cache.
    """
    quantization = None if precision is None else _quantization(precision)

    one_layer = dataclasses.replace(config, num_layers=1)

    def make() -> models.Llama:
        model = models.Llama(one_layer, quantization=quantization, dtype=dtype, rngs=nnx.Rngs(0))
        models.merge_projections(model)
        return model

    model = nnx.eval_shape(make)  # which takes long for many layers, and they are all alike
    model.config = config
    model.layers = nnx.List([nnx.clone(model.layers[0]) for _ in range(config.num_layers)])
    for _, module in nnx.iter_modules(model):
        if isinstance(module, ap.nnx.QuantLinear):
            module.implementation = implementation
    return Model(config, precision, *nnx.split(model))


class _Shapes(models.Quantization):
    """Packs to the right shapes without looking at values: a search for scales traces slowly."""

    def pack(self, kernel: jax.Array) -> ap.QuantizedTensor:
        assert self.weights is not None
        k, n = kernel.shape
        group_size = self.group_size or k
        tiles = -(-n // fmt.TILE)
        return ap.QuantizedTensor(
            jnp.zeros((tiles, fmt.words(k), self.weights, fmt.TILE), jnp.uint32),
            jnp.zeros((tiles, k // group_size, fmt.TILE), jnp.float32),
            None,
            k,
            group_size,
            None,
            n,
        )


def _quantization(precision: Precision) -> models.Quantization:
    weights, activations = precision.pair
    return _Shapes(
        weights=weights,
        activations=activations,
        group_size=precision.group_size,
        act_scales="group" if precision.group_size else "token",
    )


# --- weights ---


def draw_weights(model: Model, seed: int = 0) -> list[jax.Array]:
    """Random leaves of `model.state` on the default device.

    Bits are uniform, and outputs of a layer are about as large as its inputs. K and N of packed
    layers must be multiples of 32, so that there is no padding, which would have to be 0.
    """
    keys = random_keys(seed)

    def draw(leaf: Any) -> Any:
        if isinstance(leaf, ap.QuantizedTensor):
            return _draw_packed(leaf, keys)
        if leaf.ndim == 1:  # of a norm
            return jnp.ones(leaf.shape, leaf.dtype)
        return normal(next(keys), leaf.shape, leaf.dtype, leaf.shape[0] ** -0.5)

    def is_packed(leaf: Any) -> bool:
        return isinstance(leaf, ap.QuantizedTensor)

    return jax.tree.leaves(jax.tree.map(draw, model.state, is_leaf=is_packed))


def random_keys(seed: int) -> Iterator[jax.Array]:
    key = jax.random.key(seed, impl="rbg")  # the generator that compiles and runs fastest
    while True:
        key, one = jax.random.split(key)
        yield one


def _draw_packed(shapes: ap.QuantizedTensor, keys: Iterator[jax.Array]) -> ap.QuantizedTensor:
    k, n = shapes.shape
    if k % fmt.WORD_BITS or n % fmt.TILE:
        raise ValueError(f"K and N must be multiples of 32, got {k} x {n}")
    # Odd integers below 2**bits have the mean square (4**bits - 1) / 3.
    scale = (3 / (4**shapes.bits - 1) / k) ** 0.5
    return dataclasses.replace(
        shapes,
        planes=_words(next(keys), shapes.planes.shape),
        scales=_uniform(next(keys), shapes.scales.shape, scale),
    )


@functools.partial(jax.jit, static_argnums=1)
def _words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.bits(key, shape, jnp.uint32)


@functools.partial(jax.jit, static_argnums=1)
def _uniform(key: jax.Array, shape: tuple[int, ...], mean: float) -> jax.Array:
    return mean * jax.random.uniform(key, shape, minval=0.5, maxval=1.5)


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, deviation: float) -> jax.Array:
    return deviation * jax.random.normal(key, shape, dtype)
