"""Packed checkpoints: `save`, `load` and `load_into` for trees with `QuantizedTensor`s.

A checkpoint is one safetensors file, or several with an index. A packed tensor ``w`` is stored as
``w.planes``, ``w.scales`` and ``w.offsets``, anything else under its own name; the tree and what is
static in it are JSON in the metadata. `docs/checkpoints.md` describes the format.
"""

from __future__ import annotations

import os
from collections.abc import Set
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.dtypes import canonicalize_dtype

from .format import check_bits
from .manifest import FORMAT, Key, abstract_key, decode, encode
from .placement import OnRead, Placement, sharding_function
from .safetensors import CheckpointError
from .shards import read_tensors, write_tensors
from .tensor import QuantizedTensor
from .trees import by_name, filled, is_packed, leaf_name, plain

Target = TypeVar("Target")

__all__ = ["CheckpointError", "load", "load_into", "save"]


def save(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    keep_prepared: bool = False,
    max_shard_bytes: int | None = None,
) -> None:
    """Write a tree to a safetensors file, which replaces an older one when it is complete.

    So do several files; docs/checkpoints.md says what an interrupted save can leave. Tensors are
    written one at a time; the model is never in memory twice.

    Args:
      path: of the file, by convention ``*.safetensors``.
      tree: dicts, lists and tuples of arrays and `QuantizedTensor`s; or an `nnx.Module` or
        `nnx.State`, or variables of a Linen module. Named tuples, as in states of Optax, are stored
        as dicts of their fields: `load` gives those, `load_into` fills named tuples.
      keep_prepared: store prepared tensors as they are, for loading them in place with
        ``memory_map=True``, and not as planes, of which any number can be loaded.
      max_shard_bytes: where files are to be cut, as Hugging Face does; None for one file.

    Raises:
      TypeError: a leaf is no array, or of a dtype that safetensors files don't hold.
      ValueError: two leaves would have the same name, or the path, a key, a name or a shape is
        one that can't be loaded again.
    """
    if max_shard_bytes is not None and max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive or None, got {max_shard_bytes}")
    tensors, manifest = encode(plain(tree), keep_prepared=keep_prepared)
    write_tensors(Path(path), tensors, {FORMAT: manifest}, max_shard_bytes)


def load(
    path: str | os.PathLike[str],
    *,
    bits: int | None = None,
    sharding: Any = None,
    memory_map: bool = False,
    on_read: OnRead | None = None,
) -> Any:
    """The tree of a checkpoint: dicts, lists and tuples as they were saved, of JAX arrays.

    Modules and states come back as dicts of their values; `load_into` fills one. Other safetensors
    files give a flat dict of arrays by name. Everything about the file's structure is checked
    before memory is taken, then one tensor at a time is read.

    Args:
      path: of the file; of several files, that which was given to `save`, or the index.
      bits: read only so many planes of each tensor (all, where it has fewer): its most significant
        ones, as `QuantizedTensor.truncate` gives them.
      sharding: where arrays go, by default whole to the default device. A `jax.sharding.Sharding`
        for all; or a tree like the checkpoint's with them as leaves; or a function of a leaf's name
        and the leaf, not yet read, that returns one. In place of a packed tensor stands one for all
        its fields or a `QuantizedTensor` of them. Of the file each device gets its part only.
      memory_map: on a CPU, use tensors where they lie in the mapped file, without reading them
        first or checking their values. Nobody may write into the file meanwhile (`save` replaces
        it, which is fine).
      on_read: called with each leaf's name and the bytes that were read of it (or are mapped).

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointError: it is no checkpoint, or corrupt, or can't be loaded as asked.
    """
    stored = _open(path, bits)
    shardings = sharding_function(plain(sharding))
    place = Placement(str(path), bits, shardings, memory_map, on_read)
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: place(leaf_name(keys), leaf), stored, is_leaf=is_packed
    )


def load_into(
    target: Target,
    path: str | os.PathLike[str],
    *,
    bits: int | None = None,
    sharding: Any = None,
    memory_map: bool = False,
    on_read: OnRead | None = None,
) -> Target:
    """Fill `target` from a checkpoint that has the same leaves.

    A packed tensor must stand for a matrix of the same shape; its bits, groups and rotation are the
    checkpoint's, and it is prepared where the target's is. Other leaves must have the same shape
    and dtype.

    Args:
      target: an `nnx.Module`, changed in place and returned; or an `nnx.State`, variables of a
        Linen module or another tree, of which a new one is returned. Leaves may be abstract, as
        from `nnx.eval_shape` or `jax.eval_shape`.
      path, bits, memory_map, on_read: as for `load`.
      sharding: as for `load`; by default where the target's leaves are, or are to be.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointError: as for `load`, or leaves are missing, extra or unlike; `target` is unchanged.
      TypeError: a leaf of the target is no array.
    """
    tree = plain(target)
    stored, wanted = by_name(_open(path, bits)), by_name(tree)
    _check_names(stored.keys(), wanted.keys(), str(path))
    for name, like in wanted.items():
        _check_alike(stored[name], like, f"{path}: {name!r}")

    def sharding_of_target(name: str, leaf: Any) -> Any:
        return jax.tree.map(_sharding_of, wanted[name])

    shardings = sharding_of_target if sharding is None else sharding_function(plain(sharding))
    place = Placement(str(path), bits, shardings, memory_map, on_read)

    def read(keys: Any, like: Any) -> Any:
        name = leaf_name(keys)
        return place(name, stored[name], prepared=is_packed(like) and like.prepared)

    return filled(target, jax.tree_util.tree_map_with_path(read, tree, is_leaf=is_packed))


def _open(path: str | os.PathLike[str], bits: int | None) -> Any:
    """The tree of mapped views, checked for all that can be known without reading them."""
    if bits is not None:
        bits = check_bits(bits)
    tensors, metadata = read_tensors(path)
    tree = decode(metadata[FORMAT], tensors, str(path)) if FORMAT in metadata else tensors
    for name, leaf in by_name(tree).items():
        if isinstance(leaf, QuantizedTensor):
            if bits is not None and leaf.prepared and leaf.bits > bits:
                raise CheckpointError(
                    f"{path}: {name!r} is stored prepared, of which no planes can be left out; "
                    f"load all {leaf.bits} bits and truncate, or save without keep_prepared"
                )
        elif isinstance(leaf, np.ndarray) and canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise CheckpointError(
                f"{path}: {name!r} is {leaf.dtype}, which JAX holds only with jax_enable_x64"
            )
    return tree


def _check_names(stored: Set[str], wanted: Set[str], path: str) -> None:
    for names, which in (
        (wanted - stored, "lacks leaves of the target"),
        (stored - wanted, "has leaves that the target lacks"),
    ):
        if names:
            first = ", ".join(sorted(names)[:8])
            raise CheckpointError(f"{path} {which}, {len(names)} of them: {first}")


def _check_alike(stored: Any, like: Any, what: str) -> None:
    """CheckpointError unless a leaf of the file can take the place of one in the target."""
    if not is_packed(like) and not (hasattr(like, "shape") and hasattr(like, "dtype")):
        raise TypeError(
            f"{what} of the target must be an array, abstract or not, or a QuantizedTensor, got "
            f"{type(like).__name__}"
        )
    found, expected = _kind(stored), _kind(like)
    if found != expected:
        raise CheckpointError(f"{what} is {found}, the target has {expected}")


def _kind(leaf: Any) -> str:
    """What must be equal in leaves that stand for one another, for people too."""
    if isinstance(leaf, QuantizedTensor):
        return f"a packed matrix {list(leaf.shape)}"
    if isinstance(leaf, Key):
        return f"{abstract_key(leaf.implementation).dtype}{list(leaf.data.shape[:-1])}"
    return f"{leaf.dtype}{list(leaf.shape)}"


def _sharding_of(array: Any) -> Any:
    """Where an array is, or an abstract one is to be; None where nobody has said."""
    return getattr(array, "sharding", None) if getattr(array, "committed", True) else None
