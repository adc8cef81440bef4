"""A checkpoint's tensors in one safetensors file, or in several with an index.

The convention for several is Hugging Face's: beside ``model.safetensors.index.json`` lie
``model-00001-of-00002.safetensors`` and so on. An index and its files carry the same random id, so
that files of two saves are never taken for one checkpoint.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .safetensors import (
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
    it was one file or several.
    """
    index = path.with_name(path.name + INDEX)
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        replace_files({path: file_writer(tensors, metadata)})
        index.unlink(missing_ok=True)
        return
    save_id = {SAVE_ID: uuid.uuid4().hex}
    names = [f"{path.stem}-{i + 1:05}-of-{len(shards):05}{path.suffix}" for i in range(len(shards))]
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

    def write_index(file: BinaryIO) -> None:
        file.write(json.dumps(content, indent=2).encode())

    replace_files(writers | {index: write_index})
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
        if not _is_file_name(name):
            raise CheckpointError(
                f"{index}: tensor {tensor!r:.100} must be in a file of the same folder, "
                f"got {name!r:.100}"
            )
        files.setdefault(name, set()).add(tensor)
    return metadata, files


def _is_file_name(name: Any) -> bool:
    """Whether this can only be a file in the folder that it is looked up in."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        return False
    return len(name.encode(errors="replace")) <= MAX_NAME and name.isprintable()
