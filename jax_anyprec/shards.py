"""A checkpoint's tensors in one safetensors file, or in several with an index.

The convention for several is Hugging Face's: ``model.safetensors.index.json`` lists
``model-1f2e3d4c-00001-of-00002.safetensors`` and so on beside it. The random part is of one save,
so its files replace none of an older one, and the index alone says which save is the checkpoint.
An index and its files also carry the same id, for files that something else has moved about.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .safetensors import (
    MAX_HEADER_BYTES,
    CheckpointError,
    SafetensorsFile,
    Tensor,
    file_writer,
    parse_json,
    read_small,
    replace_files,
)

INDEX = ".index.json"
SAVE_ID = "save_id"
ID_DIGITS = 8
"""How much of the id is in the names of files."""
MAX_NAME = 255
"""Bytes of a file's name; what file systems allow."""


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    max_shard_bytes: int | None,
) -> None:
    """Write `tensors` to `path`, or beside it in files of at most `max_shard_bytes` with an index.

    A tensor larger than that has a file to itself. Replaces the checkpoint of this name, whether
    it was one file or several; the old one stays whole until the new one is.

    Raises:
      ValueError: a name of a file, or the index, is one that can't be read again.
    """
    if path.name.endswith(INDEX):
        raise ValueError(f"path must be that of the file, without {INDEX}, got {str(path)!r}")
    index = path.with_name(path.name + INDEX)
    shards = _split(tensors, max_shard_bytes)
    old = _listed_files(path, index)
    if len(shards) == 1:
        replace_files({path: file_writer(tensors, metadata)})
        index.unlink(missing_ok=True)
        _remove(old)
        return
    save_id = {SAVE_ID: uuid.uuid4().hex}
    stem = f"{path.stem}-{save_id[SAVE_ID][:ID_DIGITS]}"
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}{path.suffix}" for i in range(len(shards))]
    if not is_file_name(names[0]):
        raise ValueError(
            f"path must end with a printable name, short enough for {names[0]!r:.300} to take at "
            f"most {MAX_NAME} bytes"
        )
    content = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values()), **save_id, **metadata},
        "weight_map": {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        },
    }
    writers = {
        path.with_name(name): file_writer(shard, save_id)
        for name, shard in zip(names, shards, strict=True)
    }

    text = json.dumps(content, indent=2).encode()
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(
            f"the index takes {len(text)} bytes, at most {MAX_HEADER_BYTES} are allowed"
        )

    def write_index(file: BinaryIO) -> None:
        file.write(text)

    try:
        replace_files(writers)
        replace_files({index: write_index})
    finally:
        # Of two saves at once, and of one that fails, the index decides what stays.
        _remove((old | writers.keys()) - _listed_files(path, index))
    path.unlink(missing_ok=True)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Mapped views by name, and the metadata, of the checkpoint at `path`.

    Args:
      path: of its file, of its index, or where its file would lie if it were one.
    """
    path = Path(path)
    index = path if path.name.endswith(INDEX) else path.with_name(path.name + INDEX)
    if index == path or (index.is_file() and not path.exists()):
        return _read_shards(index)
    file = SafetensorsFile(path)
    return file.tensors, dict(file.metadata)


def _split(tensors: Mapping[str, Tensor], limit: int | None) -> list[dict[str, Tensor]]:
    """`tensors` in order, cut where a file would grow past `limit` bytes of data."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if limit is not None and shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _listed_files(path: Path, index: Path) -> set[Path]:
    """Files that an index lists and a save to `path` has written; none if it is broken.

    Files that lack the id in their names come from elsewhere.
    """
    ours = rf"{re.escape(path.stem)}-[0-9a-f]{{{ID_DIGITS}}}-\d{{5,}}-of-\d{{5,}}"
    try:
        _, files = _parts(parse_json(read_small(index), str(index)), index)
    except (FileNotFoundError, CheckpointError):
        return set()
    pattern = re.compile(ours + re.escape(path.suffix))
    return {path.with_name(name) for name in files if pattern.fullmatch(name)}


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _read_shards(index: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    metadata, files = _parts(parse_json(read_small(index), str(index)), index)
    tensors: dict[str, np.ndarray] = {}
    for name, expected in files.items():
        shard = SafetensorsFile(index.with_name(name))
        if shard.metadata.get(SAVE_ID) != metadata.get(SAVE_ID):
            raise CheckpointError(f"{shard.path} belongs to another save than {index.name}")
        if unlike := sorted(expected ^ shard.tensors.keys()):
            where = index.name if unlike[0] in expected else name
            raise CheckpointError(
                f"{shard.path} and {index.name} must list the same tensors, {unlike[0]!r:.100} is "
                f"only in {where}"
            )
        tensors |= shard.tensors
    return tensors, metadata


def _parts(content: Any, index: Path) -> tuple[dict[str, Any], dict[str, set[str]]]:
    """Metadata and the tensors of each file, from an index whose types and names are checked."""
    parts = content if isinstance(content, dict) else {}
    metadata, weight_map = parts.get("metadata", {}), parts.get("weight_map")
    if not isinstance(metadata, dict) or not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} must be an object with the objects metadata and weight_map")
    files: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not is_file_name(name):
            raise CheckpointError(
                f"{index}: tensor {tensor!r:.100} must be in a file of the same folder, "
                f"got {name!r:.100}"
            )
        files.setdefault(name, set()).add(tensor)
    return metadata, files


def is_file_name(name: Any) -> bool:
    """Whether this can only be a file in the folder that it is looked up in."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        return False
    return len(name.encode(errors="replace")) <= MAX_NAME and name.isprintable()
