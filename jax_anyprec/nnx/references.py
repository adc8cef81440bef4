"""Where the modules and variables of an NNX model are referred to, and putting others there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

from flax import nnx


class Reference(NamedTuple):
    """A module or variable in an attribute of a module, or in Python's containers there.

    Modules are all of `nnx.Pytree`, of which `nnx.Module` is one.
    """

    path: str
    parent: nnx.Pytree
    attribute: str
    node: nnx.Pytree | nnx.Variable[Any]

    def replace(self, new: nnx.Module) -> None:
        """Put `new` in the place of the node."""
        value = _substitute(getattr(self.parent, self.attribute), self.node, new)
        setattr(self.parent, self.attribute, value)

    @contextmanager
    def replaced(self, stand_in: nnx.Module) -> Iterator[None]:
        """Within it, `stand_in` is in the place of the node."""
        self.replace(stand_in)
        try:
            yield
        finally:
            self._replace(node=stand_in).replace(cast(nnx.Module, self.node))


def references(model: nnx.Module) -> Iterator[Reference]:
    """All references in a model, in the order of names, as Flax has them after a split and merge.

    A shared module comes once for each reference to it; what it holds comes once.
    """
    yield from _references(model, (), {id(model)})


def held(module: nnx.Pytree) -> Iterator[tuple[str, Any]]:
    """The modules and variables that a module holds itself, by name ("layers/0" in a container)."""
    for attribute, value in _sorted(vars(module)):
        for keys, node in _nodes(value, (attribute,)):
            yield "/".join(keys), node


def _sorted(items: dict[str, Any]) -> list[tuple[str, Any]]:
    """Items by name, and numbers by value, so that a list keeps its order."""

    def order(item: tuple[str, Any]) -> tuple[int, str]:
        name = str(item[0])
        return (len(name), name) if name.isdecimal() else (-1, name)

    return sorted(items.items(), key=order)


def _references(parent: nnx.Pytree, path: tuple[str, ...], seen: set[int]) -> Iterator[Reference]:
    for attribute, value in _sorted(vars(parent)):
        for keys, node in _nodes(value, (*path, attribute)):
            yield Reference("/".join(keys), parent, attribute, node)
            if isinstance(node, nnx.Pytree) and id(node) not in seen:
                seen.add(id(node))
                yield from _references(node, keys, seen)


def _nodes(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, nnx.Pytree | nnx.Variable):
        yield keys, value
    elif isinstance(value, dict):
        for key, item in _sorted(value):
            yield from _nodes(item, (*keys, str(key)))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _nodes(item, (*keys, str(i)))


def _substitute(value: Any, old: Any, new: Any) -> Any:
    """`value` with `new` for `old`; dicts and lists are changed in place."""
    if value is old:
        return new
    if isinstance(value, dict):
        value.update({key: _substitute(item, old, new) for key, item in value.items()})
    elif isinstance(value, list):
        value[:] = [_substitute(item, old, new) for item in value]
    elif isinstance(value, tuple):
        items = [_substitute(item, old, new) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
