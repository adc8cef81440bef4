"""GPT-2 in Hugging Face's folders: configuration and weight map."""

from __future__ import annotations

from .gpt2 import GPT2, GPT2Config
from .huggingface import Architecture, Folder
from .loading import Row, Weight, expand

# Its matrices are stored [in, out] ("Conv1D"), as kernels are here.
GPT2_WEIGHTS = {
    "transformer.wte.weight": Row("embed.embedding", "vocab hidden"),
    "transformer.wpe.weight": Row("position_embed.embedding", "positions hidden"),
    "transformer.ln_f.weight": Row("norm.scale", "hidden"),
    "transformer.ln_f.bias": Row("norm.bias", "hidden"),
    "transformer.h.{i}.ln_1.weight": Row("layers.{i}.attention_norm.scale", "hidden"),
    "transformer.h.{i}.ln_1.bias": Row("layers.{i}.attention_norm.bias", "hidden"),
    "transformer.h.{i}.attn.c_attn.weight": Row("layers.{i}.attention.qkv.kernel", "hidden qkv"),
    "transformer.h.{i}.attn.c_attn.bias": Row("layers.{i}.attention.qkv.bias", "qkv"),
    "transformer.h.{i}.attn.c_proj.weight": Row(
        "layers.{i}.attention.output.kernel", "hidden hidden"
    ),
    "transformer.h.{i}.attn.c_proj.bias": Row("layers.{i}.attention.output.bias", "hidden"),
    "transformer.h.{i}.ln_2.weight": Row("layers.{i}.feed_forward_norm.scale", "hidden"),
    "transformer.h.{i}.ln_2.bias": Row("layers.{i}.feed_forward_norm.bias", "hidden"),
    "transformer.h.{i}.mlp.c_fc.weight": Row("layers.{i}.feed_forward.up.kernel", "hidden inner"),
    "transformer.h.{i}.mlp.c_fc.bias": Row("layers.{i}.feed_forward.up.bias", "inner"),
    "transformer.h.{i}.mlp.c_proj.weight": Row(
        "layers.{i}.feed_forward.down.kernel", "inner hidden"
    ),
    "transformer.h.{i}.mlp.c_proj.bias": Row("layers.{i}.feed_forward.down.bias", "hidden"),
}


def gpt2_config(folder: Folder) -> GPT2Config:
    """Of `model_type` "gpt2"."""
    config = folder.config
    config.require("activation_function", "gelu_new", "gelu_new")
    config.require("scale_attn_weights", True, True)
    config.require("scale_attn_by_inverse_layer_idx", False, False)
    config.require("add_cross_attention", False, False)
    config.require("tie_word_embeddings", True, True)
    hidden = config.get("n_embd", int)
    inner = config.get("n_inner", int | None, None)
    return GPT2Config(
        vocab_size=config.get("vocab_size", int),
        num_layers=folder.num_layers("n_layer"),
        hidden_size=hidden,
        intermediate_size=4 * hidden if inner is None else inner,
        num_heads=config.get("n_head", int),
        context_length=config.get("n_positions", int),
        norm_eps=config.get("layer_norm_epsilon", float, 1e-5),
    )


def weight_map(config: GPT2Config) -> dict[str, Weight]:
    """Tensor name -> `Weight` for all tensors of a model."""
    return expand(GPT2_WEIGHTS, config.sizes)


ARCHITECTURES = {
    "gpt2": Architecture(
        config=gpt2_config,
        model=GPT2,
        weights=weight_map,
        # The head, which is tied, and causal masks that old files hold.
        ignored=("lm_head.weight", "*.attn.bias", "*.attn.masked_bias"),
        prefix="transformer.",
    )
}
