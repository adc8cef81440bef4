"""Checkpoint folders as Hugging Face lays them out: config.json and safetensors, not trusted."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

import ml_dtypes  # noqa: F401 (NumPy knows bfloat16 from here on)
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

import jax_anyprec as ap
from jax_anyprec.safetensors import CheckpointError
from jax_anyprec.shards import is_file_name

from .loading import Weight

FLOAT_TYPES = ("F32", "F16", "BF16")
"""Types, by their names in safetensors, that weights may have."""

MAX_JSON_BYTES = {
    "config.json": 2**20,
    "generation_config.json": 2**20,
    "tokenizer_config.json": 2**24,
    "model.safetensors.index.json": 2**26,
    "sentence_bert_config.json": 2**20,
    "1_Pooling/config.json": 2**20,
}
"""What is read of a folder's JSON files; far more than real ones have."""

_REQUIRED: Any = object()


class HuggingFaceError(CheckpointError):
    """A checkpoint folder is broken, or holds what is not supported."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """A JSON object whose values are checked as they are read.

    Args:
      values: by key.
      where: it comes from, for errors.
    """

    values: Mapping[str, Any]
    where: str

    def get(self, key: str, kind: type | UnionType, default: Any = _REQUIRED) -> Any:
        """The value at `key`, of type `kind`; `default` if there is no such key.

        An int passes as a float, and null as None where `kind` allows it.
        """
        if key not in self.values:
            if default is _REQUIRED:
                raise HuggingFaceError(f"{self.where} lacks {key!r}")
            return default
        value = self.values[key]
        if type(value) is int and isinstance(0.0, kind):
            value = _to_float(value)
        bool_as_int = isinstance(value, bool) and isinstance(0, kind)
        if not isinstance(value, kind) or bool_as_int:
            found = "null" if value is None else type(value).__name__
            name = kind.__name__ if isinstance(kind, type) else kind
            raise HuggingFaceError(f"{self.where}: {key!r} must be {name}, got {found}")
        if isinstance(value, float) and not math.isfinite(value):
            raise HuggingFaceError(f"{self.where}: {key!r} must be finite, got {value}")
        return value

    def section(self, key: str) -> Settings | None:
        """The object at `key`, or None if it is missing or null."""
        values = self.get(key, dict | None, None)
        return None if values is None else Settings(values, f"{self.where}: {key!r}")

    def require(self, key: str, allowed: Any, default: Any) -> None:
        """HuggingFaceError unless the value at `key` is `allowed`, the only one supported."""
        value = self.values.get(key, default)
        if value != allowed:
            raise HuggingFaceError(
                f"{self.where}: {key!r} must be {allowed!r}, got {value!r}, which is not supported"
            )


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor of a folder.

    Args:
      shape: as in the file.
      type: name of its dtype in safetensors, "F32" say.
      file: name of the file that holds it.
    """

    shape: tuple[int, ...]
    type: str
    file: str

    @property
    def nbytes(self) -> int:
        """Bytes in the file: the number in a type's name is of bits; BOOL has none, for 8."""
        bits = re.search(r"\d+", self.type)
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a folder holds, for people and for ``--json``.

    Args:
      metadata: config.json.
      tensors: name, type, shape and bytes of all tensors, in the files' order.
      tensors_by_type: number of tensors of each type.
      bytes_by_type: bytes of each type.
      nbytes: bytes of all tensors.
    """

    metadata: dict[str, Any]
    tensors: tuple[dict[str, Any], ...]
    tensors_by_type: dict[str, int]
    bytes_by_type: dict[str, int]
    nbytes: int


class Folder:
    """A folder with config.json, and model.safetensors or its shards with their index.

    Everything is checked, and no weight read, when it is opened. Files are mapped to memory; a
    `Checkpoint` for `jax_anyprec.models.loading.fill`.

    Args:
      path: of the folder.

    Attributes:
      path: of the folder.
      name: the folder's.
      config: what config.json says.
      tensors: `TensorInfo` by name.

    Raises:
      FileNotFoundError: there is no such folder.
      HuggingFaceError: the folder lacks a file, or one is broken.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"there is no folder {self.path}")
        self.name = self.path.resolve().name
        self.config = self._settings("config.json")
        index = None
        if (self.path / "model.safetensors").is_file():
            files = {"model.safetensors"}
        else:
            index = self._index()
            files = set(index.values())
        self._files = {file: self._open(file) for file in sorted(files)}
        self.tensors: dict[str, TensorInfo] = {}
        for file, opened in self._files.items():
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                if name in self.tensors:
                    raise self._error(f"has {name!r} in {self.tensors[name].file} and in {file}")
                part = opened.get_slice(name)
                shape, kind = tuple(part.get_shape()), str(part.get_dtype())
                self.tensors[name] = TensorInfo(shape, kind, file)
        if index is not None:
            self._check_index(index)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, by name."""
        return {name: info.shape for name, info in self.tensors.items()}

    def num_layers(self, key: str) -> int:
        """The number of layers that config.json gives at `key`, at most one for each tensor."""
        layers = self.config.get(key, int)
        if not 0 < layers <= len(self.tensors):
            raise HuggingFaceError(
                f"{self.config.where}: {key!r} must be in 1..{len(self.tensors)}, the number of "
                f"tensors, got {layers}"
            )
        return layers

    def optional(self, name: str) -> Settings:
        """A JSON file of `MAX_JSON_BYTES`; empty if there is none."""
        exists = (self.path / name).exists()
        return self._settings(name) if exists else Settings({}, f"{self.name}/{name}")

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as it is in its file: ``float32``, ``float16`` or ``bfloat16``."""
        info = self._info(name)
        if info.type not in FLOAT_TYPES:
            raise self._error(f"has {name!r} in {info.type}, only {', '.join(FLOAT_TYPES)} will do")
        return self._files[info.file].get_tensor(name)

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in its file."""
        return self._info(name).nbytes

    def floats(self, name: str) -> np.ndarray:
        """`tensor`."""
        return self.tensor(name)

    def packed(self, name: str) -> ap.QuantizedTensor | None:
        """None: these checkpoints hold floats."""
        return None

    def summary(self) -> Summary:
        """What the folder holds."""
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for info in self.tensors.values():
            counts[info.type] += 1
            sizes[info.type] += info.nbytes
        tensors = tuple(
            {"name": name, **dataclasses.asdict(info), "nbytes": info.nbytes}
            for name, info in self.tensors.items()
        )
        return Summary(
            dict(self.config.values), tensors, dict(counts), dict(sizes), sum(sizes.values())
        )

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of a file, or HuggingFaceError if there is none or it has more than `limit`."""
        try:
            with open(self.path / name, "rb") as file:
                data = file.read(limit + 1)
        except FileNotFoundError:
            raise self._error(f"lacks {name}") from None
        if len(data) > limit:
            raise self._error(f"has {name} of more than {limit} bytes")
        return data

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise self._error(f"lacks tensor {name!r}")
        return self.tensors[name]

    def _settings(self, name: str) -> Settings:
        try:
            values = json.loads(self.read(name, MAX_JSON_BYTES[name]))
        except HuggingFaceError:
            raise
        except (ValueError, RecursionError) as error:
            raise self._error(f"has broken JSON in {name}: {error}") from None
        if not isinstance(values, dict):
            raise self._error(f"has no JSON object in {name}")
        return Settings(values, f"{self.name}/{name}")

    def _index(self) -> dict[str, str]:
        """Tensor name -> name of its file."""
        if not (self.path / "model.safetensors.index.json").exists():
            raise self._error("lacks model.safetensors, and model.safetensors.index.json too")
        index = self._settings("model.safetensors.index.json").get("weight_map", dict)
        for name, file in index.items():
            if not is_file_name(file) or not file.endswith(".safetensors"):
                raise self._error(
                    f"has an index that puts {name!r} in {file!r}; only the name of a "
                    ".safetensors file in this folder will do"
                )
        return index

    def _check_index(self, index: Mapping[str, str]) -> None:
        found = {name: info.file for name, info in self.tensors.items()}
        for name in sorted(index.keys() | found.keys()):
            if index.get(name) != found.get(name):
                raise self._error(
                    f"has an index that puts {name!r} in {index.get(name)}, but it is in "
                    f"{found.get(name)}"
                )

    def _open(self, name: str) -> Any:
        path = self.path / name
        if not path.is_file():
            raise self._error(f"lacks {name}")
        try:
            return safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise self._error(f"has a broken {name}: {error}") from None

    def _error(self, problem: str) -> HuggingFaceError:
        return HuggingFaceError(f"{self.name} {problem}")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How folders of one kind become a model.

    Args:
      config: the model's configuration, from an opened folder; HuggingFaceError for what is not
        supported, with the key of config.json.
      model: ``model(config, dtype=, rngs=)``, a module with float layers.
      weights: tensor name -> `Weight` for all tensors of a model of that configuration.
      ignored: patterns (`fnmatch`) of tensors that may be there too, and are not needed.
      prefix: that all names of a file may lack, where it has the model without its head.
    """

    config: Callable[[Folder], Any]
    model: Callable[..., nnx.Module]
    weights: Callable[[Any], Mapping[str, Weight]]
    ignored: tuple[str, ...] = ()
    prefix: str = ""


def _to_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
