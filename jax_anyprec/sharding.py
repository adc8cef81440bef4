"""Where the fields of a quantized tensor lie on a mesh, given how its matrix is cut."""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.sharding import NamedSharding, PartitionSpec

from . import format as fmt
from .tensor import QuantizedTensor


def partition_specs(w: QuantizedTensor, spec: PartitionSpec) -> QuantizedTensor:
    """The `PartitionSpec` of each field of `w`, for `jax.shard_map` and `NamedSharding`.

    Args:
      w: arrays or `jax.ShapeDtypeStruct`; only shapes are used.
      spec: of the matrix ``(..., K, N)``: ``P(None, "model")`` cuts output features (column
        parallel), ``P("model", None)`` input features (row parallel).

    Returns:
      A `QuantizedTensor` with specs in the places of its arrays; one scale for all of K lies on
      every device. Whether sizes can be cut so is checked by `tensor_sharding`.
    """
    names = (*spec, *[None] * (len(w.shape) - len(spec)))
    if len(names) > len(w.shape):
        raise ValueError(f"spec must have at most {len(w.shape)} axes, as w has, got {spec}")
    *leading, k, n = names
    group = k if w.groups > 1 else None
    planes = (n, k, None, None) if w.prepared else (None, n, k)
    groups = PartitionSpec(*leading, n, group, *((None,) if w.prepared else ()))
    return dataclasses.replace(
        w,
        planes=PartitionSpec(*leading, *planes),
        scales=groups,
        offsets=None if w.offsets is None else groups,
    )


def tensor_sharding(
    w: QuantizedTensor, mesh: jax.sharding.Mesh, spec: PartitionSpec
) -> QuantizedTensor:
    """`partition_specs` as shardings over `mesh`, in the places of the arrays of `w`.

    For `jax.device_put`, ``in_shardings`` and loading. Raises ValueError where a size can't be cut
    evenly; the message says what to pad.
    """
    for axis, names in zip(("K", "N"), (*spec[len(w.shape) - 2 :], None, None), strict=False):
        parts = [n for n in (names if isinstance(names, tuple) else (names,)) if n is not None]
        unknown = [name for name in parts if name not in mesh.shape]
        if unknown:
            raise ValueError(f"spec must name axes of the mesh {mesh.axis_names}, got {unknown}")
        count = math.prod(mesh.shape[name] for name in parts)
        _check_even(w, axis, count)
    specs = partition_specs(w, spec)
    place = lambda s: None if s is None else NamedSharding(mesh, s)  # noqa: E731
    return dataclasses.replace(
        specs,
        planes=place(specs.planes),
        scales=place(specs.scales),
        offsets=place(specs.offsets),
    )


def shard(w: QuantizedTensor, mesh: jax.sharding.Mesh, spec: PartitionSpec) -> QuantizedTensor:
    """`w` cut over the devices of `mesh` as `tensor_sharding` says."""
    return jax.device_put(w, tensor_sharding(w, mesh, spec))


def local_part(w: QuantizedTensor) -> QuantizedTensor:
    """The part of a tensor that `jax.shard_map` hands to a device, as a tensor of its own.

    The arrays are a part already, but sizes that are static (K, N) are still those of the whole.
    Where K is cut, sum the products of the parts (`jax.lax.psum`). Activations that have one scale
    for all of K (``act_scales="token"``, or one weight group) have one for each part then; under
    automatic sharding they keep the one.

    Raises:
      ValueError: K was cut and `w` is rotated: the signs of a part depend on its place, which
        automatic sharding knows. Or N was cut and `w` is prepared with a last tile that is padded.
    """
    words = w.planes.shape[-3 if w.prepared else -1]
    k = w.k if words == fmt.words(w.k) else words * fmt.WORD_BITS
    if k != w.k and w.rotation is not None:
        raise ValueError(
            f"w must not be rotated where shard_map cuts K, got {w.rotation}; "
            "use automatic sharding (jax.jit), or cut N"
        )
    columns = w.columns
    if columns is not None and w.planes.shape[-4] != -(-columns // fmt.TILE):
        if columns % fmt.TILE:
            raise ValueError(
                f"w must have whole tiles of {fmt.TILE} columns where shard_map cuts N of a "
                f"prepared tensor, got N = {columns}"
            )
        columns = w.planes.shape[-4] * fmt.TILE
    group_size = k if w.groups == 1 else w.group_size
    return dataclasses.replace(w, k=k, group_size=group_size, columns=columns)


def _check_even(w: QuantizedTensor, axis: str, count: int) -> None:
    if axis == "K":
        size, parts = w.shape[-2], f"words of {fmt.WORD_BITS}, scale groups and rotation blocks"
        group = fmt.WORD_BITS if w.groups == 1 else w.group_size
        unit = math.lcm(group, w.rotation.block if w.rotation else 1)
    else:
        size, parts = w.shape[-1], f"tiles of {fmt.TILE} columns of a prepared tensor"
        unit = fmt.TILE if w.prepared else 1
    if count > 1 and size % (unit * count):
        even = -(-size // (unit * count)) * unit * count
        raise ValueError(
            f"{axis} = {size} can't be cut in {count} parts: each must be a multiple of {unit}"
            + (f" (whole {parts})" if unit > 1 else "")
            + f"; pad {axis} to {even}"
        )
