"""`load_packed`: models from GPTQ, AWQ and compressed-tensors folders, packed as they are there."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

import jax_anyprec as ap
from jax_anyprec import gptq
from jax_anyprec.quantization import Quantization

from .architectures import check_mesh, choose_weights, read_config
from .columns import take_columns
from .dense import default_dtype
from .huggingface import Folder, HuggingFaceError
from .loading import LoadedModel, Progress, Weight, fill
from .tokenizer_huggingface import load_tokenizer


def load_packed(
    path: str | os.PathLike[str],
    *,
    quantization: Quantization | None = Quantization(),  # noqa: B008 (frozen)
    dtype: Any = None,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
) -> LoadedModel:
    """Load a folder whose linear layers are packed, one tensor at a time.

    Only linear layers that are stored ``[out, in]`` may be packed: those of all architectures but
    GPT-2, without BERT's pooler.

    Args:
      path: of a folder as for `load_huggingface`, whose config.json has a quantization_config (or
        with quantize_config.json or quant_config.json) that `jax_anyprec.gptq.Scheme` takes.
      quantization: with ``weights=None`` (the default) linear layers stay packed as they are,
        exactly; what is float there, embeddings and norms and often the head, stays float. With
        ``weights=w`` linear layers are quantized anew. None for a float model.
      dtype, progress, mesh: as for `load_huggingface`.

    Returns:
      A `LoadedModel`.

    Raises:
      FileNotFoundError: there is no such folder.
      CheckpointError: the folder is broken, or packs what is not supported; a `HuggingFaceError`
        where that is no matter of its packed layers' own tensors.
      ValueError: `mesh` is given for a model without partition rules.
    """
    folder = PackedFolder(path)
    architecture, config = read_config(folder)
    check_mesh(architecture, mesh)
    tokenizer = load_tokenizer(folder)
    weights = choose_weights(folder, architecture, config)
    _check_packed(folder, weights)
    dtype = default_dtype() if dtype is None else dtype
    model = nnx.eval_shape(lambda: architecture.model(config, dtype=dtype, rngs=nnx.Rngs(0)))
    checkpoint = InOrderOfModel(folder, weights)
    fill(
        model,
        weights,
        checkpoint,
        quantization=quantization,
        dtype=dtype,
        progress=progress,
        mesh=mesh,
    )
    return LoadedModel(model, config, quantization, folder.name, tokenizer)


def _check_packed(folder: PackedFolder, weights: Mapping[str, Weight]) -> None:
    """HuggingFaceError unless all that is packed are linear layers with rows of outputs."""
    for name, weight in weights.items():
        linear = weight.path.endswith(".kernel") and weight.transposed
        if name in folder.packed_bytes and not linear:
            raise HuggingFaceError(
                f"{folder.name} has {name!r} packed; only linear layers stored [out, in] may be, "
                f"and this one fills {weight.path}"
            )


class PackedFolder(Folder):
    """A folder in which the tensors of each packed layer count as one: its float weight.

    Attributes:
      scheme: of its packed layers.
      packed_bytes: of each packed layer in the file, by the name of its weight.
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        self._arrays, self.scheme = gptq.open_folder(path)
        self.packed_bytes: dict[str, int] = {}
        for layer in gptq.linear_names(self._arrays):
            k, n = gptq.linear_shape(self._arrays, layer, self.scheme)
            parts = [f"{layer}.{part}" for part in gptq.LINEAR_PARTS]
            parts = [part for part in parts if part in self._arrays]
            infos = [self.tensors.pop(part) for part in parts]
            name = f"{layer}.weight"
            if name in self.tensors:
                raise self._error(f"has {layer!r} packed and in floats")
            self.packed_bytes[name] = sum(self._arrays[part].nbytes for part in parts)
            # In float32, which is exact, if it is asked for in floats.
            self.tensors[name] = dataclasses.replace(infos[0], shape=(n, k), type="F32")

    def nbytes(self, name: str) -> int:
        return self.packed_bytes.get(name) or super().nbytes(name)

    def packed(self, name: str) -> ap.QuantizedTensor | None:
        if name not in self.packed_bytes:
            return None
        return gptq.read_linear(self._arrays, name.removesuffix(".weight"), self.scheme)

    def floats(self, name: str) -> np.ndarray:
        packed = self.packed(name)
        return super().floats(name) if packed is None else np.asarray(packed.dequantize()).T


@dataclasses.dataclass(frozen=True)
class InOrderOfModel:
    """A packed folder as a `Checkpoint` whose packed columns are in the order that a model wants.

    Args:
      folder: the folder.
      weights: of the model.
    """

    folder: PackedFolder
    weights: Mapping[str, Weight]

    def nbytes(self, name: str) -> int:
        return self.folder.nbytes(name)

    def floats(self, name: str) -> np.ndarray:
        return self.folder.floats(name)

    def packed(self, name: str) -> ap.QuantizedTensor | None:
        packed = self.folder.packed(name)
        if packed is None:
            return None
        # What the weight map makes of the numbers of rows is where it puts them.
        order = self.weights[name].convert(np.arange(packed.shape[-1])[:, None])
        return take_columns(packed, order[0])
