"""`load_huggingface`, and the table of what it loads."""

from __future__ import annotations

import fnmatch
import os
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from jax_anyprec.quantization import Quantization

from . import bert_huggingface, gpt2_huggingface, llama_huggingface
from .dense import default_dtype
from .huggingface import FLOAT_TYPES, Architecture, Folder, HuggingFaceError
from .llama import Llama
from .loading import LoadedModel, Progress, Weight, check_tensors, fill
from .tokenizer_huggingface import load_tokenizer

ARCHITECTURES: dict[str, Architecture] = {
    **llama_huggingface.ARCHITECTURES,
    **gpt2_huggingface.ARCHITECTURES,
    **bert_huggingface.ARCHITECTURES,
}
"""By `model_type` of config.json."""


def load_huggingface(
    path: str | os.PathLike[str],
    *,
    quantization: Quantization | None = None,
    dtype: Any = None,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
) -> LoadedModel:
    """Load a float checkpoint from a folder, quantized while it is read, one tensor at a time.

    Args:
      path: of a folder with config.json and model.safetensors, or shards of it and their index;
        and tokenizer.json for text.
      quantization: of linear layers; `Quantization.weights` must be set. Embeddings and norms
        stay float. None for a float model.
      dtype: to compute in, and of float weights and cache; None for float32 on a CPU and bfloat16
        elsewhere.
      progress: called after each tensor with the bytes of it and those before, and their total.
      mesh: devices that share the model, along its axis "model"; None for one. Only for the Llama
        family: all but GPT-2 and BERT.

    Returns:
      A `LoadedModel`.

    Raises:
      FileNotFoundError: there is no such folder.
      HuggingFaceError: the folder is broken, or holds what is not supported.
      ValueError: `quantization` says nothing about weights, or `mesh` is given for a model without
        partition rules.
    """
    if quantization is not None and quantization.weights is None:
        raise ValueError(
            "Quantization.weights must be set (1 to 8) for a Hugging Face checkpoint, which holds "
            "floats; quantization=None loads them as they are, and load_packed loads folders of "
            "GPTQ, AWQ and compressed-tensors"
        )
    folder = Folder(path)
    architecture, config = read_config(folder)
    check_mesh(architecture, mesh)
    tokenizer = load_tokenizer(folder)
    weights = choose_weights(folder, architecture, config)
    dtype = default_dtype() if dtype is None else dtype
    # The abstract model has shapes and no weights; each is put in place as it is read.
    model = nnx.eval_shape(lambda: architecture.model(config, dtype=dtype, rngs=nnx.Rngs(0)))
    fill(
        model,
        weights,
        folder,
        quantization=quantization,
        dtype=dtype,
        progress=progress,
        mesh=mesh,
    )
    return LoadedModel(model, config, quantization, folder.name, tokenizer)


def read_config(folder: Folder) -> tuple[Architecture, Any]:
    """What kind of model a folder has, and its configuration."""
    kind = folder.config.get("model_type", str)
    if kind not in ARCHITECTURES:
        raise HuggingFaceError(
            f"{folder.config.where}: 'model_type' must be one of {', '.join(ARCHITECTURES)}, "
            f"got {kind!r}"
        )
    architecture = ARCHITECTURES[kind]
    try:
        return architecture, architecture.config(folder)
    except HuggingFaceError:
        raise
    except ValueError as error:
        raise HuggingFaceError(f"{folder.config.where}: {error}") from None


def check_mesh(architecture: Architecture, mesh: Mesh | None) -> None:
    """ValueError for a mesh if `partition` has no rules for the model: each would have it whole."""
    if mesh is not None and architecture.model is not Llama:
        raise ValueError(
            "mesh must be None for this model: there are partition rules for architectures of the "
            f"Llama family only, {', '.join(llama_huggingface.ARCHITECTURES)}"
        )


def choose_weights(folder: Folder, architecture: Architecture, config: Any) -> dict[str, Weight]:
    """The weight map of a model in the names that the folder uses, checked against its tensors."""
    weights = dict(architecture.weights(config))
    prefix = architecture.prefix
    if prefix and not any(name.startswith(prefix) for name in folder.tensors):
        weights = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    shapes = {
        name: shape
        for name, shape in folder.shapes.items()
        if name in weights or not any(fnmatch.fnmatchcase(name, p) for p in architecture.ignored)
    }
    check_tensors(shapes, weights, folder.name, HuggingFaceError)
    for name in weights:
        if folder.tensors[name].type not in FLOAT_TYPES:
            raise HuggingFaceError(
                f"{folder.name} has {name!r} in {folder.tensors[name].type}, only "
                f"{', '.join(FLOAT_TYPES)} will do"
            )
    return weights
