"""What is static in packed tensors, as JSON: for manifests, and for stores of arrays only."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax

from .rotation import Rotation
from .tensor import QuantizedTensor, check_tensor
from .trees import by_name, filled, is_packed, leaf_name, plain

Target = TypeVar("Target")
Fields = dict[str, Any]

STATIC = ("k", "group_size", "rotation", "columns")


def static_fields(tree: Any) -> dict[str, Fields]:
    """The static fields of each packed tensor of a tree by its name, as JSON.

    Orbax stores arrays and takes what is static from the target that it restores into. Save this
    with them (`custom_metadata`) and give it to `with_static_fields`; see docs/checkpoints.md.

    Args:
      tree: as for `save`; arrays may be abstract.
    """
    leaves = by_name(plain(tree))
    return {name: to_json(w) for name, w in leaves.items() if isinstance(w, QuantizedTensor)}


def with_static_fields(tree: Target, fields: dict[str, Fields]) -> Target:
    """The same tree with the static fields that `static_fields` took from another.

    Args:
      tree: as for `save`; arrays may be abstract. An `nnx.Module` is changed in place.
      fields: for exactly the packed tensors of `tree`.

    Raises:
      TypeError, ValueError: they are for other tensors, or something else than `static_fields`
        gives, or don't fit the arrays.
    """
    expected = {name for name, leaf in by_name(plain(tree)).items() if is_packed(leaf)}
    if unlike := sorted(expected ^ fields.keys()):
        where = "tree" if unlike[0] in expected else "fields"
        raise ValueError(
            f"fields must be for the packed tensors of the tree, {unlike[0]!r} is only in {where}"
        )

    def replace(keys: Any, leaf: Any) -> Any:
        name = leaf_name(keys)
        if not is_packed(leaf):
            return leaf
        packed = dataclasses.replace(leaf, **from_json(fields[name], name))
        check_tensor(packed, name)
        return packed

    replaced = jax.tree_util.tree_map_with_path(replace, plain(tree), is_leaf=is_packed)
    return filled(tree, replaced)


def to_json(w: QuantizedTensor) -> Fields:
    """The static fields of a tensor in JSON's types."""
    fields = {field: getattr(w, field) for field in STATIC}
    return fields | {"rotation": w.rotation and dataclasses.asdict(w.rotation)}


def from_json(fields: Any, name: str) -> Fields:
    """Arguments for `QuantizedTensor` from JSON that is not trusted.

    Only types are checked here, `check_tensor` knows what fits the arrays.

    Raises:
      TypeError, ValueError: they are not what `to_json` gives for any tensor.
    """
    if not isinstance(fields, dict) or fields.keys() != set(STATIC):
        raise ValueError(f"{name} must have {', '.join(STATIC)}, got {fields!s:.100}")
    for field in ("k", "group_size", "columns"):
        value, optional = fields[field], field == "columns"
        if not (optional and value is None) and (type(value) is not int or value < 0):
            raise ValueError(f"{name} has {field} {value!s:.100}, it must be an int from 0")
    rotation = fields["rotation"]
    if rotation is not None and not isinstance(rotation, dict):
        raise ValueError(f"{name} has rotation {rotation!s:.100}, it must be an object or null")
    return fields | {"rotation": None if rotation is None else Rotation(**rotation)}
