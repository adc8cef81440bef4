"""Trees as checkpoints see them: dicts, lists and tuples, with leaves by name."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from flax import nnx
from flax.core import meta

from .tensor import QuantizedTensor

Target = TypeVar("Target")

ROOT = "tensor"
"""Name of a leaf that is the whole tree."""


def is_packed(x: Any) -> bool:
    """Whether `x` is a leaf of checkpoints that is no leaf to JAX."""
    return isinstance(x, QuantizedTensor)


def leaf_name(keys: tuple[Any, ...]) -> str:
    """The name of a leaf from its path in JAX."""
    return jax.tree_util.keystr(keys, simple=True, separator=".") or ROOT


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a plain tree by their names, None among them left out."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_packed)
    return {leaf_name(keys): leaf for keys, leaf in flat}


def plain(tree: Any) -> Any:
    """Modules, states and Linen's boxes as the dicts, lists and values in them."""
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree)
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else meta.unbox(tree)


def filled(target: Target, values: Any) -> Target:
    """`target` with values in place of those that `plain` takes out of it.

    A module is changed and returned, of anything else a new one is made.
    """
    if isinstance(target, nnx.Module):
        nnx.update(target, filled(nnx.state(target), values))
        return target
    if isinstance(target, nnx.State):
        state = jax.tree.map(lambda leaf: leaf, target)
        nnx.replace_by_pure_dict(state, values)
        return state
    return jax.tree.map(
        lambda old, new: old.replace_boxed(new) if isinstance(old, meta.AxisMetadata) else new,
        target,
        values,
        is_leaf=lambda x: isinstance(x, meta.AxisMetadata | QuantizedTensor),
    )
