"""Export of loaded models to Hugging Face's folders: the weight maps in reverse."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_anyprec as ap
from jax_anyprec.export_float import dequantized_writer
from jax_anyprec.safetensors import Tensor, replace_files

from . import bert_huggingface, gpt2_huggingface, llama_huggingface
from .bert import BertConfig
from .columns import take_columns
from .gpt2 import GPT2Config
from .llama import LlamaConfig
from .loading import Change, LoadedModel, Row, add_one, find, pair_neighbours, transpose
from .projections import Projections


def export_huggingface(
    path: str | os.PathLike[str],
    loaded: LoadedModel,
    *,
    dtype: Any = jnp.float32,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write a model as config.json and a model.safetensors of floats, one tensor at a time.

    Packed weights are dequantized, merged projections taken apart again, and queries and keys put
    in Hugging Face's order for rotary embeddings. The tokenizer is not written.

    Args:
      path: of the folder, which is made if there is none. Files in it are replaced when both are
        complete.
      loaded: from `load_gguf` or `load_huggingface`.
      dtype: of the weights: float32, float16 or bfloat16.
      config: what config.json is to say, but for dtypes; for a model from Hugging Face, what it
        said there. None to write one, for models of architecture "llama".

    Raises:
      TypeError: `dtype` is another.
      ValueError: the model needs `config`, or has values that `dtype` can't hold.
    """
    path = Path(path)
    config = dict(llama_json(loaded.config) if config is None else config)
    for key in ("torch_dtype", "quantization_config"):  # of the weights as they were
        config.pop(key, None)
    weights = dequantized_writer(huggingface_tensors(loaded), dtype=dtype)
    text = json.dumps({**config, "dtype": np.dtype(dtype).name}, indent=2).encode()
    path.mkdir(parents=True, exist_ok=True)

    def write_config(file: BinaryIO) -> None:
        file.write(text)

    replace_files({path / "model.safetensors": weights, path / "config.json": write_config})


def huggingface_tensors(loaded: LoadedModel) -> dict[str, Tensor]:
    """The tensors of a model by their names in Hugging Face's folders, each read when asked."""
    config = loaded.config
    return {
        name: Tensor(
            tuple(config.sizes[size] for size in row.shape.split()),
            np.dtype(np.float32),
            functools.partial(_tensor, loaded.model, row, config.sizes),
        )
        for name, row in _rows(weight_table(config), config.sizes["layers"])
    }


def weight_table(config: Any) -> Mapping[str, Row]:
    """Tensor name -> `Row` of the model that a configuration describes."""
    match config:
        case GPT2Config():
            return gpt2_huggingface.GPT2_WEIGHTS
        case BertConfig():
            pooler = bert_huggingface.POOLER if config.pooler else {}
            return {**bert_huggingface.BERT_WEIGHTS, **pooler}
        case LlamaConfig():
            return _llama_table(config)
    raise TypeError(f"config must be one of this package's models, got {type(config).__name__}")


def llama_json(config: Any) -> dict[str, Any]:
    """What config.json says of a model of architecture "llama"."""
    plain = isinstance(config, LlamaConfig) and config == LlamaConfig(
        **{field: getattr(config, field) for field in (*_JSON_NAMES, "tied_embeddings")}
    )
    if not plain:
        raise ValueError("config must be given for models that are not of architecture 'llama'")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tied_embeddings,
        **{key: getattr(config, field) for field, key in _JSON_NAMES.items()},
    }


_JSON_NAMES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "context_length": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
}


def _llama_table(config: LlamaConfig) -> dict[str, Row]:
    tables = llama_huggingface
    table = dict(tables.LLAMA)
    if config.post_norms:
        table |= tables.POST_NORMS
    if config.qkv_bias:
        table |= tables.QKV_BIAS
    if config.qk_norm:
        table |= tables.QK_NORM
    if config.post_norms:  # Gemma's
        table = tables.norms_from_zero(table)
    return table if config.tied_embeddings else table | tables.HEAD


def _rows(table: Mapping[str, Row], layers: int) -> Iterator[tuple[str, Row]]:
    """Names and rows with the numbers of layers in place."""
    for name, row in table.items():
        for i in range(layers) if "{i}" in name else (0,):
            yield name.format(i=i), dataclasses.replace(row, path=row.path.format(i=i))


def _tensor(model: nnx.Module, row: Row, sizes: Mapping[str, int]) -> np.ndarray:
    """A row's tensor, from the parameter that it fills."""
    values = _parameter(model, row.path)
    for change in reversed(row.changes):
        values = INVERSES[change](values, sizes)
    return values


def _parameter(model: nnx.Module, path: str) -> np.ndarray:
    """``float32``, the parameter at a dotted path, as the float model has it."""
    place, _, parameter = path.rpartition(".")
    parent, _, child = place.rpartition(".")
    parent, _, _ = parent.rpartition(".")
    projections = find(model, parent) if child.isdigit() else None
    if isinstance(projections, Projections):
        module, columns = _projection(projections, int(child))
    else:
        module, columns = find(model, place), slice(None)
    value = getattr(module, parameter).get_value()
    if isinstance(value, ap.QuantizedTensor):
        values = np.asarray(take_columns(value, columns).dequantize())
        return values.T if parameter == "embedding" else values
    return np.asarray(value, np.float32)[..., columns]


def _projection(projections: Projections, index: int) -> tuple[nnx.Module, slice]:
    """The layer that has an output, and its columns there."""
    for layer, widths in zip(projections.layers, projections.widths, strict=True):
        if index < len(widths):
            start = sum(widths[:index])
            return layer, slice(start, start + widths[index])
        index -= len(widths)
    raise IndexError(f"there is no projection {index} past the last")


def _subtract_one(x: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    return x - np.float32(1)


def _part_neighbours(x: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    pairs = x.reshape(-1, sizes["head"] // 2, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)


INVERSES: Mapping[Callable[..., np.ndarray], Change] = {
    transpose: transpose,
    add_one: _subtract_one,
    pair_neighbours: _part_neighbours,
}
"""By what a row of a weight map makes of a tensor: what makes the tensor again."""
