"""Llama models from GGUF files: configuration, weight map, and loading tensor by tensor."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jax_anyprec as ap
from jax_anyprec.gguf import EXACT_TYPES, GGUFError, GGUFFile
from jax_anyprec.quantization import Quantization

from .dense import default_dtype, packed_embedding, packed_linear
from .llama import Llama, LlamaConfig
from .projections import merge_projections
from .tokenizer import Tokenizer

# GGUF tensor name -> path of the module whose weights it holds, and its shape in the file by the
# names of `_sizes`; {i} counts layers.
MODEL_WEIGHTS = {
    "token_embd.weight": ("embed", ("vocab", "hidden")),
    "output_norm.weight": ("norm", ("hidden",)),
}
HEAD_WEIGHTS = {"output.weight": ("head", ("vocab", "hidden"))}
LAYER_WEIGHTS = {
    "blk.{i}.attn_norm.weight": ("layers.{i}.attention_norm", ("hidden",)),
    "blk.{i}.attn_q.weight": ("layers.{i}.attention.qkv.layers.0", ("query", "hidden")),
    "blk.{i}.attn_k.weight": ("layers.{i}.attention.qkv.layers.1", ("key", "hidden")),
    "blk.{i}.attn_v.weight": ("layers.{i}.attention.qkv.layers.2", ("key", "hidden")),
    "blk.{i}.attn_output.weight": ("layers.{i}.attention.output", ("hidden", "query")),
    "blk.{i}.ffn_norm.weight": ("layers.{i}.feed_forward_norm", ("hidden",)),
    "blk.{i}.ffn_gate.weight": (
        "layers.{i}.feed_forward.gate_up.layers.0",
        ("inner", "hidden"),
    ),
    "blk.{i}.ffn_up.weight": ("layers.{i}.feed_forward.gate_up.layers.1", ("inner", "hidden")),
    "blk.{i}.ffn_down.weight": ("layers.{i}.feed_forward.down", ("hidden", "inner")),
}


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model from a checkpoint.

    Args:
      model: with all weights in place.
      tokenizer: of the same file.
      config: the model's.
      quantization: as it was asked for.
      name: what the checkpoint calls itself, or the file's name.
    """

    model: Llama
    tokenizer: Tokenizer
    config: LlamaConfig
    quantization: Quantization | None
    name: str


@dataclasses.dataclass(frozen=True)
class WeightBytes:
    """Resident bytes of a model's weights.

    Args:
      linear: bytes of all linear layers, scales and offsets included.
      embedding: bytes of the embedding, which may also be the output head.
      other: bytes of norms and biases.
      linear_weights: number of weights in linear layers.
    """

    linear: int
    embedding: int
    other: int
    linear_weights: int

    @property
    def total(self) -> int:
        return self.linear + self.embedding + self.other

    @property
    def bits_per_linear_weight(self) -> float:
        """Bits that one weight of a linear layer takes, scales and offsets included."""
        return 8 * self.linear / self.linear_weights


def load_gguf(
    path: str | os.PathLike[str],
    *,
    quantization: Quantization | None = Quantization(),  # noqa: B008 (frozen)
    dtype: Any = None,
    progress: Callable[[int, int], None] | None = None,
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
    _check_tensors(file, weights)
    # The abstract model has shapes and no weights; each is put in place as it is read.
    model = nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0)))
    arena = ap.Arena()
    total, done = sum(file.info(name).nbytes for name in weights), 0
    for part, members in itertools.groupby(weights.items(), lambda member: _part(member[1][0])):
        for name, (path, _) in members:
            layer = _load_layer(file, name, _find(model, path), quantization, dtype)
            _replace(model, path, layer)
            done += file.info(name).nbytes
            if progress is not None:
                progress(done, total)
        module = _find(model, part)
        merge_projections(module)
        nnx.update(module, arena.place(nnx.state(module)))
    name = file.get("general.name", str, file.path.stem)
    return LoadedModel(model, tokenizer, config, quantization, name)


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


def weight_map(config: LlamaConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF tensor name -> (module path, shape in the file), for all tensors of a model."""
    heads = {} if config.tied_embeddings else HEAD_WEIGHTS
    sizes = _sizes(config)
    weights = {}
    for i, rows in enumerate([MODEL_WEIGHTS | heads] + [LAYER_WEIGHTS] * config.num_layers):
        for name, (path, shape) in rows.items():
            weights[name.format(i=i - 1)] = path.format(i=i - 1), tuple(sizes[s] for s in shape)
    return weights


def weight_bytes(model: Llama) -> WeightBytes:
    """Resident bytes of a model's weights, as they are held: packed ones count packed."""
    linear = embedding = linear_weights = 0
    for _, module in nnx.iter_modules(model):
        match module:
            case nnx.Linear():
                linear += _nbytes(module.kernel)
                linear_weights += math.prod(module.kernel.shape)
            case ap.nnx.QuantLinear():
                linear += _nbytes(module.kernel)
                linear_weights += math.prod(module.kernel.get_value().shape)
            case nnx.Embed() | ap.nnx.QuantEmbed():
                embedding += _nbytes(module)
    other = _nbytes(model) - linear - embedding
    return WeightBytes(linear, embedding, other, linear_weights)


def _nbytes(node: Any) -> int:
    """Bytes of all arrays of a pytree."""
    return sum(x.nbytes for x in jax.tree.leaves(node))


def _sizes(config: LlamaConfig) -> dict[str, int]:
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "query": config.num_heads * config.head_dim,
        "key": config.num_kv_heads * config.head_dim,
    }


def _part(path: str) -> str:
    """The part of a dotted `path` that is loaded as a whole: a decoder layer, or a module."""
    first, *rest = path.split(".")
    return f"{first}.{rest[0]}" if first == "layers" else first


def _find(model: Llama, path: str) -> Any:
    """The module at a dotted `path`."""
    node: Any = model
    for key in path.split("."):
        node = node[int(key)] if key.isdigit() else getattr(node, key)
    return node


def _replace(model: Llama, path: str, module: nnx.Module) -> None:
    """Put `module` at a dotted `path`."""
    *parents, child = path.split(".")
    node: Any = _find(model, ".".join(parents)) if parents else model
    if child.isdigit():
        node[int(child)] = module
    else:
        setattr(node, child, module)


def _check_tensors(file: GGUFFile, weights: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """GGUFError unless the file has exactly the tensors of `weights`, in their shapes."""
    for problem, names in (
        ("lacks", weights.keys() - file.tensors.keys()),
        ("has unknown", file.tensors.keys() - weights.keys()),
    ):
        if names:
            shown = ", ".join(sorted(names)[:5])
            raise GGUFError(f"{file.path.name} {problem} tensors ({len(names)}): {shown}")
    for name, (_, shape) in weights.items():
        if file.info(name).shape != shape:
            raise GGUFError(
                f"{file.path.name}: {name} must have shape {shape}, got {file.info(name).shape}"
            )


def _load_layer(
    file: GGUFFile, name: str, module: nnx.Module, quantization: Quantization | None, dtype: Any
) -> nnx.Module:
    """The abstract float `module` with the weights of tensor `name`, or its quantized likeness."""
    exact = quantization is not None and file.info(name).type in EXACT_TYPES
    match module:
        case nnx.RMSNorm():
            module.scale = nnx.Param(jnp.asarray(file.floats(name)))
        case nnx.Embed():
            if quantization is not None and exact:
                return packed_embedding(quantization, _packed(file, name), dtype)
            module.embedding.set_value(jnp.asarray(file.floats(name), dtype))
        case nnx.Linear():
            if quantization is not None and quantization.weights is not None:
                kernel = jnp.asarray(file.floats(name).T)
                return packed_linear(quantization, quantization.pack(kernel), dtype)
            if quantization is not None and exact:
                return packed_linear(quantization, _packed(file, name), dtype)
            module.kernel.set_value(jnp.asarray(file.floats(name).T, dtype))
    return module


def _packed(file: GGUFFile, name: str) -> ap.QuantizedTensor:
    return jax.tree.map(jnp.asarray, file.packed(name))
