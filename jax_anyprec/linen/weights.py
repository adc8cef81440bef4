"""`PackedWeight`: a packed kernel in the place of a parameter, with how to multiply by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from ..quantization import Quantization
from ..tensor import QuantizedTensor
from .dense import COLLECTION

PARAMS = "params"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a packed tensor does not say about the weight that it stands for.

    Attributes:
      scope, name: where it is: names of modules from the root, and the parameter's.
      shape, dtype: of the float weight as the layer sees it, without axes of stacked layers.
      stack_axes: where `nn.scan` and `nn.vmap` put the axes of stacked layers, innermost first,
        each as it counts when those before it are there.
      quantization: how it was packed and how to multiply.
    """

    scope: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    dtype: str
    stack_axes: tuple[int, ...]
    quantization: Quantization


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A packed weight as layers find it among their parameters while a model runs."""

    tensor: QuantizedTensor
    setting: Setting = dataclasses.field(metadata={"static": True})


def merge(variables: Mapping[str, Any], settings: Sequence[Setting]) -> dict[str, Any]:
    """Variables with packed kernels among the parameters, where lifted transforms take them along.

    `nn.scan` and `nn.vmap` of a user's model slice "params" and know nothing of "packed".
    """
    params = _copy(variables.get(PARAMS, {}))
    for setting in settings:
        tensor: Any = variables[COLLECTION]
        for name in (*setting.scope, setting.name):
            if name not in tensor:
                path = "/".join((*setting.scope, setting.name))
                raise ValueError(f"variables must have {COLLECTION}/{path}, a packed kernel")
            tensor = tensor[name]
        weight = PackedWeight(place_stack(meta.unbox(tensor), setting.stack_axes), setting)
        node = params
        for name in setting.scope:
            node = node.setdefault(name, {})
        node[setting.name] = weight
    return {**variables, PARAMS: params}


def place_stack(tensor: QuantizedTensor, stack_axes: Sequence[int]) -> QuantizedTensor:
    """A tensor with its leading axes where lifted transforms slice; they move back for nothing.

    XLA cancels the pair of transpositions.
    """
    if not any(stack_axes):
        return tensor

    def place(leaf: Any) -> Any:
        for left, axis in zip(range(len(stack_axes), 0, -1), stack_axes, strict=True):
            leaf = jnp.moveaxis(leaf, left - 1, axis if axis < 0 else left - 1 + axis)
        return leaf

    return jax.tree.map(place, tensor)


def _copy(tree: Any) -> Any:
    """The same mappings anew, as dicts, around the same leaves."""
    return {k: _copy(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree
