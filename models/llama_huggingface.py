"""Decoders of the Llama family in Hugging Face's folders: configurations and weight maps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from .attention import LinearScaling, Llama3Scaling
from .huggingface import Architecture, Folder, HuggingFaceError, Settings
from .llama import Llama, LlamaConfig
from .loading import Row, Weight, add_one, expand, pair_neighbours, transpose

HEAD = {"lm_head.weight": Row("head.kernel", "vocab hidden", (transpose,))}

LLAMA = {
    "model.embed_tokens.weight": Row("embed.embedding", "vocab hidden"),
    "model.norm.weight": Row("norm.scale", "hidden"),
    "model.layers.{i}.input_layernorm.weight": Row("layers.{i}.attention_norm.scale", "hidden"),
    "model.layers.{i}.self_attn.q_proj.weight": Row(
        "layers.{i}.attention.qkv.layers.0.kernel", "query hidden", (pair_neighbours, transpose)
    ),
    "model.layers.{i}.self_attn.k_proj.weight": Row(
        "layers.{i}.attention.qkv.layers.1.kernel", "key hidden", (pair_neighbours, transpose)
    ),
    "model.layers.{i}.self_attn.v_proj.weight": Row(
        "layers.{i}.attention.qkv.layers.2.kernel", "key hidden", (transpose,)
    ),
    "model.layers.{i}.self_attn.o_proj.weight": Row(
        "layers.{i}.attention.output.kernel", "hidden query", (transpose,)
    ),
    "model.layers.{i}.post_attention_layernorm.weight": Row(
        "layers.{i}.feed_forward_norm.scale", "hidden"
    ),
    "model.layers.{i}.mlp.gate_proj.weight": Row(
        "layers.{i}.feed_forward.gate_up.layers.0.kernel", "inner hidden", (transpose,)
    ),
    "model.layers.{i}.mlp.up_proj.weight": Row(
        "layers.{i}.feed_forward.gate_up.layers.1.kernel", "inner hidden", (transpose,)
    ),
    "model.layers.{i}.mlp.down_proj.weight": Row(
        "layers.{i}.feed_forward.down.kernel", "hidden inner", (transpose,)
    ),
}

QKV_BIAS = {
    "model.layers.{i}.self_attn.q_proj.bias": Row(
        "layers.{i}.attention.qkv.layers.0.bias", "query", (pair_neighbours,)
    ),
    "model.layers.{i}.self_attn.k_proj.bias": Row(
        "layers.{i}.attention.qkv.layers.1.bias", "key", (pair_neighbours,)
    ),
    "model.layers.{i}.self_attn.v_proj.bias": Row("layers.{i}.attention.qkv.layers.2.bias", "key"),
}

QK_NORM = {
    "model.layers.{i}.self_attn.q_norm.weight": Row(
        "layers.{i}.attention.query_norm.scale", "head", (pair_neighbours,)
    ),
    "model.layers.{i}.self_attn.k_norm.weight": Row(
        "layers.{i}.attention.key_norm.scale", "head", (pair_neighbours,)
    ),
}

# Here "post_attention_layernorm" is what its name says; in Llama it comes before feed-forward.
POST_NORMS = {
    "model.layers.{i}.post_attention_layernorm.weight": Row(
        "layers.{i}.attention_post_norm.scale", "hidden"
    ),
    "model.layers.{i}.pre_feedforward_layernorm.weight": Row(
        "layers.{i}.feed_forward_norm.scale", "hidden"
    ),
    "model.layers.{i}.post_feedforward_layernorm.weight": Row(
        "layers.{i}.feed_forward_post_norm.scale", "hidden"
    ),
}


def norms_from_zero(table: Mapping[str, Row]) -> dict[str, Row]:
    """`table` for a model whose norms store the difference of their scale from 1."""
    return {
        name: dataclasses.replace(row, changes=(*row.changes, add_one))
        if row.path.endswith("norm.scale")
        else row
        for name, row in table.items()
    }


GEMMA2 = norms_from_zero(LLAMA | POST_NORMS)
GEMMA3 = norms_from_zero(LLAMA | POST_NORMS | QK_NORM)


def weight_map(table: Mapping[str, Row], config: LlamaConfig) -> dict[str, Weight]:
    """Tensor name -> `Weight` for all tensors of a model."""
    return expand(table if config.tied_embeddings else {**table, **HEAD}, config.sizes)


def llama_config(folder: Folder) -> LlamaConfig:
    """Of `model_type` "llama"."""
    config = folder.config
    config.require("attention_bias", False, False)
    config.require("mlp_bias", False, False)
    config.require("hidden_act", "silu", "silu")
    return LlamaConfig(**_common(folder), **_rope(config))


def mistral_config(folder: Folder) -> LlamaConfig:
    """Of `model_type` "mistral", all of whose layers have the sliding window, if any."""
    config, common = folder.config, _common(folder)
    config.require("hidden_act", "silu", "silu")
    window = config.get("sliding_window", int | None, 4096)
    sliding = (window is not None,) * common["num_layers"]
    return LlamaConfig(
        **common,
        **_rope(config),
        sliding_window=window,
        sliding_layers=sliding,
    )


def qwen_config(folder: Folder, **options: Any) -> LlamaConfig:
    """Of `model_type` "qwen2" (Qwen2 and Qwen2.5) or "qwen3"; `options` are what they differ in."""
    config = folder.config
    config.require("attention_bias", False, False)
    config.require("hidden_act", "silu", "silu")
    common = _common(folder)
    windows: dict[str, Any] = {}
    if config.get("use_sliding_window", bool, False):
        first = config.get("max_window_layers", int, 28)
        windows = _windows(config, common["num_layers"], lambda i: i >= first)
    return LlamaConfig(**common, **_rope(config), **windows, **options)


def gemma2_config(folder: Folder) -> LlamaConfig:
    """Of `model_type` "gemma2"; every other layer has the sliding window."""
    common = _common(folder, head_dim=256, tied=True)
    windows = _windows(folder.config, common["num_layers"], lambda i: i % 2 == 0)
    cap = folder.config.get("attn_logit_softcapping", float | None, 50.0)
    return LlamaConfig(
        **common,
        **_gemma(folder.config, logit_soft_cap=30.0),
        **_rope(folder.config),
        **windows,
        attention_soft_cap=cap,
    )


def gemma3_config(folder: Folder) -> LlamaConfig:
    """Of `model_type` "gemma3_text"; all but every so many layers have the sliding window."""
    config, common = folder.config, _common(folder, head_dim=256, tied=True)
    period = config.get("sliding_window_pattern", int, 6)
    if period < 1:
        raise HuggingFaceError(
            f"{config.where}: 'sliding_window_pattern' must be positive, got {period}"
        )
    windows = _windows(config, common["num_layers"], lambda i: (i + 1) % period > 0)
    config.require("attn_logit_softcapping", None, None)  # Transformers takes no notice of it
    # Transformers 5 writes rope_parameters for each kind of layer, earlier ones flat keys.
    kinds = config.section("rope_parameters")
    if kinds is None:
        rope = _rope(config, theta=1e6)
        local = config.get("rope_local_base_freq", float, 1e4)
    else:
        rope, sliding = (
            _rope_section(Settings(kinds.get(kind, dict), f"{kinds.where}: {kind!r}"), theta)
            for kind, theta in (("full_attention", 1e6), ("sliding_attention", 1e4))
        )
        if sliding["rope_scaling"] is not None:
            raise HuggingFaceError(
                f"{kinds.where}: 'sliding_attention': 'rope_type' must be 'default', others are "
                "not supported"
            )
        local = sliding["rope_theta"]
    return LlamaConfig(
        **common,
        **_gemma(config, logit_soft_cap=None),
        **rope,
        **windows,
        sliding_rope_theta=local,
        qk_norm=True,
    )


ARCHITECTURES = {
    model_type: Architecture(
        config=config,
        model=Llama,
        weights=functools.partial(weight_map, table),
        ignored=("lm_head.weight", "*.rotary_emb.inv_freq"),
    )
    for model_type, config, table in (
        ("llama", llama_config, LLAMA),
        ("mistral", mistral_config, LLAMA),
        ("qwen2", functools.partial(qwen_config, qkv_bias=True), LLAMA | QKV_BIAS),
        ("qwen3", functools.partial(qwen_config, qk_norm=True), LLAMA | QK_NORM),
        ("gemma2", gemma2_config, GEMMA2),
        ("gemma3_text", gemma3_config, GEMMA3),
    )
}


def _common(folder: Folder, *, head_dim: int | None = None, tied: bool = False) -> dict[str, Any]:
    """What all of the family have; `head_dim` and `tied` are for what config.json leaves out."""
    config = folder.config
    heads, hidden = config.get("num_attention_heads", int), config.get("hidden_size", int)
    default = hidden // max(heads, 1) if head_dim is None else head_dim
    return {
        "vocab_size": config.get("vocab_size", int),
        "num_layers": folder.num_layers("num_hidden_layers"),
        "hidden_size": hidden,
        "intermediate_size": config.get("intermediate_size", int),
        "num_heads": heads,
        "num_kv_heads": _given(config.get("num_key_value_heads", int | None, None), heads),
        "head_dim": _given(config.get("head_dim", int | None, None), default),
        "context_length": config.get("max_position_embeddings", int),
        "norm_eps": config.get("rms_norm_eps", float, 1e-6),
        "tied_embeddings": config.get("tie_word_embeddings", bool, tied),
    }


def _gemma(config: Settings, *, logit_soft_cap: float | None) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common; `logit_soft_cap` is for what config.json leaves out."""
    config.require("attention_bias", False, False)
    config.require("hidden_activation", "gelu_pytorch_tanh", "gelu_pytorch_tanh")
    if config.get("use_bidirectional_attention", bool | None, None):
        config.require("use_bidirectional_attention", False, False)
    scalar = config.get("query_pre_attn_scalar", float, 256.0)
    if scalar <= 0:
        raise HuggingFaceError(
            f"{config.where}: 'query_pre_attn_scalar' must be positive, got {scalar}"
        )
    return {
        "activation": "gelu_tanh",
        "scale_embeddings": True,
        "post_norms": True,
        "attention_scale": scalar**-0.5,
        "logit_soft_cap": config.get("final_logit_softcapping", float | None, logit_soft_cap),
    }


def _windows(config: Settings, num_layers: int, sliding: Callable[[int], bool]) -> dict[str, Any]:
    """Which layers have the sliding window: those that config.json lists, or `sliding`."""
    kinds = config.get("layer_types", list | None, None)
    if kinds is None:
        layers = tuple(sliding(i) for i in range(num_layers))
    else:
        unknown = [k for k in kinds if k not in ("sliding_attention", "full_attention")]
        if unknown or len(kinds) != num_layers:
            raise HuggingFaceError(
                f"{config.where}: 'layer_types' must be {num_layers} of 'sliding_attention' and "
                f"'full_attention', got {len(kinds)}{f' with {unknown[0]!r}' if unknown else ''}"
            )
        layers = tuple(kind == "sliding_attention" for kind in kinds)
    return {
        "sliding_window": config.get("sliding_window", int | None, 4096),
        "sliding_layers": layers,
    }


def _rope(config: Settings, theta: float = 1e4) -> dict[str, Any]:
    """Rotary embeddings, in the keys of Transformers 5 or of earlier ones."""
    config.require("partial_rotary_factor", 1.0, 1.0)
    theta = config.get("rope_theta", float, theta)
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.section(key)
        if rope is not None:
            return _rope_section(rope, theta)
    return {"rope_theta": theta}


def _rope_section(rope: Settings, theta: float) -> dict[str, Any]:
    """Rotary embeddings that an object of config.json describes; `theta` is what it may lack."""
    rope.require("partial_rotary_factor", 1.0, 1.0)
    return {"rope_theta": rope.get("rope_theta", float, theta), "rope_scaling": _scaling(rope)}


def _scaling(rope: Settings) -> LinearScaling | Llama3Scaling | None:
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(rope.get("factor", float))
        case "llama3":
            return Llama3Scaling(
                factor=rope.get("factor", float),
                low_frequency=rope.get("low_freq_factor", float),
                high_frequency=rope.get("high_freq_factor", float),
                original_context=rope.get("original_max_position_embeddings", int),
            )
    raise HuggingFaceError(
        f"{rope.where}: 'rope_type' must be default, linear or llama3, got {kind!r}, which is not "
        "supported"
    )


def _given(value: int | None, default: int) -> int:
    return default if value is None else value
