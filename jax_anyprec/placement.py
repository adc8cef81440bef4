"""From mapped views of a checkpoint to arrays on devices, each device reading its part only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from . import format as fmt
from .manifest import FIELDS, Key
from .safetensors import ALIGNMENT, CheckpointError
from .tensor import QuantizedTensor
from .trees import is_packed, leaf_name

Shardings = Callable[[str, Any], Any]
OnRead = Callable[[str, int], None]


def sharding_function(sharding: Any) -> Shardings:
    """What `load` takes as `sharding`, as a function of a leaf's name and the leaf."""
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        return lambda name, leaf: sharding
    if callable(sharding):
        return sharding
    flat, _ = jax.tree_util.tree_flatten_with_path(
        sharding, is_leaf=lambda x: x is None or is_packed(x)
    )
    by_name = {leaf_name(keys): leaf for keys, leaf in flat}

    def find(name: str, leaf: Any) -> Any:
        if name not in by_name:
            raise ValueError(f"sharding has no leaf for {name!r}, only for {sorted(by_name)[:8]}")
        return by_name[name]

    return find


@dataclasses.dataclass(frozen=True)
class Placement:
    """How leaves come from a file to devices.

    Args:
      where: begins each message.
      bits: that packed leaves have at most, or None for all.
      shardings: gives for a leaf's name and the leaf a `Sharding` or None, for a packed leaf also
        a `QuantizedTensor` of them.
      memory_map: use aligned views in place where a CPU can, and don't look at their values.
      on_read: called with each leaf's name and the bytes of the file that it took, or None.
    """

    where: str
    bits: int | None
    shardings: Shardings
    memory_map: bool
    on_read: OnRead | None

    def __call__(self, name: str, stored: Any, prepared: bool | None = None) -> Any:
        """A leaf in mapped views on its devices; `prepared` chooses a packed one's layout."""
        placed: Any
        if isinstance(stored, QuantizedTensor):
            placed, count = self._packed(name, stored, prepared)
        elif isinstance(stored, Key):
            data, count = _array(stored.data, None, self.memory_map)
            keys = jax.random.wrap_key_data(data, impl=stored.implementation)
            placed = jax.device_put(keys, _checked(self.shardings(name, keys), name))
        else:
            sharding = _checked(self.shardings(name, stored), name)
            placed, count = _array(stored, sharding, self.memory_map)
        if self.on_read is not None:
            self.on_read(name, count)
        return placed

    def _packed(
        self, name: str, stored: QuantizedTensor, prepared: bool | None
    ) -> tuple[QuantizedTensor, int]:
        chosen = _truncated(stored, self.bits)
        if not self.memory_map:
            _check_values(chosen, f"{self.where}: {name!r}")
        wanted = chosen
        if prepared is not None:
            wanted = chosen.prepare() if prepared else chosen.restore()
        sharding = self.shardings(name, wanted)
        fields: dict[str, Any] = {}
        total = 0
        for field in FIELDS:
            source = getattr(chosen if field == "planes" else stored, field)
            if source is not None:
                view, of_field = getattr(wanted, field), _of_field(sharding, field, name)
                fields[field], count = _array(view, of_field, self.memory_map)
                # What was computed from a field took all of it.
                total += count if np.may_share_memory(source, view) else source.nbytes
        return dataclasses.replace(wanted, **fields), total


def _truncated(w: QuantizedTensor, bits: int | None) -> QuantizedTensor:
    """`w` with at most so many bits; its planes stay a view."""
    with np.errstate(over="ignore", invalid="ignore"):  # scales of a file can be anything
        return w if bits is None else w.truncate(min(bits, w.bits))


def _check_values(w: QuantizedTensor, what: str) -> None:
    """CheckpointError where scales are negative or bits past K are set.

    NaN scales are allowed: that is how `quantize` shows NaN weights.
    """
    if (w.scales < 0).any():
        raise CheckpointError(f"{what} has negative scales")
    used = w.k % fmt.WORD_BITS
    if used:
        last = w.planes[..., -1:]
        if w.columns is not None:
            last = fmt.untile_planes(w.planes[..., -1:, :, :], w.columns)
        if (last >> np.uint32(used)).any():
            raise CheckpointError(f"{what} has bits set past k = {w.k}")


def _array(view: np.ndarray, sharding: Any, memory_map: bool) -> tuple[jax.Array, int]:
    """A view on its devices, and the bytes of it that were read."""
    own = (lambda part: part) if memory_map else _copy
    if sharding is None or isinstance(sharding, jax.sharding.SingleDeviceSharding):
        # Only JAX knows of a copy, and nobody writes to the map, so both can be used in place.
        return jax.device_put(own(view), sharding, may_alias=True), view.nbytes
    count = 0

    def read(index: Any) -> np.ndarray:
        nonlocal count
        part = own(view[index])
        count += part.nbytes
        return part

    return jax.make_array_from_callback(view.shape, sharding, read), count


def _copy(view: np.ndarray) -> np.ndarray:
    """A copy that XLA can use in place on a CPU, so that it makes no other."""
    memory = np.empty(view.nbytes + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    copy = memory[begin : begin + view.nbytes].view(view.dtype).reshape(view.shape)
    copy[...] = view
    return copy


def _of_field(sharding: Any, field: str, name: str) -> Any:
    if not isinstance(sharding, QuantizedTensor):
        return _checked(sharding, name)
    own = getattr(sharding, field)
    return _checked(sharding.scales if own is None else own, f"{name}.{field}")


def _checked(sharding: Any, name: str) -> jax.sharding.Sharding | None:
    """`sharding` on devices: that of an abstract module may know the shape of its mesh only."""
    if sharding is not None and not isinstance(sharding, jax.sharding.Sharding):
        raise TypeError(
            f"sharding of {name} must be a jax.sharding.Sharding or None, got {sharding!r}"
        )
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    if not isinstance(sharding.mesh, jax.sharding.AbstractMesh):
        return sharding
    mesh = jax.sharding.get_mesh()
    if mesh.abstract_mesh != sharding.mesh:
        raise ValueError(
            f"sharding of {name} is for a mesh without devices, {sharding.mesh}; load under "
            f"jax.set_mesh with such a mesh, or pass sharding"
        )
    return jax.sharding.NamedSharding(mesh, sharding.spec)
