"""GGUF checkpoints: a bounded reader of the file, and exact import of its integer weights.

A file comes from outside, so its structure is checked against its size before any memory is
taken: no count or length is believed that the file can't hold. The file is memory-mapped and one
tensor at a time is turned into a `QuantizedTensor` or floats. Needs the `gguf` package for its
tables of types, and for dequantizing types that have no exact counterpart here.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, overload

import numpy as np

from .affine import from_affine
from .tensor import QuantizedTensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32

EXACT_TYPES = ("Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q8_0")
"""Types that `GGUFFile.packed` imports without loss, all with groups of 32 values.

Q2_K, Q3_K and Q6_K have a scale for every 16 values, less than a word of a bit plane; the IQ types
and MXFP4 have no evenly spaced grid. TQ1_0 and TQ2_0 would fit, in groups of 256.
"""

BLOCK = 32
"""Values that share a scale in all of `EXACT_TYPES`."""

T = TypeVar("T")

# Metadata value types by their number in the file; 8 is a string and 9 an array.
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9

# The fewest bytes that one item of each list can take; bounds a count before it is believed.
_MIN_STRING, _MIN_ENTRY, _MIN_TENSOR = 8, 8 + 4 + 1, 8 + 4 + 8 + 4 + 8


class GGUFError(ValueError):
    """A file that is not GGUF, or is truncated, corrupt, or of a kind not supported here."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor of a file lies and what it is.

    Args:
      name: as in the file.
      shape: row-major, slowest axis first (the file has them reversed); a linear layer's is
        (out, in).
      type: ggml's name of the element type, such as "Q4_1" or "F32".
      offset: of the data, in bytes from the start of the file.
      nbytes: of the data.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a file holds, for people and for ``--json`` (through `dataclasses.asdict`).

    Args:
      version: of the GGUF format.
      metadata: single values, and for each array a text with its length.
      tensors: all tensors in the file's order.
      tensors_by_type: number of tensors of each element type.
      bytes_by_type: bytes of each element type.
      nbytes: bytes of all tensors.
    """

    version: int
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    tensors_by_type: dict[str, int]
    bytes_by_type: dict[str, int]
    nbytes: int


class GGUFFile:
    """A GGUF file, memory-mapped, with its metadata and list of tensors read and checked.

    Args:
      path: of the file.

    Attributes:
      version: of the format, 2 or 3.
      metadata: by key; scalars as Python values, strings as `str`, arrays of strings as lists,
        arrays of numbers as NumPy arrays.
      tensors: `TensorInfo` by name, in the file's order.

    Raises:
      FileNotFoundError: there is no such file.
      GGUFError: it is not a GGUF file, or truncated, or corrupt.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no GGUF file at {str(self.path)!r}")
        if self.path.stat().st_size == 0:
            raise GGUFError(f"{self.path.name} is empty, not a GGUF file")
        self._data: np.ndarray = np.memmap(self.path, np.uint8, "r")
        try:
            self.version, self.metadata, self.tensors = _parse(self._data)
        except GGUFError as error:
            raise GGUFError(f"{self.path.name}: {error}") from None

    @overload
    def get(self, key: str, kind: type[T]) -> T: ...
    @overload
    def get(self, key: str, kind: type[T], default: None) -> T | None: ...
    @overload
    def get(self, key: str, kind: type[T], default: T) -> T: ...
    def get(self, key: str, kind: type[T], default: Any = ...) -> T | None:
        """The metadata value of `key`, which must be a `kind` (`int` also serves as `float`).

        Raises GGUFError where it has another type, or is missing and there is no default.
        """
        value = self.metadata.get(key, default)
        if value is ...:
            raise GGUFError(f"{self.path.name} has no metadata key {key!r}")
        if value is default:
            return value
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise GGUFError(
                f"{self.path.name}: metadata {key!r} must be {kind.__name__}, "
                f"got {type(value).__name__}"
            )
        return value

    def packed(self, name: str) -> QuantizedTensor:
        """The tensor `name`, ``(N, K)`` of one of `EXACT_TYPES`, without loss.

        Returns a `QuantizedTensor` of shape ``(K, N)`` in NumPy arrays, with groups of 32 and
        offsets; scales, and offsets, are float16 where that is exact, else float32.
        """
        info = self.info(name)
        if info.type not in EXACT_TYPES or len(info.shape) != 2:
            raise GGUFError(
                f"{name} must be a matrix of type {', '.join(EXACT_TYPES)} to be imported "
                f"exactly, got {info.type}{list(info.shape)}"
            )
        rows, k = info.shape
        bits, values, unpack = _UNPACK[info.type]
        blocks = self._bytes(info).reshape(rows, k // values, -1)
        with np.errstate(invalid="ignore"):  # an infinite scale times 0 is reported below
            codes, step, minimum = (x.reshape(rows, -1) for x in unpack(blocks))
        if not (np.isfinite(step).all() and np.isfinite(minimum).all()):
            raise GGUFError(f"{self.path.name}: {name} has scales that are NaN or infinite")
        return from_affine(codes, step, minimum, bits=bits)

    def floats(self, name: str) -> np.ndarray:
        """The tensor `name` of any type as ``float32`` of the file's shape, a new array."""
        info = self.info(name)
        gguf = _gguf()
        data = self._bytes(info)
        if info.type == "F64":
            values = data.view("<f8").astype(np.float32)
        elif info.type in ("I8", "I16", "I32", "I64"):
            raise GGUFError(f"{name} holds integers ({info.type}), not weights")
        else:
            kind = gguf.GGMLQuantizationType[info.type]
            data = {"F32": data.view("<f4"), "F16": data.view("<f2")}.get(info.type, data)
            rows = data.reshape(*info.shape[:-1], -1)
            try:
                # Broken scales are reported below.
                with np.errstate(over="ignore", invalid="ignore"):
                    values = np.array(gguf.dequantize(rows, kind), np.float32)
            except NotImplementedError:
                raise GGUFError(
                    f"{name} has type {info.type}, which gguf can't dequantize"
                ) from None
        if not np.isfinite(values).all():
            raise GGUFError(f"{self.path.name}: {name} has values that are NaN or infinite")
        return values.reshape(info.shape)

    def info(self, name: str) -> TensorInfo:
        """The `TensorInfo` of `name`, or GGUFError."""
        if name not in self.tensors:
            raise GGUFError(f"{self.path.name} has no tensor {name!r}")
        return self.tensors[name]

    def summary(self) -> Summary:
        """What the file holds."""
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for info in self.tensors.values():
            counts[info.type] += 1
            sizes[info.type] += info.nbytes
        metadata = {
            key: f"[{len(value)} values]" if isinstance(value, list | np.ndarray) else value
            for key, value in self.metadata.items()
        }
        tensors = tuple(self.tensors.values())
        return Summary(
            self.version, metadata, tensors, dict(counts), dict(sizes), sum(sizes.values())
        )

    def _bytes(self, info: TensorInfo) -> np.ndarray:
        return np.asarray(self._data[info.offset : info.offset + info.nbytes])


class _Cursor:
    """Reads forward through the bytes of a file and never past its end."""

    def __init__(self, data: np.ndarray):
        self.data = data
        self.at = 0

    def take(self, size: int, what: str) -> np.ndarray:
        left = len(self.data) - self.at
        if size > left:
            raise GGUFError(
                f"truncated or corrupt: {what} needs {size} bytes at {self.at}, {left} are left"
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, kind: str, what: str) -> int:
        return struct.unpack(kind, self.take(struct.calcsize(kind), what))[0]

    def count(self, smallest: int, what: str) -> int:
        """A number of items, which must fit in the rest of the file at `smallest` bytes each."""
        count = self.number("<Q", what)
        left = len(self.data) - self.at
        if count * smallest > left:
            raise GGUFError(
                f"truncated or corrupt: {what} is {count}, too many for the {left} bytes left"
            )
        return count

    def string(self, what: str) -> str:
        raw = self.take(self.count(1, f"the length of {what}"), what).tobytes()
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise GGUFError(f"corrupt: {what} is not UTF-8 ({error.reason})") from None

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        return self.scalars(kind, 1, what)[0].item()

    def array(self, what: str) -> Any:
        kind = self.number("<I", f"the type of {what}")
        if kind == _STRING:
            count = self.count(_MIN_STRING, f"the length of {what}")
            return [self.string(what) for _ in range(count)]
        return self.scalars(kind, self.count(1, f"the length of {what}"), what)

    def scalars(self, kind: int, count: int, what: str) -> np.ndarray:
        if kind not in _SCALARS:
            raise GGUFError(f"corrupt or not supported: {what} has type number {kind}")
        dtype = np.dtype(_SCALARS[kind])
        raw = self.take(count * dtype.itemsize, what)
        # A byte other than 0 and 1 is no valid bool to NumPy.
        return raw != 0 if dtype == np.bool_ else np.frombuffer(raw.tobytes(), dtype)


def _parse(data: np.ndarray) -> tuple[int, dict[str, Any], dict[str, TensorInfo]]:
    """Version, metadata and tensors of the file with bytes `data`."""
    cursor = _Cursor(data)
    magic = cursor.take(min(len(MAGIC), len(data)), "the magic").tobytes()
    if magic != MAGIC:
        raise GGUFError(f"not a GGUF file: it starts with {magic!r}, not {MAGIC!r}")
    version = cursor.number("<I", "the version")
    if version not in VERSIONS:
        raise GGUFError(f"GGUF version {version} is not supported, only little-endian {VERSIONS}")
    tensor_count = cursor.count(_MIN_TENSOR, "the number of tensors")
    entry_count = cursor.count(_MIN_ENTRY, "the number of metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise GGUFError(f"corrupt: metadata key {key!r} appears twice")
        kind = cursor.number("<I", f"the type of metadata {key!r}")
        metadata[key] = cursor.value(kind, f"metadata {key!r}")
    tensors: dict[str, TensorInfo] = {}
    for _ in range(tensor_count):
        info = _tensor_info(cursor)
        if info.name in tensors:
            raise GGUFError(f"corrupt: tensor {info.name!r} appears twice")
        tensors[info.name] = info
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise GGUFError(f"corrupt: general.alignment must be a power of two, got {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    return version, metadata, _place(tensors, start, len(data))


def _tensor_info(cursor: _Cursor) -> TensorInfo:
    """The next tensor's description; its offset still counts from the data section."""
    name = cursor.string("a tensor name")
    ndim = cursor.number("<I", f"the number of dimensions of {name!r}")
    if not 1 <= ndim <= MAX_DIMS:
        raise GGUFError(f"corrupt: {name!r} has {ndim} dimensions, 1 to {MAX_DIMS} are allowed")
    shape = tuple(cursor.number("<Q", f"the shape of {name!r}") for _ in range(ndim))[::-1]
    number = cursor.number("<I", f"the type of {name!r}")
    offset = cursor.number("<Q", f"the offset of {name!r}")
    gguf = _gguf()
    try:
        kind = gguf.GGMLQuantizationType(number)
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise GGUFError(f"corrupt or not supported: {name!r} has type number {number}") from None
    if 0 in shape or shape[-1] % block_size:
        raise GGUFError(
            f"corrupt: {name!r} has shape {shape}; sizes must be positive and the last a multiple "
            f"of {block_size} for {kind.name}"
        )
    nbytes = math.prod(shape) // block_size * block_bytes
    return TensorInfo(name, shape, kind.name, offset, nbytes)


def _place(tensors: dict[str, TensorInfo], start: int, size: int) -> dict[str, TensorInfo]:
    """`tensors` with offsets from the start of the file, checked to fit in it side by side."""
    placed = {
        name: dataclasses.replace(info, offset=start + info.offset)
        for name, info in tensors.items()
    }
    end, before = start, ""
    for info in sorted(placed.values(), key=lambda info: info.offset):
        if info.offset < end:
            raise GGUFError(f"corrupt: tensors {before!r} and {info.name!r} overlap")
        end, before = info.offset + info.nbytes, info.name
        if end > size:
            raise GGUFError(
                f"truncated or corrupt: tensor {info.name!r} ends at byte {end}, "
                f"the file has {size}"
            )
    return placed


# From blocks ``uint8[N, blocks, bytes]`` to codes (N blocks of values, in any shape), the distance
# between neighbouring codes and the value of code 0, both ``float32[N, blocks]`` or, where a block
# has several groups, ``float32[N, blocks, groups]``: value = step u + minimum.
_Affine = tuple[np.ndarray, np.ndarray, np.ndarray]


def _q4_0(blocks: np.ndarray) -> _Affine:
    return _centred(_nibbles(blocks[..., 2:]), _halves(blocks, 0), 8)


def _q4_1(blocks: np.ndarray) -> _Affine:
    return _nibbles(blocks[..., 4:]), _halves(blocks, 0), _halves(blocks, 2)


def _q4_k(blocks: np.ndarray) -> _Affine:
    step, minimum = _k_scales(blocks)
    return _nibbles(_pairs(blocks[..., 16:])), step, minimum


def _q5_0(blocks: np.ndarray) -> _Affine:
    codes = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])
    return _centred(codes, _halves(blocks, 0), 16)


def _q5_1(blocks: np.ndarray) -> _Affine:
    codes = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return codes, _halves(blocks, 0), _halves(blocks, 2)


def _q5_k(blocks: np.ndarray) -> _Affine:
    step, minimum = _k_scales(blocks)
    low = _nibbles(_pairs(blocks[..., 48:]))
    # Bit g of byte i is the fifth bit of value i in group g.
    fifth = np.unpackbits(blocks[..., 16:48, None], axis=-1, bitorder="little") << np.uint8(4)
    return low | fifth.swapaxes(-1, -2).reshape(low.shape), step, minimum


def _q8_0(blocks: np.ndarray) -> _Affine:
    # A signed byte plus 128 is that byte with its top bit flipped.
    return _centred(blocks[..., 2:] ^ np.uint8(128), _halves(blocks, 0), 128)


# By type: bits of a code, values of a block, and what unpacks blocks.
_UNPACK: dict[str, tuple[int, int, Callable[[np.ndarray], _Affine]]] = {
    "Q4_0": (4, BLOCK, _q4_0),
    "Q4_1": (4, BLOCK, _q4_1),
    "Q4_K": (4, 8 * BLOCK, _q4_k),
    "Q5_0": (5, BLOCK, _q5_0),
    "Q5_1": (5, BLOCK, _q5_1),
    "Q5_K": (5, 8 * BLOCK, _q5_k),
    "Q8_0": (8, BLOCK, _q8_0),
}


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block, as float32."""
    raw = np.ascontiguousarray(blocks[..., at : at + 2])
    return raw.view("<f2")[..., 0].astype(np.float32)


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps and minima ``float32[..., 8]`` of the groups of Q4_K and Q5_K blocks.

    Each is a float16 of the block times 6 bits of the group: exact in float32. The 12 bytes of
    those bits are three times four: 6 bits of the first four groups' steps; the same for their
    minima; and the low 4 bits of the others' steps and, in the high half of the byte, minima, whose
    high 2 bits are the top of the bytes before.
    """
    steps, minima, low = (blocks[..., at : at + 4] for at in (4, 8, 12))
    six, four = np.uint8(63), np.uint8(15)
    steps = np.concatenate([steps & six, steps >> 6 << 4 | low & four], axis=-1)
    minima = np.concatenate([minima & six, minima >> 6 << 4 | low >> 4], axis=-1)
    return _halves(blocks, 0)[..., None] * steps, -_halves(blocks, 2)[..., None] * minima


def _pairs(packed: np.ndarray) -> np.ndarray:
    """``uint8[..., 128]``, the nibbles of eight groups, with each pair of groups on its own."""
    return packed.reshape(*packed.shape[:-1], 4, BLOCK)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """``uint8[..., n]`` to 2 n codes: the low halves of all bytes, then the high halves."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    """``uint8[..., 4]``, bit i for value i, to ``uint8[..., 32]`` of 0 or 16."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << np.uint8(4)


def _centred(codes: np.ndarray, step: np.ndarray, centre: int) -> _Affine:
    """``step (u - centre)``; float16 times 8 bits is exact in float32."""
    return codes, step, step * np.float32(-centre)


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise ImportError(
            "reading GGUF files needs the gguf package: pip install 'jax-anyprec[demo]'"
        ) from None
    return gguf
