"""What variables say besides their values, and how axis names follow a weight that is packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ..tensor import QuantizedTensor
from .packed import Packed

NOTHING: Mapping[str, Any] = MappingProxyType({})
AXIS_NAMES = "out_sharding"


class Folded(Packed):
    """A packed weight whose float one had other axes; `shape` tells those.

    Models ask a kernel for its shape, to know how many heads there are, say.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The float weight's shape; leading axes of stacked layers are those of the value."""
        shape, rank = self.get_metadata("weight_shape"), self.get_metadata("packed_rank")
        value = self.get_value().shape
        return (*value[: len(value) - rank], *shape)


def folded(
    tensor: QuantizedTensor, metadata: Mapping[str, Any], weight_shape: Sequence[int], rank: int
) -> Folded:
    """As `packed`, for a float weight of another shape, of which `rank` axes were made."""
    return Folded(
        tensor,
        **{
            **metadata,
            "eager_sharding": False,
            "weight_shape": tuple(weight_shape),
            "packed_rank": rank,
        },
    )


def packed(tensor: QuantizedTensor, metadata: Mapping[str, Any]) -> Packed:
    """A variable of packed weights with the metadata of a float one.

    The axis names are those of the matrix ``[..., K, N]``, not of its planes, so Flax must not
    shard by them on its own.
    """
    return Packed(tensor, **{**metadata, "eager_sharding": False})


def metadata_of(
    variable: nnx.Variable[Any] | None, axes: Sequence[Sequence[int]] | None = None
) -> dict[str, Any]:
    """The metadata of a variable for one that takes its place: axis names, and what users attached.

    Args:
      variable: a float kernel, table or bias; None has none.
      axes: for each axis of the packed weight, the axes of the float one that it is made of; None
        if they are the same.
    """
    if variable is None:
        return {}
    storage = nnx.Variable.required_metadata
    metadata = {k: v for k, v in variable.get_metadata().items() if k not in storage}
    if axes is not None and metadata.get(AXIS_NAMES):
        metadata[AXIS_NAMES] = _regroup(metadata[AXIS_NAMES], axes)
    # The value is where it belongs already, and there may be no mesh to place it again.
    return {**metadata, "eager_sharding": False}


def _regroup(names: Any, axes: Sequence[Sequence[int]]) -> Any:
    """Axis names of a weight whose axes are reordered and flattened.

    A flattened axis is split over all that its parts were split over.
    """
    if isinstance(names, NamedSharding):
        return NamedSharding(names.mesh, _regroup(names.spec, axes))
    known: dict[int, Any] = dict(enumerate(names))
    grouped = [_joined([known.get(i) for i in group]) for group in axes]
    return PartitionSpec(*grouped) if isinstance(names, PartitionSpec) else tuple(grouped)


def _joined(names: Sequence[Any]) -> Any:
    """The names of axes that become one: None, a name, or a tuple of several."""
    flat: list[Any] = []
    for name in names:
        flat += name if isinstance(name, tuple) else [] if name is None else [name]
    return tuple(flat) if len(flat) > 1 else flat[0] if flat else None
