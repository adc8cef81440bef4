"""What the dense layers of Flax multiply: each method with one weight, described as an einsum."""

from __future__ import annotations

import dataclasses
import functools
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import jax
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype


@dataclasses.dataclass(frozen=True)
class EinsumCall:
    """One call of a layer: ``einsum(spec, inputs, weight) + bias``.

    Attributes:
      spec: the einsum, with the weight as its second operand.
      inputs: the first operand.
      weight, bias: names of parameters of the module; None for a layer without bias.
      promote: takes inputs, a scalar of the weight's dtype and the bias (or None), and gives them
        in the dtype of the computation.
      out_dtype: of the product, to which the bias is added; that of the promoted inputs by default.
      obstacle: why the weight must stay in float, or None.
    """

    spec: str
    inputs: Any
    weight: str = "kernel"
    bias: str | None = None
    promote: Callable[[Any, Any, Any], Sequence[Any]] = promote_dtype
    out_dtype: Dtype | None = None
    obstacle: str | None = None


Describe: TypeAlias = Callable[..., EinsumCall]
"""Takes a module and the arguments of its method, and says what the method multiplies."""

Calls: TypeAlias = Mapping[Callable[..., Any], Describe]
"""Methods of module classes with what they multiply: ``{Einsum.__call__: describe}``."""

OWN_DOT_GENERAL = "has a dot_general of its own"


def dense(module: nn.Dense, inputs: jax.Array) -> EinsumCall:
    return EinsumCall("...a,ab->...b", inputs, **_common(module))


def dense_general(module: nn.DenseGeneral, inputs: jax.Array) -> EinsumCall:
    letters = iter(string.ascii_letters)
    rows = [next(letters) for _ in range(inputs.ndim)]
    features = [next(letters) for _ in _as_tuple(module.features)]
    # Flax sorts axes, so this is the order in which the kernel has them.
    axes = sorted(axis % inputs.ndim for axis in _as_tuple(module.axis))
    batch = [rows[axis % inputs.ndim] for axis in sorted(_as_tuple(module.batch_dims))]
    contracted = [rows[axis] for axis in axes]
    kept = [row for row in rows if row not in contracted]
    spec = f"{''.join(rows)},{''.join(batch + contracted + features)}->{''.join(kept + features)}"
    return EinsumCall(spec, inputs, **_common(module))


def einsum(module: nn.Einsum, inputs: jax.Array, einsum_str: str | None = None) -> EinsumCall:
    spec = nn.merge_param("einsum_str", module.einsum_str, einsum_str)
    return EinsumCall(spec, inputs, **_common(module), out_dtype=module.preferred_element_type)


def attend(module: nn.Embed, query: jax.Array) -> EinsumCall:
    def promote(query: Any, embedding: Any, _: None) -> Sequence[Any]:
        return *module.promote_dtype(query, embedding, dtype=module.dtype), None

    return EinsumCall("...a,ba->...b", query, weight="embedding", promote=promote)


def _common(module: nn.Dense | nn.DenseGeneral | nn.Einsum) -> dict[str, Any]:
    """What the layers of Flax have in common: names, promotion and replaced products."""

    def promote(*operands: Any) -> Sequence[Any]:
        return module.promote_dtype(*operands, dtype=module.dtype)

    replaced = [getattr(module, name, None) for name in ("dot_general", "dot_general_cls")]
    return {
        "bias": "bias" if module.use_bias else None,
        "promote": promote,
        "obstacle": None if replaced == [None, None] else OWN_DOT_GENERAL,
    }


def _as_tuple(axes: int | Sequence[int]) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)


FLAX_CALLS: Calls = {
    nn.Dense.__call__: dense,
    nn.DenseGeneral.__call__: dense_general,
    nn.Einsum.__call__: einsum,
    nn.Embed.attend: attend,
}


def by_function(calls: Calls) -> dict[Callable[..., Any], Describe]:
    """Descriptions by the plain functions that Flax wraps to methods, those of Flax included.

    A subclass whose method calls this one through `super` is found by it too.
    """
    described: dict[Callable[..., Any], Describe] = {}
    for method, describe in {**FLAX_CALLS, **calls}.items():
        if not callable(method) or not hasattr(method, "__wrapped__"):
            raise TypeError(
                f"calls must have methods of module classes as keys, as Einsum.__call__, "
                f"got {method!r}"
            )
        described[plain(method)] = describe
    return described


def plain(method: Callable[..., Any]) -> Callable[..., Any]:
    """The function that Flax wrapped to make `method`."""
    return cast(Any, method).__wrapped__


def called(context: nn.module.InterceptorContext) -> Callable[..., Any]:
    """The plain function of an intercepted call."""
    return cast(functools.partial[Any], context.orig_method).func


def describe_call(
    describe: Describe, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> EinsumCall:
    """The description of one call, checked."""
    call = describe(module, *args, **kwargs)
    if not isinstance(call, EinsumCall):
        raise TypeError(
            f"calls must give an EinsumCall for each call, got {call!r} for {type(module).__name__}"
        )
    return call


def described_call(
    functions: Mapping[Callable[..., Any], Describe],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    context: nn.module.InterceptorContext,
) -> EinsumCall | None:
    """What an intercepted call multiplies, as `by_function` has it described; None if nothing."""
    describe = functions.get(called(context))
    return None if describe is None else describe_call(describe, context.module, args, kwargs)
