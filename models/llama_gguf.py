"""Llama models from GGUF files: configuration, weight map, and loading tensor by tensor."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

import jax_anyprec as ap
from jax_anyprec.gguf import EXACT_TYPES, GGUFError, GGUFFile
from jax_anyprec.quantization import Quantization

from .dense import default_dtype
from .llama import Llama, LlamaConfig
from .loading import (
    LoadedModel,
    Progress,
    Row,
    Weight,
    check_tensors,
    expand,
    fill,
    transpose,
)
from .tokenizer import Tokenizer

HEAD_BITS = 8
"""Of the features that `pack_embedding` lets an output head take: fewer would cost predictions."""

EMBEDDING = "token_embd.weight"
WEIGHTS = {
    EMBEDDING: Row("embed.embedding", "vocab hidden"),
    "output_norm.weight": Row("norm.scale", "hidden"),
    "output.weight": Row("head.kernel", "vocab hidden", (transpose,)),
    "blk.{i}.attn_norm.weight": Row("layers.{i}.attention_norm.scale", "hidden"),
    "blk.{i}.attn_q.weight": Row(
        "layers.{i}.attention.qkv.layers.0.kernel", "query hidden", (transpose,)
    ),
    "blk.{i}.attn_k.weight": Row(
        "layers.{i}.attention.qkv.layers.1.kernel", "key hidden", (transpose,)
    ),
    "blk.{i}.attn_v.weight": Row(
        "layers.{i}.attention.qkv.layers.2.kernel", "key hidden", (transpose,)
    ),
    "blk.{i}.attn_output.weight": Row(
        "layers.{i}.attention.output.kernel", "hidden query", (transpose,)
    ),
    "blk.{i}.ffn_norm.weight": Row("layers.{i}.feed_forward_norm.scale", "hidden"),
    "blk.{i}.ffn_gate.weight": Row(
        "layers.{i}.feed_forward.gate_up.layers.0.kernel", "inner hidden", (transpose,)
    ),
    "blk.{i}.ffn_up.weight": Row(
        "layers.{i}.feed_forward.gate_up.layers.1.kernel", "inner hidden", (transpose,)
    ),
    "blk.{i}.ffn_down.weight": Row(
        "layers.{i}.feed_forward.down.kernel", "hidden inner", (transpose,)
    ),
}


@dataclasses.dataclass(frozen=True)
class GGUFWeights:
    """A GGUF file as a `Checkpoint`."""

    file: GGUFFile

    def nbytes(self, name: str) -> int:
        return self.file.info(name).nbytes

    def floats(self, name: str) -> np.ndarray:
        return self.file.floats(name)

    def packed(self, name: str) -> ap.QuantizedTensor | None:
        info = self.file.info(name)
        if info.type not in EXACT_TYPES or len(info.shape) != 2:
            return None
        return self.file.packed(name)


def load_gguf(
    path: str | os.PathLike[str],
    *,
    quantization: Quantization | None = Quantization(),  # noqa: B008 (frozen)
    dtype: Any = None,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
) -> LoadedModel:
    """Load a Llama model from a GGUF file, one tensor at a time.

    Args:
      path: of the file.
      quantization: with ``weights=None`` (the default) every linear layer and the embedding stay
        packed as in the file, exactly, where the type allows (`jax_anyprec.gguf.EXACT_TYPES`),
        and are float where it doesn't. With ``weights=w`` linear layers that the file holds in
        any type are quantized anew. None for a float model.
      dtype: to compute in, and of float weights and cache; None for float32 on a CPU and bfloat16
        elsewhere.
      progress: called after each tensor with the bytes of the file that are done, and their total.
      mesh: devices that share the model, along its axis "model"; None for one.

    Returns:
      A `LoadedModel`.

    Raises:
      FileNotFoundError: there is no such file.
      jax_anyprec.gguf.GGUFError: the file is broken, or not a Llama model that is supported.
    """
    file = GGUFFile(path)
    config = llama_config(file)
    tokenizer = Tokenizer.from_gguf(file)
    if tokenizer.vocab_size > config.vocab_size:
        raise GGUFError(
            f"{file.path.name} has {tokenizer.vocab_size} tokens, but an embedding for only "
            f"{config.vocab_size}"
        )
    dtype = default_dtype() if dtype is None else dtype
    weights = weight_map(config)
    shapes = {name: info.shape for name, info in file.tensors.items()}
    check_tensors(shapes, weights, file.path.name, GGUFError)
    # The abstract model has shapes and no weights; each is put in place as it is read.
    model = nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0)))
    fill(
        model,
        weights,
        GGUFWeights(file),
        quantization=quantization,
        dtype=dtype,
        progress=progress,
        mesh=mesh,
    )
    name = file.get("general.name", str, file.path.stem)
    return LoadedModel(model, config, quantization, name, tokenizer)


def pack_embedding(model: Llama, path: str | os.PathLike[str]) -> None:
    """Hold a float embedding as its file does, without loss, where the type allows it.

    It gives the same values, and a fraction of the bytes is read for each token. As the output head
    it takes features of `HEAD_BITS` if any packed layer of the model rounds its activations, else
    float ones. One that is packed already stays.

    Args:
      model: loaded from the file with ``quantization=None``, and then packed, calibrated, or left
        as it is; changed in place.
      path: of the file.
    """
    if isinstance(model.embed, nnx.Embed):
        fill(
            model,
            {EMBEDDING: weight_map(model.config)[EMBEDDING]},
            GGUFWeights(GGUFFile(path)),
            quantization=Quantization(activations=HEAD_BITS if _rounds(model) else None),
            dtype=model.dtype,
            progress=None,
        )


def _rounds(model: nnx.Module) -> bool:
    """Whether a packed layer of the model rounds its activations."""
    layers = (module for _, module in nnx.iter_modules(model))
    return any(isinstance(x, ap.nnx.QuantLinear) and x.activations is not None for x in layers)


def llama_config(file: GGUFFile) -> LlamaConfig:
    """The configuration that a file's metadata describes, or GGUFError if it isn't supported."""
    architecture = file.get("general.architecture", str)
    if architecture != "llama":
        raise GGUFError(
            f"{file.path.name} has architecture {architecture!r}, only 'llama' is supported"
        )
    if file.get("llama.rope.scaling.type", str, "none") != "none" or (
        "rope_freqs.weight" in file.tensors
    ):
        raise GGUFError(f"{file.path.name} scales its rotary embeddings, which is not supported")
    if file.get("llama.expert_count", int, 0):
        raise GGUFError(f"{file.path.name} has experts, which are not supported")
    heads = file.get("llama.attention.head_count", int)
    hidden_size = file.get("llama.embedding_length", int)
    head_dim = file.get("llama.attention.key_length", int, hidden_size // max(heads, 1))
    vocab_size = file.info("token_embd.weight").shape[0]
    num_layers = file.get("llama.block_count", int)
    if num_layers > len(file.tensors):
        raise GGUFError(f"{file.path.name} claims {num_layers} layers, more than it has tensors")
    try:
        config = LlamaConfig(
            vocab_size=vocab_size,
            num_layers=num_layers,
            hidden_size=hidden_size,
            intermediate_size=file.get("llama.feed_forward_length", int),
            num_heads=heads,
            num_kv_heads=file.get("llama.attention.head_count_kv", int, heads),
            head_dim=head_dim,
            context_length=file.get("llama.context_length", int),
            rope_theta=file.get("llama.rope.freq_base", float, 10000.0),
            norm_eps=file.get("llama.attention.layer_norm_rms_epsilon", float),
            tied_embeddings="output.weight" not in file.tensors,
        )
    except ValueError as error:
        raise GGUFError(f"{file.path.name}: {error}") from None
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if file.get(key, int, config.head_dim) != config.head_dim:
            raise GGUFError(
                f"{file.path.name}: {key} must be the head size {config.head_dim}, "
                f"got {file.metadata[key]}"
            )
    return config


def weight_map(config: LlamaConfig) -> dict[str, Weight]:
    """GGUF tensor name -> where it goes, for all tensors of a model."""
    table = {k: v for k, v in WEIGHTS.items() if not (config.tied_embeddings and "head" in v.path)}
    return expand(table, config.sizes)
