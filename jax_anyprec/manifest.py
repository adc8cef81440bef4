"""What a checkpoint's metadata says: the tree, what kind each leaf is, and what is static in it.

Containers are JSON's own where it has them, so a tree is easy to read: an object is a dict, a list
a list, null is None. What JSON lacks is an object with one name that begins with "$":

    "array"                                       an array under the leaf's name
    {"$packed": {"k": 64, "group_size": 32, "rotation": null, "columns": null}}
    {"$key": "threefry2x32"}                      a random key of JAX, stored as its integers
    {"$tuple": [...]}, {"$int": {"0": ..., ...}}  a tuple, a dict whose keys are integers

A leaf's name is its path, joined with ".". A named tuple is stored as a dict of its fields.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from . import format as fmt
from ._compat import Tracer
from .safetensors import CheckpointError, Tensor, parse_json
from .static import from_json, to_json
from .tensor import QuantizedTensor, check_group_size, check_tensor
from .trees import ROOT

FORMAT = "jax_anyprec"
VERSION = 1
FIELDS = ("planes", "scales", "offsets")
MAX_DEPTH = 64
MAX_NAME = 1000
"""Characters of the name of anything in a tree, with all that it is in."""
MAX_DIGITS = 18
"""Of an integer that is a key."""
KEY_IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")


@dataclasses.dataclass(frozen=True)
class Key:
    """Random keys as they lie in a file: ``data: uint32[..., n]``, and the generator's name."""

    data: Any
    implementation: str


def abstract_key(implementation: str) -> jax.ShapeDtypeStruct:
    """One random key of a generator, without its data."""
    return jax.eval_shape(partial(jax.random.key, impl=implementation), 0)


def encode(tree: Any, *, keep_prepared: bool) -> tuple[dict[str, Tensor], str]:
    """The tensors to write for `tree`, by name, and its manifest."""
    tensors: dict[str, Tensor] = {}

    def add(name: str, tensor: Tensor) -> None:
        if name in tensors:
            raise ValueError(f"two leaves would be stored as {name!r}")
        tensors[name] = tensor

    node = _Encoder(add, keep_prepared).encode(tree, ())
    return tensors, json.dumps({"version": VERSION, "tree": node}, separators=(",", ":"))


def decode(text: Any, tensors: Mapping[str, np.ndarray], where: str) -> Any:
    """The tree that a manifest describes: packed leaves `QuantizedTensor`, others array or `Key`.

    Args:
      text: the manifest, not trusted.
      tensors: views of the file by name; the tree must have each of them once.
      where: begins each message.
    """
    manifest = parse_json(text, f"{where}: the manifest") if isinstance(text, str) else None
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{where}: the manifest must be an object with version and tree")
    version = manifest.get("version")
    if type(version) is not int or version != VERSION:
        raise CheckpointError(
            f"{where} has version {version!s:.80} of the format, this library reads {VERSION}"
        )
    if manifest.keys() != {"version", "tree"}:
        raise CheckpointError(f"{where}: the manifest must have version and tree, nothing else")
    decoder = _Decoder(tensors, where)
    tree = decoder.decode(manifest["tree"], ())
    decoder.check_all_taken()
    return tree


class _Encoder:
    def __init__(self, add: Callable[[str, Tensor], None], keep_prepared: bool):
        self.add = add
        self.keep_prepared = keep_prepared

    def encode(self, node: Any, path: tuple[str, ...]) -> Any:
        """The JSON of `node`, whose tensors are added."""
        name = _name_at(path)
        match node:
            case None:
                return None
            case QuantizedTensor():
                return {"$packed": self._packed(node, name)}
            case Mapping():
                return self._mapping(node, path)
            case list():
                return self._items(enumerate(node), path)
            case tuple() if hasattr(node, "_fields"):
                # JAX names what is in it by its fields too, so it can be filled again.
                return self._mapping(dict(zip(node._fields, node, strict=True)), path)
            case tuple():
                return {"$tuple": self._items(enumerate(node), path)}
        return self._array(node, name)

    def _items(self, items: Iterable[tuple[Any, Any]], path: tuple[str, ...]) -> list[Any]:
        return [self.encode(value, (*path, str(key))) for key, value in items]

    def _mapping(self, node: Mapping[Any, Any], path: tuple[str, ...]) -> dict[str, Any]:
        integers = bool(node) and all(type(key) is int for key in node)
        for key in node:
            if not (_is_integer(str(key)) if integers else _is_word(key)):
                raise ValueError(
                    f"keys must all be strings that don't begin with '$', or all integers of at "
                    f"most {MAX_DIGITS} digits, got {key!r:.100} in {_join(path)}"
                )
        content = dict(zip(map(str, node), self._items(node.items(), path), strict=True))
        return {"$int": content} if integers else content

    def _packed(self, w: QuantizedTensor, name: str) -> dict[str, Any]:
        _check_packed(w, name)
        stored = w if self.keep_prepared else jax.eval_shape(QuantizedTensor.restore, w)
        for field in FIELDS:
            kept, value = getattr(stored, field), getattr(w, field)
            if kept is not None:
                _check_array(value, f"{name}.{field}")
                read = partial(_stored_field, w, field, stored.prepared)
                self.add(f"{name}.{field}", Tensor(kept.shape, np.dtype(kept.dtype), read))
        return to_json(stored)

    def _array(self, array: Any, name: str) -> Any:
        _check_array(array, name)
        if not jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            self.add(name, Tensor(array.shape, np.dtype(array.dtype), lambda: array))
            return "array"
        implementation = str(jax.random.key_impl(array))
        if implementation not in KEY_IMPLEMENTATIONS:
            raise TypeError(
                f"{name} is a key of {implementation}, which must be one of {KEY_IMPLEMENTATIONS}"
            )
        data = jax.random.key_data(array)
        self.add(name, Tensor(data.shape, np.dtype(data.dtype), lambda: data))
        return {"$key": implementation}


class _Decoder:
    def __init__(self, tensors: Mapping[str, np.ndarray], where: str):
        self.left = dict(tensors)
        self.where = where

    def decode(self, node: Any, path: tuple[str, ...]) -> Any:
        """The tree of views that the JSON `node` describes."""
        try:
            name = _name_at(path)
        except ValueError as error:
            raise CheckpointError(f"{self.where}: {error}") from None
        match node:
            case None:
                return None
            case "array":
                return self._take(name)
            case list():
                return self._items(node, path)
            case {"$packed": dict(static), **rest} if not rest:
                return self._packed(static, name)
            case {"$key": str(implementation), **rest} if not rest:
                return self._key(implementation, name)
            case {"$tuple": list(items), **rest} if not rest:
                return tuple(self._items(items, path))
            case {"$int": dict(content), **rest} if not rest:
                return {
                    self._integer(key, name): self.decode(value, (*path, key))
                    for key, value in content.items()
                }
            case dict() if all(map(_is_word, node)):
                return {key: self.decode(value, (*path, key)) for key, value in node.items()}
        raise self._error(name, f"is described by {node!s:.80}, which has no meaning")

    def check_all_taken(self) -> None:
        if self.left:
            raise CheckpointError(
                f"{self.where}: tensor {min(self.left)!r:.100} is not part of the manifest's tree"
            )

    def _items(self, items: list[Any], path: tuple[str, ...]) -> list[Any]:
        return [self.decode(value, (*path, str(i))) for i, value in enumerate(items)]

    def _integer(self, key: str, name: str) -> int:
        if not _is_integer(key):
            raise self._error(name, f"has the key {key!r:.100}, which must be an integer")
        return int(key)

    def _take(self, name: str) -> np.ndarray:
        if name not in self.left:
            raise self._error(name, "is in the manifest and not in the file, or twice in the tree")
        return self.left.pop(name)

    def _key(self, implementation: str, name: str) -> Key:
        if implementation not in KEY_IMPLEMENTATIONS:
            raise self._error(
                name, f"is a key of {implementation!r:.100}, allowed are {KEY_IMPLEMENTATIONS}"
            )
        data = self._take(name)
        size = jax.eval_shape(jax.random.key_data, abstract_key(implementation)).shape[-1]
        if data.dtype != np.uint32 or data.shape[-1:] != (size,):
            raise self._error(
                name,
                f"is a key of {implementation}, which is uint32[..., {size}], and has "
                f"{data.dtype}{list(data.shape)}",
            )
        return Key(data, implementation)

    def _packed(self, static: dict[str, Any], name: str) -> QuantizedTensor:
        planes, scales = self._take(f"{name}.planes"), self._take(f"{name}.scales")
        offsets = self.left.pop(f"{name}.offsets", None)
        try:
            w = QuantizedTensor(planes, scales, offsets, **from_json(static, name))
            _check_packed(w, name)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{self.where}: {str(error)[:1000]}") from None
        return w

    def _error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name!r:.200} {problem}")


def _join(path: tuple[str, ...]) -> str:
    return ".".join(path) or ROOT


def _name_at(path: tuple[str, ...]) -> str:
    """The name of what is at `path`; ValueError where nothing is allowed to be."""
    name = _join(path)
    if len(path) > MAX_DEPTH or len(name) > MAX_NAME:
        raise ValueError(
            f"{name!r:.200} is deeper than {MAX_DEPTH} levels or longer than {MAX_NAME} characters"
        )
    return name


def _is_word(key: Any) -> bool:
    return isinstance(key, str) and not key.startswith("$")


def _is_integer(key: str) -> bool:
    return re.fullmatch(rf"0|-?[1-9][0-9]{{0,{MAX_DIGITS - 1}}}", key) is not None


def _check_packed(w: QuantizedTensor, name: str) -> None:
    check_tensor(w, name)
    if check_group_size(w.group_size, w.k) != w.group_size:
        raise ValueError(f"{name} has k = {w.k} and group_size {w.group_size}")


def _check_array(array: Any, name: str) -> None:
    if isinstance(array, Tracer) or not isinstance(array, jax.Array | np.ndarray | np.generic):
        raise TypeError(
            f"{name} must be an array or a QuantizedTensor, got {type(array).__name__}"
            + " under tracing; save outside of jit" * isinstance(array, Tracer)
        )
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        raise ValueError(
            f"{name} lies on devices of other processes too, which save can't reach; use Orbax"
        )


def _stored_field(w: QuantizedTensor, field: str, prepared: bool) -> np.ndarray:
    """The array of a field in planes or, if `prepared`, as it is."""
    array = np.asarray(getattr(w, field))
    if w.columns is None or prepared:
        return array
    untile = fmt.untile_planes if field == "planes" else fmt.untile_groups
    return untile(array, w.columns)
