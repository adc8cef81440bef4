"""The float layers of Flax that have a packed form, and what keeps one of them from it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import lax

HOOKS = ("on_get_value", "on_set_value", "on_create_value")


class FloatLayer(NamedTuple):
    """What conversion needs a layer to leave as Flax has it.

    Attributes:
      weight: the name of its weight.
      methods: those that a subclass must not override.
      options: attributes that must be None or this value.
    """

    weight: str
    methods: tuple[str, ...]
    options: dict[str, Any]


FLOAT_LAYERS: dict[type[nnx.Module], FloatLayer] = {
    nnx.Linear: FloatLayer("kernel", ("__call__",), {"dot_general": lax.dot_general}),
    nnx.LinearGeneral: FloatLayer(
        "kernel", ("__call__",), {"dot_general": None, "dot_general_cls": None}
    ),
    nnx.Einsum: FloatLayer("kernel", ("__call__",), {"einsum_op": jnp.einsum}),
    nnx.Embed: FloatLayer("embedding", ("__call__", "attend"), {}),
}


def float_base(layer: Any) -> type[nnx.Module] | None:
    """The class of Flax with a packed form that `layer` is of, or None."""
    return next((base for base in FLOAT_LAYERS if isinstance(layer, base)), None)


def own_behaviour(layer: Any, base: type[nnx.Module]) -> str | None:
    """What `layer` does that the packed form of its `base` would not, or None."""
    weight, methods, options = FLOAT_LAYERS[base]
    for method in methods:
        if getattr(type(layer), method) is not getattr(base, method):
            return f"{type(layer).__name__} overrides {method} of {base.__name__}"
    for name in (weight, "bias"):
        variable = getattr(layer, name, None)
        if variable is None:
            continue
        hook = next((h for h in HOOKS if variable.get_metadata().get(h)), None)
        if hook is not None:
            return f"its {name} has a hook {hook}"
        if type(variable).get_value is not nnx.Variable.get_value:
            return f"its {name} is a {type(variable).__name__}, which overrides get_value"
    for name, usual in options.items():
        value = getattr(layer, name)
        if value is not None and value is not usual:
            return f"has a {name} of its own"
    return None


def check_float_layer(layer: Any, base: type[nnx.Module], name: str) -> None:
    """TypeError unless `layer` is a `base`; ValueError if it does what a packed one would not."""
    if not isinstance(layer, base):
        raise TypeError(f"{name} must be a flax.nnx.{base.__name__}, got {type(layer).__name__}")
    behaviour = own_behaviour(layer, base)
    if behaviour is not None:
        raise ValueError(f"{name} has no packed form: {behaviour}")
