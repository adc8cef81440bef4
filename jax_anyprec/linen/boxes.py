"""Boxes with names of axes: around float weights, and so around what they are packed to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import linen as nn
from flax.core import meta

from ..einsum import Product
from ..tensor import QuantizedTensor


def box_like(
    box: Any, tensor: QuantizedTensor, product: Product, stack: Sequence[int]
) -> QuantizedTensor:
    """`tensor` with each array in a box like the float weight's, with the names of its axes.

    Args:
      box: an `nn.Partitioned` (or logically partitioned) weight, or anything else for no box.
      tensor: the packed weight, in planes.
      product: which of its axes is which, those of stacked layers apart.
      stack: the weight's axes of stacked layers, outermost first.
    """
    if not isinstance(box, nn.Partitioned):
        return tensor
    ndim = len(stack) + len(product.weight)
    # As in a PartitionSpec, names of the last axes may be missing.
    names = (*box.names, *[None] * (ndim - len(box.names)))
    own = [name for axis, name in enumerate(names) if axis not in stack]
    of = dict(zip(product.weight, own, strict=True))

    def first(indices: str) -> Any:
        """Flattened axes are split as the first of them that has a name."""
        return next((of[i] for i in indices if of[i] is not None), None)

    leading = [*(names[axis] for axis in stack), *(of[i] for i in product.batch)]
    k, n = first(product.contracted), first(product.features)
    groups = (*leading, n, k if tensor.groups > 1 else None)

    def boxed(value: Any, names: tuple[Any, ...]) -> Any:
        return None if value is None else box.replace(value=value, names=names)

    return dataclasses.replace(
        tensor,
        planes=boxed(tensor.planes, (*leading, None, n, k)),
        scales=boxed(tensor.scales, groups),
        offsets=boxed(tensor.offsets, groups),
    )


def unboxed(x: Any) -> Any:
    """The array in a box. Unlike `meta.unbox` it puts no sharding constraint on it."""
    return x.value if isinstance(x, nn.Partitioned) else meta.unbox(x)


def reboxed(box: Any, value: Any) -> Any:
    """An array in a box like the one that another was in, if that was in one."""
    return box.replace_boxed(value) if isinstance(box, meta.AxisMetadata) else value
