"""`QuantizedTensor`: packed bit planes with their scales, a pytree with invariants."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import format as fmt
from ._compat import Tracer
from .rotation import Rotation, check_rotation

SCALE_DTYPES = ("float32", "float16", "bfloat16")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A matrix ``[..., K, N]`` in bipolar-INT bit planes; contraction runs over K.

    With code ``u`` and odd integer ``q = 2 u - (2**bits - 1)``, an element of group ``g`` is
    ``scales[n, g] * q``, or with offsets ``2 * scales[n, g] * u + offsets[n, g]`` (the offset is
    the value of code 0, as the minimum in GGUF files, so those import without rounding).
    Leading axes stand for stacked layers or experts; map over them with `jax.vmap` or scan.

    Args:
      planes: ``uint32[..., bits, N, ceil(K / 32)]``, most significant plane first; padding bits 0.
        Prepared: tiles, see `format.tile_planes`, and scales and offsets `format.tile_groups`.
      scales: ``float32 | float16 | bfloat16 [..., N, groups]``, not negative.
      offsets: like `scales`, or None for a symmetric tensor.
      k: the contraction size K.
      group_size: values along K that share a scale; K itself for one scale per output channel.
      rotation: the `Rotation` that was applied to the rows along K, or None.
      columns: N of a prepared tensor, None for planes.
    """

    planes: Any
    scales: Any
    offsets: Any
    k: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})
    rotation: Rotation | None = dataclasses.field(default=None, metadata={"static": True})
    columns: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def prepared(self) -> bool:
        """Whether this is in the order that kernels read; see `prepare`."""
        return self.columns is not None

    @property
    def bits(self) -> int:
        return self.planes.shape[-2 if self.prepared else -3]

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., K, N)``, the shape of the matrix that this stands for."""
        n = self.planes.shape[-2] if self.columns is None else self.columns
        return (*self._leading, self.k, n)

    @property
    def _leading(self) -> tuple[int, ...]:
        return self.planes.shape[: -4 if self.prepared else -3]

    @property
    def groups(self) -> int:
        return group_count(self.k, self.group_size)

    @property
    def nbytes(self) -> int:
        """Bytes of planes, scales and offsets together."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def prepare(self) -> QuantizedTensor:
        """The same tensor in the order that kernels read: products of it need no repacking.

        Takes as many bytes (more only where N is not a multiple of 32). `restore` undoes it.
        """
        if self.prepared:
            return self
        return self._laid_out(fmt.tile_planes, fmt.tile_groups, self.shape[-1])

    def restore(self) -> QuantizedTensor:
        """The same tensor in planes, as `quantize` gives it and checkpoints keep it."""
        n = self.columns
        if n is None:
            return self
        return self._laid_out(
            lambda x: fmt.untile_planes(x, n), lambda x: fmt.untile_groups(x, n), None
        )

    def _laid_out(
        self, planes: Callable[[Any], Any], groups: Callable[[Any], Any], columns: int | None
    ) -> QuantizedTensor:
        return dataclasses.replace(
            self,
            planes=planes(self.planes),
            scales=groups(self.scales),
            offsets=None if self.offsets is None else groups(self.offsets),
            columns=columns,
        )

    def truncate(self, bits: int) -> QuantizedTensor:
        """The same tensor at fewer bits: its first `bits` planes. Of a prepared tensor, prepared.

        Scales grow by the power of two that was dropped, and an offset moves by half of what the
        dropped planes could hold, so that each value rounds to the middle of its cell.
        """
        bits = fmt.check_bits(bits)
        dropped = self.bits - bits
        if dropped < 0:
            raise ValueError(f"bits must be at most the tensor's {self.bits}, got {bits}")
        if dropped == 0:
            return self
        if self.prepared:
            return self.restore().truncate(bits).prepare()
        scales = self.scales.astype(jnp.float32)
        offsets = self.offsets
        if offsets is not None:
            offsets = offsets.astype(jnp.float32) + scales * (2**dropped - 1)
        return dataclasses.replace(
            self,
            planes=self.planes[..., :bits, :, :],
            scales=scales * 2**dropped,
            offsets=offsets,
        )

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The matrix ``[..., K, N]`` that this tensor stands for, rotation undone."""
        check_tensor(self, "self")
        if self.prepared:
            return self.restore().dequantize(dtype)
        rows = dequantize_rows(self.planes, self.scales, self.offsets, self.k)
        if self.rotation is not None:
            rows = self.rotation.invert(rows)
        return jnp.swapaxes(rows, -1, -2).astype(dtype)

    @classmethod
    def from_codes(
        cls,
        codes: Any,
        scales: Any,
        offsets: Any = None,
        *,
        bits: int,
        rotation: Rotation | None = None,
    ) -> QuantizedTensor:
        """Pack codes with their scales and offsets; the way in for integer checkpoints.

        Weights ``d * u + m`` come in without loss as scales ``d / 2`` and offsets ``m``.

        Args:
          codes: ``uint8[..., N, K]``, output features first, each below ``2**bits`` (checked
            outside of tracing).
          scales: ``float[..., N, groups]``, half the distance between neighbouring codes.
          offsets: like `scales`, the value of code 0; None centres the grid on zero.
          bits: 1 to 8.
          rotation: the one that the rows have been multiplied by, or None.
        """
        bits = fmt.check_bits(bits)
        if getattr(codes, "dtype", None) != np.uint8 or codes.ndim < 2:
            raise TypeError(
                f"codes must be a uint8 array [..., N, K], got {getattr(codes, 'dtype', codes)}"
                f"{list(getattr(codes, 'shape', ()))}"
            )
        if not isinstance(codes, Tracer) and codes.size and codes.max() > fmt.max_level(bits):
            raise ValueError(f"codes must be below {2**bits} at {bits} bits, got {codes.max()}")
        k, groups = codes.shape[-1], scales.shape[-1]
        if groups == 0 or (k and k % groups):
            raise ValueError(f"scales have {groups} groups, which do not divide k = {k}")
        planes = fmt.pack_planes(codes, bits)
        tensor = cls(planes, scales, offsets, k, k // groups, rotation)
        check_tensor(tensor, "codes")
        return tensor


def concatenate(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Tensors of the same K side by side: ``[..., K, N1 + N2 + ...]``.

    Layers that share an input become one layer: their products, one after another, are the product
    of this.

    Args:
      tensors: at least one. All have the same leading axes, K, bits, group size, rotation and
        dtypes of scales and offsets (or no offsets), and all are prepared or none.

    Raises:
      TypeError: an element is no `QuantizedTensor`.
      ValueError: there is none, or two are unlike; the message says in what.
    """
    if not tensors:
        raise ValueError("tensors must have at least one element, got none")
    for i, w in enumerate(tensors):
        check_tensor(w, f"tensors[{i}]")
    first = tensors[0]
    for i, w in enumerate(tensors):
        for field, value in _likeness(w).items():
            if value != _likeness(first)[field]:
                raise ValueError(
                    f"tensors must be alike, but tensors[{i}] has {field} {value} and tensors[0] "
                    f"{_likeness(first)[field]}"
                )
    whole_tiles = all(w.shape[-1] % fmt.TILE == 0 for w in tensors)
    if first.prepared and not whole_tiles:
        return concatenate([w.restore() for w in tensors]).prepare()
    columns = sum(w.shape[-1] for w in tensors) if first.prepared else None
    # Tiles are the first axis of a matrix, or columns: the second of three, the first of two.
    axis = len(first._leading)
    planes, scales, offsets = zip(*((w.planes, w.scales, w.offsets) for w in tensors), strict=True)
    return dataclasses.replace(
        first,
        planes=jnp.concatenate(planes, axis if first.prepared else axis + 1),
        scales=jnp.concatenate(scales, axis),
        offsets=None if first.offsets is None else jnp.concatenate(offsets, axis),
        columns=columns,
    )


def _likeness(w: QuantizedTensor) -> dict[str, Any]:
    """What tensors that stand side by side must agree in, by names for messages."""
    return {
        "leading axes": w.shape[:-2],
        "K": w.k,
        "bits": w.bits,
        "group_size": w.group_size,
        "rotation": w.rotation,
        "prepared": w.prepared,
        "scales of dtype": w.scales.dtype.name,
        "offsets of dtype": None if w.offsets is None else w.offsets.dtype.name,
    }


def check_group_size(group_size: Any, k: int) -> int:
    """`group_size` as an int that fits `k` (None means `k`), or an error that says what does."""
    if group_size is None or k == 0:
        return k
    if isinstance(group_size, bool) or not isinstance(group_size, int | np.integer):
        raise TypeError(f"group_size must be an int or None, got {group_size!r}")
    group_size = int(group_size)
    whole_words = group_size > 0 and group_size % fmt.WORD_BITS == 0 and k % group_size == 0
    if not whole_words and group_size != k:
        fits = [g for g in range(fmt.WORD_BITS, min(k, 1024) + 1, fmt.WORD_BITS) if k % g == 0]
        raise ValueError(
            f"group_size must be a multiple of {fmt.WORD_BITS} that divides k = {k}, "
            f"or None for one group; got {group_size}; these fit: {fits or 'none'}"
        )
    return group_size


def group_count(k: int, group_size: int) -> int:
    return k // group_size if group_size else 1


def check_tensor(w: QuantizedTensor, name: str) -> None:
    """Raise TypeError or ValueError unless the fields of `w` fit together."""
    if not isinstance(w, QuantizedTensor):
        raise TypeError(f"{name} must be a QuantizedTensor (see quantize), got {type(w).__name__}")
    axes = f"tiles, words, bits, {fmt.TILE}" if w.prepared else "bits, N, words"
    if w.planes.dtype != jnp.uint32 or w.planes.ndim < (4 if w.prepared else 3):
        raise TypeError(
            f"{name}.planes must be uint32[..., {axes}], got {w.planes.dtype}{list(w.planes.shape)}"
        )
    fmt.check_bits(w.bits, f"{name}.bits")
    check_group_size(w.group_size, w.k)
    words = w.planes.shape[-3 if w.prepared else -1]
    if words != fmt.words(w.k):
        raise ValueError(
            f"{name}.planes must have {fmt.words(w.k)} words for k = {w.k}, got {words}"
        )
    leading, (_, n) = w.shape[:-2], w.shape[-2:]
    tiles = -(-n // fmt.TILE)
    if w.prepared and w.planes.shape[-4::3] != (tiles, fmt.TILE):
        raise ValueError(
            f"{name}.planes must have {tiles} tiles of {fmt.TILE} columns for N = {n}, "
            f"got shape {w.planes.shape}"
        )
    expected = (*leading, tiles, w.groups, fmt.TILE) if w.prepared else (*leading, n, w.groups)
    for field in ("scales", "offsets"):
        value = getattr(w, field)
        if value is None and field == "offsets":
            continue
        if value.dtype.name not in SCALE_DTYPES:
            raise TypeError(f"{name}.{field} must be one of {SCALE_DTYPES}, got {value.dtype}")
        if value.shape != expected:
            raise ValueError(f"{name}.{field} must have shape {expected}, got {value.shape}")
    check_rotation(w.rotation, w.k)


def dequantize_rows(planes: Any, scales: Any, offsets: Any, k: int) -> jax.Array:
    """Rows ``float32[..., N, k]`` of planes, scales and offsets, still rotated."""
    bits = planes.shape[-3]
    codes = fmt.unpack_planes(planes, k)
    groups = scales.shape[-1]
    grouped = codes.reshape(*codes.shape[:-1], groups, k // groups)
    scales = scales.astype(jnp.float32)[..., None]
    if offsets is None:
        rows = scales * fmt.codes_to_ints(grouped, bits).astype(jnp.float32)
    else:
        levels = (2 * grouped.astype(jnp.int32)).astype(jnp.float32)
        rows = scales * levels + offsets.astype(jnp.float32)[..., None]
    return rows.reshape(codes.shape)
