"""Filling models from checkpoints: tables of weights, and loading them tensor by tensor."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import jax_anyprec as ap
from jax_anyprec.quantization import Quantization

from .dense import packed_embedding, packed_linear
from .partition import shard_model
from .projections import merge_projections
from .tokenizer import Tokenizer

Change = Callable[[np.ndarray, Mapping[str, int]], np.ndarray]
"""From a tensor as a checkpoint has it towards the parameter it fills; takes the model's sizes."""

Progress = Callable[[int, int], None]
"""Called with the bytes that are done, and their total."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a weight map: what becomes of a tensor. {i} in it and in its key counts layers.

    Args:
      path: of the parameter, attributes and indices with dots between.
      shape: of the tensor in the checkpoint, by names of the model's sizes: "query hidden".
      changes: made in this order.
    """

    path: str
    shape: str
    changes: tuple[Change, ...] = ()


@dataclasses.dataclass(frozen=True)
class Weight:
    """A `Row` for one layer of one model.

    Args:
      path: of the parameter.
      shape: of the tensor in the checkpoint.
      convert: from the tensor to the parameter's values.
      transposed: whether that makes ``[in, out]`` of a matrix ``[out, in]``.
    """

    path: str
    shape: tuple[int, ...]
    convert: Callable[[np.ndarray], np.ndarray]
    transposed: bool


def transpose(x: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    """``[out, in]``, as most checkpoints hold a matrix, to ``[in, out]``."""
    return x.T


def add_one(x: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    """The scale of a norm that is stored as its difference from 1, in float32."""
    return 1 + x.astype(np.float32)


def pair_neighbours(x: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    """Reorder the first axis of ``x [heads D, ...]`` for rotary embeddings over (2 i, 2 i + 1).

    Hugging Face's models turn the pairs (i, i + D / 2). What is reordered alike for queries and
    keys leaves their products, and so the model, as they are. D is the size "head".
    """
    halves = x.reshape(-1, 2, sizes["head"] // 2, *x.shape[1:])
    return halves.swapaxes(1, 2).reshape(x.shape)


def expand(table: Mapping[str, Row], sizes: Mapping[str, int]) -> dict[str, Weight]:
    """Tensor name -> `Weight` for all tensors of a model: first what is outside of its layers.

    Args:
      table: tensor name -> `Row`.
      sizes: of the model, by the names that shapes and changes use; "layers" is their number.
    """

    def expand_row(row: Row, i: int | None) -> Weight:
        return Weight(
            row.path.format(i=i),
            tuple(sizes[name] for name in row.shape.split()),
            functools.partial(_convert, row, sizes),
            transpose in row.changes,
        )

    weights = {name: expand_row(row, None) for name, row in table.items() if "{i}" not in name}
    for i in range(sizes["layers"]):
        for name, row in table.items():
            if "{i}" in name:
                weights[name.format(i=i)] = expand_row(row, i)
    return weights


def _convert(row: Row, sizes: Mapping[str, int], x: np.ndarray) -> np.ndarray:
    for change in row.changes:
        x = change(x, sizes)
    return x


def check_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    weights: Mapping[str, Weight],
    name: str,
    error: type[ValueError],
) -> None:
    """Raise `error` unless checkpoint `name` has exactly the tensors of `weights`."""
    for problem, names in (
        ("lacks", weights.keys() - shapes.keys()),
        ("has unknown", shapes.keys() - weights.keys()),
    ):
        if names:
            shown = ", ".join(sorted(names)[:5])
            raise error(f"{name} {problem} tensors ({len(names)}): {shown}")
    for tensor, weight in weights.items():
        if shapes[tensor] != weight.shape:
            raise error(f"{name}: {tensor} must have shape {weight.shape}, got {shapes[tensor]}")


class Checkpoint(Protocol):
    """What weights are read from, a tensor at a time."""

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in the checkpoint."""

    def floats(self, name: str) -> np.ndarray:
        """A tensor in a float dtype."""

    def packed(self, name: str) -> ap.QuantizedTensor | None:
        """A matrix as the checkpoint packs it, without loss; None if it doesn't."""


def fill(
    model: nnx.Module,
    weights: Mapping[str, Weight],
    checkpoint: Checkpoint,
    *,
    quantization: Quantization | None,
    dtype: Any,
    progress: Progress | None,
    mesh: Mesh | None = None,
) -> None:
    """Give an abstract `model` (from `nnx.eval_shape`) its weights, one tensor at a time.

    Args:
      model: with float layers; those that are quantized are replaced.
      weights: from `expand`; what belongs to one layer lies together.
      checkpoint: has just these tensors, in these shapes.
      quantization: of linear layers; with ``weights=None`` they and embeddings stay packed where
        the checkpoint packs them. None for a float model.
      dtype: that packed layers compute in.
      progress: called after each tensor.
      mesh: devices that share each part of the model once it is read (`partition.shard_model`);
        None for one device, on which projections are merged.
    """
    arena = ap.Arena()
    total, done = sum(checkpoint.nbytes(name) for name in weights), 0
    for part, members in itertools.groupby(weights.items(), lambda item: _part(item[1].path)):
        for name, weight in members:
            _load(model, checkpoint, name, weight, quantization, dtype)
            done += checkpoint.nbytes(name)
            if progress is not None:
                progress(done, total)
        module = find(model, part)
        if mesh is not None:
            shard_model(module, mesh, at=tuple(part.split(".")))
        else:
            merge_projections(module)
            nnx.update(module, arena.place(nnx.state(module)))


def _load(
    model: nnx.Module,
    checkpoint: Checkpoint,
    name: str,
    weight: Weight,
    quantization: Quantization | None,
    dtype: Any,
) -> None:
    """Give the parameter that tensor `name` holds its values."""
    pack = packed = None
    if quantization is not None:
        if quantization.weights is not None and weight.path.endswith(".kernel"):
            pack = quantization.pack
        else:
            packed = checkpoint.packed(name)
    if packed is not None:
        _put(model, weight.path, jax.tree.map(jnp.asarray, packed), quantization, dtype)
        return
    values = weight.convert(checkpoint.floats(name))
    _put(model, weight.path, pack(jnp.asarray(values)) if pack else values, quantization, dtype)


def _put(
    model: nnx.Module,
    path: str,
    values: np.ndarray | ap.QuantizedTensor,
    quantization: Quantization | None,
    dtype: Any,
) -> None:
    """Give the parameter at `path` its values, in a packed layer if they are packed."""
    place, _, parameter = path.rpartition(".")
    module = find(model, place)
    if quantization is None or not isinstance(values, ap.QuantizedTensor):
        variable = getattr(module, parameter)
        variable.set_value(jnp.asarray(values, variable.get_value().dtype))
        return
    _check_replaced(path, module, values)
    if isinstance(module, nnx.Embed):
        replace(model, place, packed_embedding(quantization, values, dtype))
    else:
        bias = None if module.bias is None else module.bias.get_value()
        replace(model, place, packed_linear(quantization, values, dtype, bias=bias))


def _check_replaced(path: str, module: Any, values: ap.QuantizedTensor) -> None:
    """ValueError unless a layer of packed `values` computes what `module` does."""
    if type(module) is nnx.Linear:
        shape = module.kernel.shape
    elif type(module) is nnx.Embed:  # its table lies [vocabulary, features]
        shape = module.embedding.shape[::-1]
    else:
        raise ValueError(
            f"{path}: packed weights must take the place of an nnx.Linear or an nnx.Embed, got "
            f"{type(module).__name__}"
        )
    if values.shape != shape:
        raise ValueError(f"{path}: packed weights must have shape {shape}, got {values.shape}")


def find(model: nnx.Module, path: str) -> Any:
    """The module at a dotted `path`."""
    node: Any = model
    for key in path.split("."):
        node = node[int(key)] if key.isdigit() else getattr(node, key)
    return node


def replace(model: nnx.Module, path: str, module: nnx.Module) -> None:
    """Put `module` at a dotted `path`."""
    parents, _, child = path.rpartition(".")
    node: Any = find(model, parents) if parents else model
    if child.isdigit():
        node[int(child)] = module
    else:
        setattr(node, child, module)


def _part(path: str) -> str:
    """The part of the model that is placed as a whole: up to the first index, or attribute."""
    keys = path.split(".")
    ends = [n for n, key in enumerate(keys, 1) if key.isdigit()]
    return ".".join(keys[: ends[0] if ends else 1])


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model from a checkpoint.

    Args:
      model: with all weights in place.
      config: the model's.
      quantization: as it was asked for.
      name: what the checkpoint calls itself, or the file's or folder's name.
      own_tokenizer: of the same checkpoint, or None if it has none.
    """

    model: Any
    config: Any
    quantization: Quantization | None
    name: str
    own_tokenizer: Tokenizer | None

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, or ValueError if it has none."""
        if self.own_tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer")
        return self.own_tokenizer


@dataclasses.dataclass(frozen=True)
class WeightBytes:
    """Resident bytes of a model's weights.

    Args:
      linear: bytes of all linear layers, scales and offsets included.
      embedding: bytes of the embedding, which may also be the output head.
      other: bytes of norms and biases.
      linear_weights: number of weights in linear layers.
    """

    linear: int
    embedding: int
    other: int
    linear_weights: int

    @property
    def total(self) -> int:
        return self.linear + self.embedding + self.other

    @property
    def bits_per_linear_weight(self) -> float:
        """Bits that one weight of a linear layer takes, scales and offsets included."""
        return 8 * self.linear / self.linear_weights


def weight_bytes(model: nnx.Module) -> WeightBytes:
    """Resident bytes of a model's weights, as they are held: packed ones count packed."""
    linear = embedding = linear_weights = 0
    for _, module in nnx.iter_modules(model):
        match module:
            case nnx.Linear():
                linear += _nbytes(module.kernel)
                linear_weights += math.prod(module.kernel.shape)
            case ap.nnx.QuantLinear():
                linear += _nbytes(module.kernel)
                linear_weights += math.prod(module.kernel.get_value().shape)
            case nnx.LoRA():
                linear += _nbytes((module.lora_a, module.lora_b))
            case nnx.Embed() | ap.nnx.QuantEmbed():
                embedding += _nbytes(module)
    other = _nbytes(model) - linear - embedding
    return WeightBytes(linear, embedding, other, linear_weights)


def _nbytes(node: Any) -> int:
    """Bytes of all arrays of a pytree."""
    return sum(x.nbytes for x in jax.tree.leaves(node))
