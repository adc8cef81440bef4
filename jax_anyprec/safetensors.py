"""Safetensors files: written in one step and aligned, read through a memory map.

The `safetensors` library checks the structure of a file (sizes, overlaps, gaps, types, overflow)
before any tensor is looked at. What it doesn't offer is here: tensors on boundaries of 64 bytes, so
that a CPU uses them where they lie in the file; writing one tensor at a time, in place of the old
file only when all is on disk; refusing names that appear twice; and seeing one file only where a
path is replaced meanwhile.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

ALIGNMENT = 64
"""What XLA asks of memory that it uses in place; data begins at a multiple of it in the file."""

MAX_HEADER_BYTES = 16 * 2**20
"""Longest list of tensors, and longest index of several files: room for 100,000 tensors."""

MAX_AXES = 16
MAX_EMPTY_ELEMENTS = 2**31 - 1
"""Product of the other sizes where one is 0; such a tensor takes no bytes that would bound it."""

DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": "?",
        "U8": "<u1",
        "I8": "<i1",
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "U16": "<u2",
        "I16": "<i2",
        "F16": "<f2",
        "BF16": ml_dtypes.bfloat16,
        "U32": "<u4",
        "I32": "<i4",
        "F32": "<f4",
        "U64": "<u8",
        "I64": "<i8",
        "F64": "<f8",
        "C64": "<c8",
    }.items()
}
"""Element types by their name in a file."""

_ATTEMPTS = 10
"""To open a file that saves replace meanwhile."""

_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A file that is no checkpoint, or corrupt, or holds something else than was asked for."""


class Tensor(NamedTuple):
    """A tensor to be written.

    Args:
      shape, dtype: what `read` will give.
      read: called once, when its turn comes; the result is dropped when it is written.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A safetensors file with its structure checked, memory-mapped and not yet read.

    Args:
      path: of the file.

    Attributes:
      metadata: the file's strings by name.
      tensors: read-only views ``array[...]`` of the map by name, in the file's order.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointError: it is not a safetensors file, or corrupt, or has a type not known here.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        data = self._mapped()
        header = _header(data, self.path)
        entries = parse_json(header, f"{self.path}: the header")
        self.metadata: dict[str, str] = entries.pop(_METADATA, None) or {}
        start = _LENGTH.size + len(header)
        self.tensors = {
            name: self._view(data[start:], name, entry)
            for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
        }

    def _mapped(self) -> np.ndarray:
        """The file's bytes, whose structure is checked.

        The library opens the path once more, and must have seen the file that is mapped: header
        and data of two saves can fit together and mean something else.
        """
        for _ in range(_ATTEMPTS):
            _file_size(self.path)
            with self.path.open("rb") as file:
                opened = _identity(os.fstat(file.fileno()))
                data = np.memmap(file, np.uint8, "r").view(np.ndarray)
            _header(data, self.path)
            self._check_structure()
            if _identity(self.path.stat()) == opened:
                return data
        raise CheckpointError(f"{self.path} was replaced or changed while it was opened")

    def _check_structure(self) -> None:
        try:
            with safe_open(self.path, framework="numpy"):
                pass
        except SafetensorError as error:
            raise CheckpointError(f"{self.path} is not a sound safetensors file: {error}") from None

    def _view(self, data: np.ndarray, name: str, entry: dict[str, Any]) -> np.ndarray:
        where = f"{self.path}: tensor {name!r:.100}"
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"{where} has dtype {entry['dtype']}, which must be one of {', '.join(DTYPES)}"
            )
        if problem := _problem_of_shape(shape):
            raise CheckpointError(f"{where} {problem}")
        return data[begin:end].view(dtype).reshape(shape)


def parse_json(text: bytes | str, what: str) -> Any:
    """The JSON value of `text` from outside; CheckpointError if it is none or has a name twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise CheckpointError(f"{what} has the name {twice!r:.100} twice")
        return values

    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{what} has {len(text)} bytes, at most {MAX_HEADER_BYTES} are allowed"
        )
    try:
        return json.loads(text, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not JSON: {error}") from None


def file_writer(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Callable[[BinaryIO], None]:
    """A function that writes a safetensors file, for `replace_files`.

    Tensors whose bytes are a multiple of ALIGNMENT come first, so all of them begin at one without
    gaps, which the format forbids; the others follow, wider elements first.

    Raises:
      TypeError: a name is no string, or the format has no such dtype.
      ValueError: the format has no such name, a shape is not one that can be read again, or the
        names take more than MAX_HEADER_BYTES.
    """
    for name, tensor in tensors.items():
        _check_name(name)
        if problem := _problem_of_shape(tensor.shape):
            raise ValueError(f"{name!r:.100} {problem}")
    order = sorted(
        tensors, key=lambda name: (tensors[name].nbytes % ALIGNMENT != 0, -_itemsize(tensors[name]))
    )
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        dtype = tensors[name].dtype.newbyteorder("<")
        if dtype not in _NAMES:
            raise TypeError(
                f"{name} has dtype {dtype.name}, safetensors files hold "
                f"{', '.join(d.name for d in _NAMES)}"
            )
        begin, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": tensors[name].shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH.size + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(
            f"the list of tensors takes {len(text)} bytes, at most {MAX_HEADER_BYTES} are allowed"
        )

    def write(file: BinaryIO) -> None:
        file.write(_LENGTH.pack(len(text)) + text)
        for name in order:
            _write_array(file, name, tensors[name])

    return write


def replace_files(writers: Mapping[Path, Callable[[BinaryIO], None]]) -> None:
    """Write files beside their places, and put them there when all of them are on disk.

    What lies at a path stays as it was until then, and who has it open or mapped keeps it. Files
    take their places one after another in the order given; who is interrupted just then leaves
    some new and some old.
    """
    staged = {path: path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp") for path in writers}
    try:
        for path, temporary in staged.items():
            with temporary.open("xb") as file:
                writers[path](file)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in staged.items():
            temporary.replace(path)
        for directory in {path.parent for path in staged}:
            _sync_directory(directory)
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def read_small(path: Path) -> bytes:
    """The bytes of a file of at most MAX_HEADER_BYTES."""
    size = _file_size(path)
    if size > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} has {size} bytes, at most {MAX_HEADER_BYTES} are allowed for an index"
        )
    return path.read_bytes()


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"names of tensors must be strings, got {name!r:.100}")
    if name == _METADATA:
        raise ValueError(f"no tensor can be stored as {name!r}, the format uses that name")


def _problem_of_shape(shape: Sequence[int]) -> str | None:
    """What a reader has against a shape."""
    if len(shape) > MAX_AXES:
        return f"has {len(shape)} axes, at most {MAX_AXES} are allowed"
    if 0 in shape and math.prod(max(size, 1) for size in shape) > MAX_EMPTY_ELEMENTS:
        return (
            f"is empty with shape {list(shape)}, whose other sizes multiply to more than "
            f"{MAX_EMPTY_ELEMENTS}"
        )
    return None


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """Equal where a path leads to the same file, with nothing written in between."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _file_size(path: Path) -> int:
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory; name the checkpoint's file in it")
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {str(path)!r}")
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path} is empty, not a checkpoint")
    return size


def _header(data: np.ndarray, path: Path) -> bytes:
    """The JSON text between the length and the tensors, its length checked first."""
    if data.size < _LENGTH.size:
        raise CheckpointError(f"{path} has {data.size} bytes, too few for a safetensors file")
    (length,) = _LENGTH.unpack_from(data)
    allowed = min(data.size - _LENGTH.size, MAX_HEADER_BYTES)
    if length > allowed:
        raise CheckpointError(f"{path}: the header has {length} bytes, {allowed} are allowed")
    return data[_LENGTH.size : _LENGTH.size + length].tobytes()


def _write_array(file: BinaryIO, name: str, tensor: Tensor) -> None:
    array = np.asarray(tensor.read())
    if (array.shape, array.dtype) != (tensor.shape, tensor.dtype):
        raise RuntimeError(
            f"{name} became {array.dtype}{list(array.shape)} while it was saved, it was "
            f"{tensor.dtype}{list(tensor.shape)}"
        )
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    file.write(little.reshape(-1).view(np.uint8).data)


def _itemsize(tensor: Tensor) -> int:
    return tensor.dtype.itemsize


def _sync_directory(directory: Path) -> None:
    """Make names in it last. Some file systems can't, and then they decide when names do."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
