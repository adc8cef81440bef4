"""`Quantized`: a Linen module that runs with packed kernels where its variables have them."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from .. import einsum as einsums
from ..lookup import look_up
from . import calls as described
from .calls import Calls, EinsumCall
from .dense import COLLECTION
from .weights import PARAMS, PackedWeight, Setting, merge


class Quantized(nn.Module):
    """`module` with packed kernels: the same calls, the same paths of variables.

    Kernels that `quantize_model` packed are in the collection "packed", at the paths at which
    "params" had them. The calls of their layers are intercepted and multiply by them; all else runs
    as it is. Methods and attributes of the module are here too, so ``apply(..., method="encode")``
    works; but its submodules, bound to packed kernels, only run within its methods, and one named
    `module`, `settings` or `calls` is found as ``quantized.module.settings``. Variables without
    packed kernels run as in `module`, and `init` gives such.

    Attributes:
      module: the float model.
      settings: what each packed kernel stands for; `quantize_model` makes them.
      calls: descriptions of layers that Flax does not have, as pairs; see `quantize_linen`.
    """

    module: nn.Module
    settings: tuple[Setting, ...] = ()
    calls: tuple[tuple[Callable[..., Any], described.Describe], ...] = ()

    def setup(self) -> None:
        nn.share_scope(self, self.module)

    # Not wrapped by Flax, so that captured intermediates have the module's own call alone.
    @nn.nowrap
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run("__call__", args, kwargs)

    def _run(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        def call(module: nn.Module) -> Any:
            with nn.intercept_methods(interceptor(dict(self.calls))):
                return getattr(module, method)(*args, **kwargs)

        if not self._has_packed():
            return getattr(self.module, method)(*args, **kwargs)
        collections = (PARAMS, COLLECTION)
        add = functools.partial(merge, settings=self.settings)
        return nn.map_variables(call, collections, add)(self.module)

    def _has_packed(self) -> bool:
        return self.scope is not None and bool(self.variables.get(COLLECTION))

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As `nn.Module.apply`; `method` may also be a method of the module's class."""
        function = getattr(method, "__func__", method)
        name = getattr(function, "__name__", "")
        if function is not None and getattr(type(self.module), name, None) is function:
            method = name
        return super().apply(variables, *args, method=method, **kwargs)

    @nn.nowrap
    def __getattr__(self, name: str) -> Any:
        module = self.__dict__.get("module")
        if module is None or name.startswith("_"):
            return super().__getattr__(name)
        if not inspect.isfunction(inspect.getattr_static(type(module), name, None)):
            packed = self._has_packed()  # first, since it sets this module up and so the other's
            value = getattr(module, name)
            if packed and isinstance(value, nn.Module):
                raise ValueError(
                    f"{type(module).__name__}.{name} is a submodule, which finds no packed kernels "
                    f"from outside; call it in a method of {type(module).__name__}"
                )
            return value

        def forward(self: Quantized, *args: Any, **kwargs: Any) -> Any:
            return self._run(name, args, kwargs)

        return types.MethodType(forward, self)


def interceptor(calls: Calls) -> Callable[..., Any]:
    """For `nn.intercept_methods`: runs the calls whose weight is a `PackedWeight`."""
    functions = described.by_function(calls)

    def intercept(
        next_function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        function, module = described.called(context), context.module
        weight: Any
        if function in EMBED and module.has_variable(PARAMS, "embedding"):
            weight = module.get_variable(PARAMS, "embedding")
            if isinstance(weight, PackedWeight):
                return EMBED[function](module, weight, *args, **kwargs)
        elif call := described.described_call(functions, args, kwargs, context):
            weight = module.get_variable(PARAMS, call.weight)
            if isinstance(weight, PackedWeight):
                return multiply(module, call, weight)
        return next_function(*args, **kwargs)

    return intercept


def multiply(module: nn.Module, call: EinsumCall, weight: PackedWeight) -> jax.Array:
    """The output of a call, with a packed weight."""
    setting = weight.setting
    bias = None if call.bias is None else meta.unbox(module.get_variable(PARAMS, call.bias))
    like_weight = jnp.zeros((), setting.dtype)
    inputs, _, bias = call.promote(call.inputs, like_weight, bias)
    out_dtype = call.out_dtype
    if out_dtype is not None and bias is not None:
        out_dtype = jnp.result_type(out_dtype, bias.dtype)  # it is added to the product
    return einsums.einsum(
        call.spec,
        inputs,
        weight.tensor,
        weight_shape=setting.shape,
        bias=bias,
        act_bits=setting.quantization.activations,
        act_scales=setting.quantization.act_scales,
        out_dtype=out_dtype,
    )


def _setup_embed(module: nn.Embed, weight: PackedWeight) -> None:
    module.embedding = weight


def _look_up(module: nn.Embed, weight: PackedWeight, inputs: jax.Array) -> jax.Array:
    """Rows of a packed table, as `nn.Embed` takes them."""
    rows = look_up(weight.tensor, inputs).astype(weight.setting.dtype)
    return cast(jax.Array, module.promote_dtype(rows, dtype=module.dtype, inexact=False)[0])


EMBED: dict[Callable[..., Any], Callable[..., Any]] = {
    described.plain(nn.Embed.setup): _setup_embed,
    described.plain(nn.Embed.__call__): _look_up,
}
