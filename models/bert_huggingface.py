"""BERT in Hugging Face's folders: configuration and weight map."""

from __future__ import annotations

from .bert import Bert, BertConfig
from .huggingface import Architecture, Folder
from .loading import Row, Weight, expand, transpose

ATTENTION = "bert.encoder.layer.{i}.attention"
BERT_WEIGHTS = {
    "bert.embeddings.word_embeddings.weight": Row("embeddings.tokens.embedding", "vocab hidden"),
    "bert.embeddings.position_embeddings.weight": Row(
        "embeddings.positions.embedding", "positions hidden"
    ),
    "bert.embeddings.token_type_embeddings.weight": Row(
        "embeddings.types.embedding", "types hidden"
    ),
    "bert.embeddings.LayerNorm.weight": Row("embeddings.norm.scale", "hidden"),
    "bert.embeddings.LayerNorm.bias": Row("embeddings.norm.bias", "hidden"),
    f"{ATTENTION}.self.query.weight": Row(
        "layers.{i}.attention.qkv.layers.0.kernel", "hidden hidden", (transpose,)
    ),
    f"{ATTENTION}.self.query.bias": Row("layers.{i}.attention.qkv.layers.0.bias", "hidden"),
    f"{ATTENTION}.self.key.weight": Row(
        "layers.{i}.attention.qkv.layers.1.kernel", "hidden hidden", (transpose,)
    ),
    f"{ATTENTION}.self.key.bias": Row("layers.{i}.attention.qkv.layers.1.bias", "hidden"),
    f"{ATTENTION}.self.value.weight": Row(
        "layers.{i}.attention.qkv.layers.2.kernel", "hidden hidden", (transpose,)
    ),
    f"{ATTENTION}.self.value.bias": Row("layers.{i}.attention.qkv.layers.2.bias", "hidden"),
    f"{ATTENTION}.output.dense.weight": Row(
        "layers.{i}.attention.output.kernel", "hidden hidden", (transpose,)
    ),
    f"{ATTENTION}.output.dense.bias": Row("layers.{i}.attention.output.bias", "hidden"),
    f"{ATTENTION}.output.LayerNorm.weight": Row("layers.{i}.attention_norm.scale", "hidden"),
    f"{ATTENTION}.output.LayerNorm.bias": Row("layers.{i}.attention_norm.bias", "hidden"),
    "bert.encoder.layer.{i}.intermediate.dense.weight": Row(
        "layers.{i}.feed_forward.up.kernel", "inner hidden", (transpose,)
    ),
    "bert.encoder.layer.{i}.intermediate.dense.bias": Row(
        "layers.{i}.feed_forward.up.bias", "inner"
    ),
    "bert.encoder.layer.{i}.output.dense.weight": Row(
        "layers.{i}.feed_forward.down.kernel", "hidden inner", (transpose,)
    ),
    "bert.encoder.layer.{i}.output.dense.bias": Row("layers.{i}.feed_forward.down.bias", "hidden"),
    "bert.encoder.layer.{i}.output.LayerNorm.weight": Row(
        "layers.{i}.feed_forward_norm.scale", "hidden"
    ),
    "bert.encoder.layer.{i}.output.LayerNorm.bias": Row(
        "layers.{i}.feed_forward_norm.bias", "hidden"
    ),
}

POOLER = {
    "bert.pooler.dense.weight": Row("pooler.weight", "hidden hidden", (transpose,)),
    "bert.pooler.dense.bias": Row("pooler.bias", "hidden"),
}


def bert_config(folder: Folder) -> BertConfig:
    """Of `model_type` "bert"; there is a pooler if the folder has its tensors."""
    config = folder.config
    config.require("hidden_act", "gelu", "gelu")
    config.require("position_embedding_type", "absolute", "absolute")
    config.require("is_decoder", False, False)
    config.require("add_cross_attention", False, False)
    pooler = {"pooler.dense.weight", "bert.pooler.dense.weight"} & folder.tensors.keys()
    return BertConfig(
        vocab_size=config.get("vocab_size", int),
        num_layers=folder.num_layers("num_hidden_layers"),
        hidden_size=config.get("hidden_size", int),
        intermediate_size=config.get("intermediate_size", int),
        num_heads=config.get("num_attention_heads", int),
        context_length=config.get("max_position_embeddings", int),
        token_types=config.get("type_vocab_size", int, 2),
        norm_eps=config.get("layer_norm_eps", float, 1e-12),
        pooler=bool(pooler),
    )


def weight_map(config: BertConfig) -> dict[str, Weight]:
    """Tensor name -> `Weight` for all tensors of a model."""
    return expand({**BERT_WEIGHTS, **POOLER} if config.pooler else BERT_WEIGHTS, config.sizes)


ARCHITECTURES = {
    "bert": Architecture(
        config=bert_config,
        model=Bert,
        weights=weight_map,
        # Heads for pretraining, and a buffer that old files hold.
        ignored=("cls.*", "classifier.*", "*.position_ids"),
        prefix="bert.",
    )
}
