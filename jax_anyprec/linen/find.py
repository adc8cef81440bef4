"""Finds the layers of a Linen model: initializes it by shapes alone and watches its calls."""

from __future__ import annotations

import collections
import dataclasses
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from flax.core import DenyList, meta

from ..einsum import Product, parse
from ..plan import Layer
from ..tensor import SCALE_DTYPES
from .boxes import unboxed
from .calls import Calls, attend, by_function, called, describe_call, plain
from .weights import PARAMS

Scope = tuple[str, ...]
WATCHED = " watched"
EMBED_METHODS = ("__call__", "attend")
BASES = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Embed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinenLayer(Layer):
    """A layer of a Linen model, and where its weight is.

    Args:
      scope, name: of the weight: names of modules from the root, and the parameter's.
      inner_shape, stack_axes: see `weights.Setting`.
      product: what the weight is multiplied as; None if the layer has an obstacle.
    """

    scope: Scope
    name: str = ""
    inner_shape: tuple[int, ...] = ()
    stack_axes: tuple[int, ...] = ()
    product: Product | None = None

    def holding(self, weight: Any) -> LinenLayer:
        """The same layer with another array or shapes for its weight."""
        stack = stack_positions(self.stack_axes, weight.ndim)
        return dataclasses.replace(self, weight=_stack_first(weight, stack))


class _Use:
    """How one weight is used: by which class, as which products, with which bias."""

    def __init__(self, kind: str, shape: tuple[int, ...]):
        self.kind = kind
        self.shape = shape
        self.products: list[Product] = []
        self.obstacle: str | None = None
        self.names: set[str] = set()


class _Watched(struct.PyTreeNode, meta.AxisMetadata[Any]):
    """A parameter that remembers where `nn.scan` and `nn.vmap` put axes, innermost first.

    It stands beside the weight and shares its fate.
    """

    value: Any
    axes: tuple[int, ...] = struct.field(pytree_node=False, default=())

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> _Watched:
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> _Watched:
        return self.replace(axes=(*self.axes, index))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> _Watched:
        return self.replace(axes=self.axes[:-1])


class _Watcher:
    """An interceptor that notes the classes of modules, and the products of their weights."""

    def __init__(self, calls: Calls):
        self.functions = by_function(calls)
        self.kinds: dict[Scope, str] = {}
        self.uses: dict[tuple[Scope, str], _Use] = {}

    def __call__(
        self,
        next_function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module, function = context.module, called(context)
        self.kinds.setdefault(module.path, _kind(type(module)))
        out = next_function(*args, **kwargs)
        if function is plain(nn.Embed.setup):
            self._note(module, attend, (None,), {})
            if any(getattr(type(module), m) is not getattr(nn.Embed, m) for m in EMBED_METHODS):
                self._use(module, "embedding").obstacle = "a subclass that looks up in its own way"
        elif function in self.functions and function is not plain(nn.Embed.attend):
            self._note(module, self.functions[function], args, kwargs)
        return out

    def _note(self, module: nn.Module, describe: Any, args: Any, kwargs: Any) -> None:
        call = describe_call(describe, module, args, kwargs)
        if not module.has_variable(PARAMS, call.weight):
            raise ValueError(
                f"{type(module).__name__} at {'/'.join(module.path)!r} is described with the "
                f"weight {call.weight!r}, but has no such parameter"
            )
        use = self._use(module, call.weight)
        use.names |= {call.weight} if call.bias is None else {call.weight, call.bias}
        use.obstacle = use.obstacle or call.obstacle
        try:
            product = parse(call.spec)
            product.sizes(use.shape)
        except ValueError as fault:
            use.obstacle = str(fault)
            return
        use.products.append(product)
        if _axes(product) != _axes(use.products[0]):
            use.obstacle = f"is multiplied as {use.products[0].spec!r} and as {product.spec!r}"

    def _use(self, module: nn.Module, name: str) -> _Use:
        weight: Any = unboxed(module.get_variable(PARAMS, name))
        module.put_variable(PARAMS, name + WATCHED, _Watched(jnp.zeros_like(weight)))
        use = _Use(_kind(type(module)), weight.shape)
        return self.uses.setdefault((module.path, name), use)


def _kind(found: type) -> str:
    """The name of a class, and of the layer of Flax that it is derived from."""
    base = next((base for base in BASES if issubclass(found, base)), found)
    return found.__name__ if base is found else f"{found.__name__}({base.__name__})"


def find_layers(
    module: nn.Module,
    variables: Mapping[str, Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    calls: Calls,
) -> list[LinenLayer]:
    """All layers with parameters, in the order of `variables`.

    Args:
      module: the model, unbound.
      variables: arrays or shapes; their weights are those of the layers.
      args, kwargs: of ``module.init``, rngs apart; arrays may be shapes.
      calls: descriptions of layers that Flax does not have.
    """
    watcher = _Watcher(calls)
    # A name that was never there before makes nn.jit trace anew, which is to be watched.
    mutable = DenyList(("intermediates", secrets.token_hex()))
    with nn.intercept_methods(watcher):
        initial = eval_shape(module.init, jax.random.key(0), *args, mutable=mutable, **kwargs)
    drawn = dict(flatten(initial.get(PARAMS, {})))
    given = dict(flatten(variables[PARAMS]))
    scopes: dict[Scope, list[str]] = collections.defaultdict(list)
    for path in given:
        scopes[path[:-1]].append(path[-1])
    for scope, name in watcher.uses:
        _check_given((*scope, name), drawn, given)
    return [
        layer
        for scope, names in scopes.items()
        for layer in _layers_of(watcher, scope, names, drawn, given)
    ]


def _layers_of(
    watcher: _Watcher,
    scope: Scope,
    names: Sequence[str],
    drawn: Mapping[Scope, Any],
    given: Mapping[Scope, Any],
) -> Iterator[LinenLayer]:
    """The layers of one scope: one for each weight, and one for what no weight's call takes.

    A weight that is alone in being called has the scope's path; other matrices have their own.
    """
    uses = {name: use for name in names if (use := watcher.uses.get((scope, name)))}
    if len(uses) == 1:
        ((name, use),) = uses.items()
        stacked = len(drawn[*scope, name + WATCHED].axes)
        ndims = {n: unboxed(given[*scope, n]).ndim - stacked for n in names if n not in use.names}
        others = [n for n, ndim in ndims.items() if ndim >= 2]
        own = [n for n in names if n not in others]
        yield _used(scope, scope, name, own, use, drawn, given)
        for other in others:
            yield _unused(watcher, (*scope, other), scope, [other], given)
        return
    left = set(names)
    for name, use in uses.items():
        own = [n for n in names if n in use.names]
        left -= set(own)
        yield _used((*scope, name), scope, name, own, use, drawn, given)
    if left:
        yield _unused(watcher, scope, scope, [n for n in names if n in left], given)


def _used(
    path: Scope,
    scope: Scope,
    name: str,
    names: Sequence[str],
    use: _Use,
    drawn: Mapping[Scope, Any],
    given: Mapping[Scope, Any],
) -> LinenLayer:
    """A layer whose weight is multiplied in a known way."""
    box = given[*scope, name]
    weight = unboxed(box)
    insertions = drawn[*scope, name + WATCHED].axes
    common: dict[str, Any] = {
        "path": "/".join(path),
        "kind": use.kind,
        "shape": tuple(weight.shape),
        "dtype": np.dtype(weight.dtype).name,
        "nbytes": _nbytes(given, scope, names),
        "scope": scope,
        "name": name,
    }
    obstacle = use.obstacle or _obstacle(box, weight, insertions)
    if obstacle is not None:
        return LinenLayer(**common, obstacle=obstacle)
    product, stack = use.products[0], stack_positions(insertions, weight.ndim)
    sizes = tuple(weight.shape[axis] for axis in stack)
    return LinenLayer(
        **common,
        matrix=(*sizes, *product.packed_shape(use.shape)),
        stacked=len(stack),
        matrices=product.matrices,
        inner_shape=use.shape,
        stack_axes=insertions,
        product=product,
    ).holding(weight)


def _unused(
    watcher: _Watcher, path: Scope, scope: Scope, names: Sequence[str], given: Mapping[Scope, Any]
) -> LinenLayer:
    """A layer that stays in float: what it is and why."""
    largest = max((unboxed(given[*scope, name]) for name in names), key=lambda x: x.size)
    kind = watcher.kinds.get(scope, "?")
    if scope not in watcher.kinds:
        obstacle = "the example inputs do not reach it"
    elif "Conv" in kind:
        obstacle = "convolutions stay in float"
    elif largest.ndim < 2 or "Norm" in kind:
        obstacle = "has no matrix"
    else:
        obstacle = f"what {kind} multiplies is unknown; `calls` can describe it"
    return LinenLayer(
        path="/".join(path),
        kind=kind,
        shape=tuple(largest.shape),
        dtype=np.dtype(largest.dtype).name,
        nbytes=_nbytes(given, scope, names),
        scope=scope,
        obstacle=obstacle,
    )


def _obstacle(box: Any, weight: Any, insertions: Sequence[int]) -> str | None:
    """Why a weight with a known product can't be packed, or None."""
    if isinstance(box, meta.AxisMetadata) and not isinstance(box, nn.Partitioned):
        return f"its box, a {type(box).__name__}, has no names of axes to keep"
    if (dtype := np.dtype(weight.dtype).name) not in SCALE_DTYPES:
        return f"its weight is {dtype}; {', '.join(SCALE_DTYPES)} can be packed"
    # Scales have two axes of their own; each stack in turn adds one.
    if any(not -3 <= axis <= 2 for axis in insertions):
        return f"is stacked along axis {max(insertions, key=abs)}; packed weights go up to 2"
    return None


def _check_given(path: Scope, drawn: Mapping[Scope, Any], given: Mapping[Scope, Any]) -> None:
    """ValueError unless the weight at `path` is as the model would draw it."""
    name = f"{PARAMS}/{'/'.join(path)}"
    if path not in given:
        raise ValueError(f"variables must have {name}, which the model uses")
    expected, found = unboxed(drawn[path]).shape, unboxed(given[path]).shape
    if found != expected:
        raise ValueError(f"variables must have {name} of shape {expected}, got {found}")


def stack_positions(insertions: Sequence[int], ndim: int) -> tuple[int, ...]:
    """Axes of a weight of `ndim` that stand for stacked layers, outermost first."""
    axes = list(range(ndim - len(insertions)))
    for level, index in enumerate(insertions):
        axes.insert(index if index >= 0 else len(axes) + 1 + index, -1 - level)
    return tuple(axes.index(-1 - level) for level in reversed(range(len(insertions))))


class _Stack:
    """A weight whose stacked axes are not its first: it gives one element after another."""

    def __init__(self, weight: Any, axes: Sequence[int]):
        self.weight = weight
        self.axes = axes

    def __iter__(self) -> Iterator[Any]:
        axis, *rest = self.axes
        rest = [a - (a > axis) for a in rest]
        for i in range(self.weight.shape[axis]):
            element = self.weight[(slice(None),) * axis + (i,)]
            yield _stack_first(element, rest)


def _stack_first(weight: Any, axes: Sequence[int]) -> Any:
    """`weight` for iteration along `axes`: itself, shapes in another order, or a `_Stack`."""
    if tuple(axes) == tuple(range(len(axes))):
        return weight
    if not isinstance(weight, jax.ShapeDtypeStruct):
        return _Stack(weight, axes)
    order = [*axes, *(axis for axis in range(weight.ndim) if axis not in axes)]
    return jax.ShapeDtypeStruct([weight.shape[axis] for axis in order], weight.dtype)


def _axes(product: Product) -> tuple[tuple[int, ...], ...]:
    """Which axes of the weight play which part: what packing depends on."""
    parts = (product.batch, product.contracted, product.features)
    return tuple(tuple(product.weight.index(i) for i in part) for part in parts)


def _nbytes(given: Mapping[Scope, Any], scope: Scope, names: Sequence[str]) -> int:
    weights = (unboxed(given[*scope, name]) for name in names)
    return sum(w.size * np.dtype(w.dtype).itemsize for w in weights)


def flatten(tree: Any, path: Scope = ()) -> Iterator[tuple[Scope, Any]]:
    """The leaves of nested mappings with their paths; boxes are leaves."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from flatten(value, (*path, name))
    else:
        yield path, tree


def eval_shape(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`jax.eval_shape`, for arguments of which some are no arrays: those stay as they are."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = {i: x for i, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")}

    def call(arrays: dict[int, Any]) -> Any:
        args, kwargs = jax.tree.unflatten(
            structure, [arrays.get(i, x) for i, x in enumerate(leaves)]
        )
        return function(*args, **kwargs)

    return jax.eval_shape(call, arrays)
