"""The bipolar-INT format: codes, odd integers and bit planes, in NumPy and JAX alike.

A `bits`-bit code ``u`` in ``0..2**bits - 1`` stands for the odd integer
``q = 2 u - (2**bits - 1)``: bit ``i`` of the code contributes ``+2**i`` or ``-2**i``
(arXiv 2409.17870, section 3). This module is the layout contract; ``csrc/format.h`` is its
C++ side and ``tests/test_format.py`` holds the two together. Every function takes a NumPy or
a JAX array and answers with the same kind. The mathematics is derived in ``docs/format.md``.
"""

from __future__ import annotations

import operator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import Tracer

WORD_BITS = 32
"""Bits in one word of a plane; bit ``k % 32`` of word ``k // 32`` belongs to index ``k``."""

MAX_BITS = 8

TILE = 32
"""Columns of one tile of a prepared tensor: two of the widest vectors, read as one stream."""

MIN_SCALE, MAX_SCALE = 2.0**-100, 2.0**100
"""Range of usable scales: inside it no step of `encode` meets a float32 overflow or subnormal."""

ZERO_LEVEL = 2.0**-24
"""Levels ``x / (2 s)`` of a smaller magnitude count as 0, whether subnormals are flushed or not."""


ZERO_BITS = 4
"""Activations of so many bits and more are on even integers, which have a zero."""


def namespace(x: Any) -> ModuleType:
    """`numpy` for NumPy arrays and scalars, else `jax.numpy`."""
    return np if isinstance(x, np.ndarray | np.generic) else jnp


def check_bits(bits: Any, name: str = "bits") -> int:
    """`bits` as a Python int in 1..8, or a TypeError or ValueError that names the argument."""
    if isinstance(bits, Tracer):
        raise TypeError(
            f"{name} must be a Python int from 1 to {MAX_BITS} known at trace time, "
            f"got a traced value {bits}; make it a static argument (jax.jit static_argnames)"
        )
    if isinstance(bits, bool | np.bool_):
        raise TypeError(f"{name} must be an int from 1 to {MAX_BITS}, got {bits!r}")
    try:
        value = operator.index(bits)
    except TypeError:
        raise TypeError(f"{name} must be an int from 1 to {MAX_BITS}, got {bits!r}") from None
    if not 1 <= value <= MAX_BITS:
        raise ValueError(f"{name} must be from 1 to {MAX_BITS}, got {value}")
    return value


def max_level(bits: int) -> int:
    """Largest odd integer of the format, ``2**bits - 1``; also the largest code."""
    return (1 << bits) - 1


def words(k: int) -> int:
    """Number of 32-bit words in a plane row of `k` bits."""
    return -(-k // WORD_BITS)


def codes_to_ints(codes: Any, bits: int) -> Any:
    """Codes ``uint8[...]`` to the odd integers ``2 u - (2**bits - 1)``, ``int32[...]``."""
    return 2 * codes.astype(np.int32) - max_level(bits)


def act_centre(bits: int) -> int:
    """What codes ``u`` of activations stand for is ``2 u - act_centre(bits)``.

    Below ZERO_BITS that is the odd integers of the bipolar format. From there on it is the even
    ones, -2**bits and up: the grid moves by one, so that values much smaller than the largest
    become 0 and not plus or minus one scale, at the price of one level in 2**bits.
    """
    return max_level(bits) if bits < ZERO_BITS else 1 << bits


def act_max_level(bits: int) -> int:
    """Largest magnitude that activations are scaled to; the grid is used symmetrically."""
    return max_level(bits) if bits < ZERO_BITS else (1 << bits) - 2


def act_codes_to_ints(codes: Any, bits: int) -> Any:
    """Codes ``uint8[...]`` of activations to their integers, ``int32[...]``."""
    return 2 * codes.astype(np.int32) - act_centre(bits)


def encode(x: Any, scales: Any, bits: int) -> Any:
    """Nearest codes of ``x ~ scales * q``; ``uint8`` of the broadcast shape.

    ``u = clip(floor(x * (0.5 / s)) + 2**(bits - 1), 0, 2**bits - 1)`` in float32, where a level
    ``|x * (0.5 / s)| < 2**-24`` counts as 0. A value midway between two levels goes to the larger
    code. With a scale outside of MIN_SCALE..MAX_SCALE (0 or NaN, say) finite values get code
    ``2**(bits - 1)``; NaN gets code 0. One product feeds the floor, so no compiler can contract
    the rounding, and all implementations agree bit for bit.
    """
    xp = namespace(x)
    level = _levels(x, scales)
    level = xp.where(xp.abs(level) < np.float32(ZERO_LEVEL), np.float32(0), xp.floor(level))
    return _clip_to_codes(level, -(1 << (bits - 1)), bits)


def act_encode(x: Any, scales: Any, bits: int) -> Any:
    """Nearest codes of activations ``x ~ scales * (2 u - act_centre)``, as `encode` gives them.

    From ZERO_BITS on ``u = clip(rint(x * (0.5 / s)) + 2**(bits - 1), 1, 2**bits - 1)``, ties to
    even; NaN gets code 1. Again one product feeds the rounding.
    """
    if bits < ZERO_BITS:
        return encode(x, scales, bits)
    level = namespace(x).rint(_levels(x, scales))
    return _clip_to_codes(level, 1 - (1 << (bits - 1)), bits)


def _levels(x: Any, scales: Any) -> Any:
    """``x * (0.5 / scales)``, and 0 where a scale is not usable; float32."""
    xp = namespace(x)
    half, one = np.float32(0.5), np.float32(1)
    usable = (scales >= np.float32(MIN_SCALE)) & (scales <= np.float32(MAX_SCALE))
    inverse = xp.where(usable, half / xp.where(usable, scales, one), np.float32(0))
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(np.float32) * inverse


def _clip_to_codes(level: Any, lowest: int, bits: int) -> Any:
    """Whole levels to codes, clipped to `lowest` and the largest; NaN becomes the lowest."""
    xp = namespace(level)
    low, high = np.float32(lowest), np.float32((1 << (bits - 1)) - 1)
    level = xp.where(level >= low, level, low)  # also where level is NaN
    level = xp.where(level <= high, level, high)
    return (level.astype(np.int32) + (1 << (bits - 1))).astype(np.uint8)


def pack_planes(codes: Any, bits: int) -> Any:
    """Codes ``uint8[..., N, K]`` to planes ``uint32[..., bits, N, ceil(K / 32)]``.

    Plane 0 holds the most significant bit, so the first p planes are the p-bit tensor.
    Padding bits are 0.
    """
    xp = namespace(codes)
    pad = words(codes.shape[-1]) * WORD_BITS - codes.shape[-1]
    codes = xp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, pad)])
    planes = ((codes >> np.uint8(bits - 1 - i)) & np.uint8(1) for i in range(bits))
    if isinstance(codes, np.ndarray):  # one plane of bytes at a time, they are large
        packed = [np.packbits(plane, axis=-1, bitorder="little") for plane in planes]
        return _bytes_to_words(np.stack(packed, axis=-3))
    bytewise = jnp.stack(list(planes), axis=-3)
    octets = bytewise.reshape(*bytewise.shape[:-1], bytewise.shape[-1] // 8, 8)
    return _bytes_to_words((octets << np.arange(8, dtype=np.uint8)).sum(-1, dtype=np.uint8))


def unpack_planes(planes: Any, k: int) -> Any:
    """Planes ``uint32[..., bits, N, ceil(k / 32)]`` to codes ``uint8[..., N, k]``."""
    bits = planes.shape[-3]
    octets = (_words_to_bytes(planes)[..., None] >> np.arange(8, dtype=np.uint8)) & np.uint8(1)
    unpacked = octets.reshape(*planes.shape[:-1], planes.shape[-1] * WORD_BITS)[..., :k]
    weights = np.left_shift(1, np.arange(bits - 1, -1, -1)).astype(np.uint8)
    return (unpacked * weights[:, None, None]).sum(-3, dtype=np.uint8)


def tile_planes(planes: Any) -> Any:
    """Planes ``uint32[..., bits, N, words]`` to tiles ``uint32[..., ceil(N / TILE), words, bits,
    TILE]``, in which each column's words of one stretch of 32 indices lie together as fields.

    A tensor of `bits` bits is split as 4 + 2 + 1 (or 8), the low bits first. A part of c bits has c
    words; the code of index ``8 b + q`` has its c bits in word ``q % c``, from bit
    ``8 b + c (q // c)`` up. So a shift and a mask bring four codes, indices q, q + 8, q + 16 and
    q + 24, into the four bytes of a lane. Columns past N are 0.
    """
    xp = namespace(planes)
    pad = -planes.shape[-2] % TILE
    planes = xp.pad(planes, [(0, 0)] * (planes.ndim - 2) + [(0, pad), (0, 0)])
    words_by_bit = [planes[..., j, :, :] for j in reversed(range(planes.shape[-3]))]
    fields = xp.stack(_swap_fields(words_by_bit), axis=-1)  # [..., N, words, bits]
    fields = fields.reshape(*fields.shape[:-3], fields.shape[-3] // TILE, TILE, *fields.shape[-2:])
    return xp.moveaxis(fields, -3, -1)


def untile_planes(tiles: Any, n: int) -> Any:
    """Tiles back to planes ``uint32[..., bits, n, words]``."""
    xp = namespace(tiles)
    fields = xp.moveaxis(tiles, -1, -3)
    fields = fields.reshape(*fields.shape[:-4], fields.shape[-4] * TILE, *fields.shape[-2:])
    return fields_to_planes(fields[..., :n, :, :])


def fields_to_planes(fields: Any) -> Any:
    """Columns of tiles ``uint32[..., N, words, bits]`` to planes ``[..., bits, N, words]``."""
    words_by_bit = _swap_fields([fields[..., i] for i in range(fields.shape[-1])])
    return namespace(fields).stack(words_by_bit[::-1], axis=-3)


def tile_groups(x: Any) -> Any:
    """Scales or offsets ``[..., N, groups]`` to ``[..., ceil(N / TILE), groups, TILE]``."""
    xp = namespace(x)
    pad = -x.shape[-2] % TILE
    x = xp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, pad), (0, 0)])
    x = x.reshape(*x.shape[:-2], x.shape[-2] // TILE, TILE, x.shape[-1])
    return xp.swapaxes(x, -1, -2)


def untile_groups(x: Any, n: int) -> Any:
    """The inverse of `tile_groups`."""
    x = namespace(x).swapaxes(x, -1, -2)
    return x.reshape(*x.shape[:-3], x.shape[-3] * TILE, x.shape[-1])[..., :n, :]


def _swap_fields(words_by_bit: list[Any]) -> list[Any]:
    """Words of single bits, the low one first, to words of fields, and back: it is an involution.

    Each part of c bits is a transposition of c x c bits, by log2(c) rounds of swaps.
    """
    swapped: list[Any] = []
    for size in (8, 4, 2, 1):
        if len(words_by_bit) & size:
            part = words_by_bit[len(swapped) : len(swapped) + size]
            for distance in (4, 2, 1):
                if distance < size:
                    _swap_blocks(part, distance)
            swapped += part
    return swapped


_LOW_BITS = {4: 0x0F0F0F0F, 2: 0x33333333, 1: 0x55555555}


def _swap_blocks(part: list[Any], distance: int) -> None:
    """Swap the high bits of word i with the low bits of word i + distance, blocks of `distance`."""
    low, shift = np.uint32(_LOW_BITS[distance]), np.uint32(distance)
    for i in range(len(part)):
        if not i & distance:
            a, b = part[i], part[i + distance]
            part[i] = (a & low) | ((b & low) << shift)
            part[i + distance] = ((a >> shift) & low) | (b & ~low)


def float_bits(x: Any) -> Any:
    """The bits of ``float32[...]`` as ``int32[...]``."""
    return x.view(np.int32) if isinstance(x, np.ndarray) else _bitcast(x, jnp.int32)


def largest_bits(x: Any) -> Any:
    """The bits ``int32[...]`` of the largest magnitude along the last axis of ``float32[..., K]``.

    Magnitudes are ordered as their bits are, with infinity and NaN last. A float maximum would do,
    but XLA's on the CPU loses NaN (jaxlib 0.10.2).
    """
    return (float_bits(x) & np.int32(0x7FFFFFFF)).max(-1, initial=np.int32(0))


def bits_float(x: Any) -> Any:
    """``int32[...]`` as the ``float32[...]`` with these bits."""
    return x.view(np.float32) if isinstance(x, np.ndarray) else _bitcast(x, jnp.float32)


_bitcast = jax.lax.bitcast_convert_type


# Shifts and not bitcasts: XLA has none between widths at a symbolic size (jaxlib 0.10 to 0.12), and
# on the CPU does not fuse those that it has.


def _bytes_to_words(x: Any) -> Any:
    shape = (*x.shape[:-1], x.shape[-1] // 4)
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x).view("<u4").reshape(shape)
    octets = x.reshape(*shape, 4).astype(np.uint32)
    return (octets << np.arange(0, WORD_BITS, 8, dtype=np.uint32)).sum(-1, dtype=np.uint32)


def _words_to_bytes(x: Any) -> Any:
    shape = (*x.shape[:-1], x.shape[-1] * 4)
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x).view(np.uint8).reshape(shape)
    octets = x[..., None] >> np.arange(0, WORD_BITS, 8, dtype=np.uint32)
    return octets.astype(np.uint8).reshape(shape)
