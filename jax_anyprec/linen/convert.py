"""Planning and converting a Linen model: params in, params out, and a module that runs them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import DenyList, FrozenDict, freeze
from flax.errors import ScopeParamShapeError

from ..plan import Plan, make_plan
from ..quantization import Quantization
from ..rules import Rules
from ..tensor import QuantizedTensor
from .boxes import box_like, unboxed
from .calls import Calls
from .dense import COLLECTION
from .find import LinenLayer, eval_shape, find_layers, flatten, stack_positions
from .quantized import Quantized
from .weights import PARAMS, PackedWeight, Setting


def plan_linen(
    module: nn.Module,
    rules: Rules | Plan,
    variables: Mapping[str, Any],
    *inputs: Any,
    errors: bool = True,
    calls: Calls | None = None,
    method: Callable[..., Any] | str | None = None,
    **kwargs: Any,
) -> Plan:
    """What `quantize_linen` would do. The model is run by shapes alone.

    Args:
      module, rules, variables, inputs, calls, method, kwargs: as for `quantize_linen`.
      errors: whether to quantize each weight to measure its error; shapes have none.
    """
    layers = _find(module, variables, inputs, {**kwargs, "method": method}, calls)
    return make_plan(layers, rules, errors=errors)


def quantize_linen(
    module: nn.Module,
    rules: Rules | Plan,
    variables: Mapping[str, Any],
    *inputs: Any,
    donate: bool = False,
    calls: Calls | None = None,
    method: Callable[..., Any] | str | None = None,
    **kwargs: Any,
) -> tuple[Quantized, Any]:
    """Quantize the kernels of a Linen model as rules or a `Plan` say.

    Args:
      module: the model.
      rules: see `jax_anyprec.rules`; or what `plan_linen` gave for this model.
      variables: of the model; or shapes (``jax.eval_shape(module.init, ...)``), and then what
        comes back is shapes too, for a checkpoint to be restored into.
      inputs, method, kwargs: an example call, as ``module.init`` takes it without the rng: it shows
        which layer multiplies by which weight. Arrays may be `jax.ShapeDtypeStruct`.
      donate: delete each float kernel as soon as it is packed, so that no more is held than the
        model and one layer. `variables` is of no use afterwards. An array that stands at several
        paths of it is kept.
      calls: what layers multiply that Flax does not have, ``{Einsum.__call__: describe}`` with
        ``describe(module, *args) -> EinsumCall``.

    Returns:
      A `Quantized` module, which is called as `module` is, and its variables: each packed kernel
      has left "params" for "packed", at the same path; all else is as it was.

    Raises:
      ValueError: rules do not fit, nothing would be quantized, variables are not the model's, a
        kernel is not finite, or the model uses one in another way than by its layer's call.
        Nothing has been deleted then.
    """
    chosen = choose(module, rules, variables, inputs, {**kwargs, "method": method}, calls)
    return quantized_module(module, chosen, calls), converted(variables, chosen, donate=donate)


Chosen = tuple[LinenLayer, Quantization]
"""A layer that is quantized, and how."""


def choose(
    module: nn.Module,
    rules: Rules | Plan,
    variables: Mapping[str, Any],
    inputs: Sequence[Any],
    call: Mapping[str, Any],
    calls: Calls | None,
) -> list[Chosen]:
    """The layers that rules quantize; it has been tried, by shapes, that the model runs so.

    Args and Raises: as for `quantize_linen`, with `call` for its method and other arguments.
    """
    layers = _find(module, variables, inputs, call, calls)
    plan = make_plan(layers, rules, errors=False)
    chosen = [
        (layer, planned.quantization)
        for layer, planned in zip(layers, plan.layers, strict=True)
        if planned.quantization is not None
    ]
    if not chosen:
        raise ValueError(f"no layer would be quantized:\n{plan}")
    quantized = quantized_module(module, chosen, calls)
    _check_runs(quantized, converted(_shapes(variables), chosen), inputs, call)
    _check_finite([layer for layer, _ in chosen], variables)
    return chosen


def quantized_module(module: nn.Module, chosen: Sequence[Chosen], calls: Calls | None) -> Quantized:
    """The module that runs with these layers packed."""
    settings = tuple(_setting(layer, quantization) for layer, quantization in chosen)
    return Quantized(module, settings, tuple((calls or {}).items()))


def _find(
    module: nn.Module,
    variables: Mapping[str, Any],
    inputs: Sequence[Any],
    call: Mapping[str, Any],
    calls: Calls | None,
) -> list[LinenLayer]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a flax.linen.Module, got {type(module).__name__}")
    if not isinstance(variables, Mapping) or PARAMS not in variables:
        raise TypeError(f"variables must be a mapping with {PARAMS!r}, got {_names(variables)}")
    return find_layers(module, variables, inputs, call, calls or {})


def _names(variables: Any) -> str:
    return str(list(variables)) if isinstance(variables, Mapping) else type(variables).__name__


def _setting(layer: LinenLayer, quantization: Quantization) -> Setting:
    return Setting(
        layer.scope, layer.name, layer.inner_shape, layer.dtype, layer.stack_axes, quantization
    )


def converted(
    variables: Mapping[str, Any],
    chosen: Sequence[Chosen],
    weights: Mapping[tuple[str, ...], QuantizedTensor] | None = None,
    *,
    donate: bool = False,
) -> Any:
    """Variables with the chosen kernels packed, one after another.

    `weights` has those, by path, that are packed already; others are rounded to nearest.
    """
    places = Counter(map(id, jax.tree.leaves(variables)))
    params, packed = (dict(flatten(variables.get(name, {}))) for name in (PARAMS, COLLECTION))
    for layer, quantization in chosen:
        path = (*layer.scope, layer.name)
        box = params.pop(path)
        packed[path] = _pack(layer, quantization, box, (weights or {}).get(path))
        kernel = unboxed(box)
        if donate and isinstance(kernel, jax.Array) and places[id(kernel)] == 1:
            kernel.delete()
    return with_collections(variables, {PARAMS: params, COLLECTION: packed})


def with_collections(
    variables: Mapping[str, Any], collections: Mapping[str, Mapping[tuple[str, ...], Any]]
) -> Any:
    """Variables with other collections, given as leaves by path; frozen if they were."""
    changed = {**variables, **{name: _nest(leaves) for name, leaves in collections.items()}}
    return freeze(changed) if isinstance(variables, FrozenDict) else changed


def _pack(
    layer: LinenLayer, quantization: Quantization, box: Any, tensor: QuantizedTensor | None
) -> QuantizedTensor:
    weight = unboxed(box)
    stack = stack_positions(layer.stack_axes, weight.ndim)
    assert layer.product is not None
    if tensor is None:
        tensor = layer.holding(weight).pack(quantization)
    # Waiting keeps the working memory of later layers from being taken before this one's is free.
    return jax.block_until_ready(box_like(box, tensor, layer.product, stack))


def _check_finite(layers: Sequence[LinenLayer], variables: Mapping[str, Any]) -> None:
    """ValueError if a kernel has NaN or infinity: before any is deleted, and one at a time."""
    params = dict(flatten(variables[PARAMS]))
    for layer in layers:
        path = (*layer.scope, layer.name)
        kernel = unboxed(params[path])
        if not isinstance(kernel, jax.ShapeDtypeStruct) and not _is_finite(kernel):
            raise ValueError(f"{PARAMS}/{'/'.join(path)} must be finite, but has NaN or infinity")


@jax.jit  # one pass, without an array of booleans
def _is_finite(x: Any) -> jax.Array:
    return jnp.isfinite(x).all()


def _check_runs(
    quantized: Quantized, variables: Any, inputs: Sequence[Any], call: Mapping[str, Any]
) -> None:
    """ValueError unless the example call works, by shapes, with variables that are shapes.

    As `init` does, it starts without other collections: a cache may be of another call's shape.
    """
    options = {
        **call,
        "rngs": {PARAMS: jax.random.key(0)},
        "mutable": DenyList((PARAMS, COLLECTION)),
    }
    weights = {name: variables[name] for name in (PARAMS, COLLECTION)}
    try:
        eval_shape(quantized.apply, weights, *inputs, **options)
    except (AttributeError, TypeError, ScopeParamShapeError) as fault:
        # Other uses of a kernel stumble over what stands in its place, or over the shapes in it.
        about_kernel = PackedWeight.__name__ in str(fault)
        if not about_kernel and not isinstance(fault, ScopeParamShapeError):
            raise
        raise ValueError(
            "the model fails with packed kernels; a rule can leave the layer in float whose "
            f"kernel it uses in another way than by calling the layer: {fault}"
        ) from fault


def _shapes(variables: Mapping[str, Any]) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)


def _nest(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Nested dicts of leaves by path."""
    tree: dict[str, Any] = {}
    for (*scope, name), leaf in leaves.items():
        node = tree
        for part in scope:
            node = node.setdefault(part, {})
        node[name] = leaf
    return tree
