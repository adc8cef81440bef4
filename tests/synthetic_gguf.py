"""Random GGUF blocks and a tiny Llama checkpoint, written with gguf's writer, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

QuantType = gguf.GGMLQuantizationType

VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 320, 64, 96, 2, 4, 2, 16, 128
ROPE_THETA, NORM_EPS = 1000.0, 1e-5

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


class Block(NamedTuple):
    """Values and bytes of a block, and where its float16 scale (and minimum) lie in it."""

    values: int
    nbytes: int
    places: tuple[int, ...]


BLOCKS = {
    "Q4_0": Block(32, 18, (0,)),
    "Q4_1": Block(32, 20, (0, 2)),
    "Q5_0": Block(32, 22, (0,)),
    "Q5_1": Block(32, 24, (0, 2)),
    "Q8_0": Block(32, 34, (0,)),
    "IQ4_NL": Block(32, 18, (0,)),
    "MXFP4": Block(32, 17, ()),
    "Q2_K": Block(256, 84, (80, 82)),
    "Q3_K": Block(256, 110, (108,)),
    "Q4_K": Block(256, 144, (0, 2)),
    "Q5_K": Block(256, 176, (0, 2)),
    "Q6_K": Block(256, 210, (208,)),
}


def random_blocks(kind: str, scale: np.ndarray, minimum: np.ndarray, seed: int = 0) -> np.ndarray:
    """Rows of random codes ``uint8[N, bytes]`` with the ``float16[N, blocks]`` given."""
    block = BLOCKS[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*scale.shape, block.nbytes), dtype=np.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = 127 + rng.integers(-8, 8, scale.shape)
    for place, value in zip(block.places, (scale, minimum), strict=False):
        blocks[..., place : place + 2] = value.astype("<f2")[..., None].view(np.uint8)
    return blocks.reshape(scale.shape[0], -1)


def byte_characters() -> list[str]:
    """GPT-2's printable character of each byte, by bytes (computed as in OpenAI's release)."""
    visible = list(range(ord("!"), ord("~") + 1))
    visible += list(range(ord("¡"), ord("¬") + 1)) + list(range(ord("®"), ord("ÿ") + 1))
    characters, extra = {b: chr(b) for b in visible}, 0
    for b in range(256):
        if b not in characters:
            characters[b] = chr(256 + extra)
            extra += 1
    return [characters[b] for b in range(256)]


def vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types and merges: 3 control tokens, 256 bytes, some words, unused fillers."""
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "Ġ hello"]
    merged = [merge.replace(" ", "") for merge in merges]
    tokens = [*CONTROL, *byte_characters(), *merged]
    types = [3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL))
    fillers = [f"[unused{i}]" for i in range(VOCAB - len(tokens))]
    return tokens + fillers, types + [5] * len(fillers), merges


def weight_shapes(
    tied: bool = True, hidden: int = HIDDEN, inner: int = INNER
) -> dict[str, tuple[int, ...]]:
    """Names and row-major shapes of all tensors."""
    query, key = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, hidden)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (hidden,),
            f"blk.{i}.attn_q.weight": (query, hidden),
            f"blk.{i}.attn_k.weight": (key, hidden),
            f"blk.{i}.attn_v.weight": (key, hidden),
            f"blk.{i}.attn_output.weight": (hidden, query),
            f"blk.{i}.ffn_norm.weight": (hidden,),
            f"blk.{i}.ffn_gate.weight": (inner, hidden),
            f"blk.{i}.ffn_up.weight": (inner, hidden),
            f"blk.{i}.ffn_down.weight": (hidden, inner),
        }
    shapes["output_norm.weight"] = (hidden,)
    return shapes if tied else shapes | {"output.weight": (VOCAB, hidden)}


class Packed(NamedTuple):
    """A tensor that is packed already: rows ``uint8[N, bytes]``."""

    kind: QuantType
    rows: np.ndarray


def random_weights(tied: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights ``float32`` by name, in sizes that keep activations near 1."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        return rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)

    return {name: draw(shape) for name, shape in weight_shapes(tied).items()}


def write_llama(
    path: Path,
    *,
    linear: QuantType = QuantType.Q4_1,
    embedding: QuantType = QuantType.Q8_0,
    tied: bool = True,
    seed: int = 0,
    metadata: dict[str, Any] | None = None,
    weights: Mapping[str, np.ndarray | Packed] | None = None,
) -> Path:
    """Write a checkpoint; `metadata` replaces values by key (None leaves a key out)."""
    tokens, types, merges = vocabulary()
    values: dict[str, Any] = {
        "llama.block_count": LAYERS,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.freq_base": ROPE_THETA,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.attention.layer_norm_rms_epsilon": NORM_EPS,
        "general.name": "tiny",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    } | (metadata or {})
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", "llama"))
    for key, value in values.items():
        match value:
            case None:
                pass
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
    if weights is None:
        weights = random_weights(tied, seed)
    for name, value in weights.items():
        if isinstance(value, Packed):
            writer.add_tensor(name, value.rows, raw_dtype=value.kind)
            continue
        kind = QuantType.F32 if value.ndim == 1 else linear
        if name == "token_embd.weight":
            kind = embedding
        writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
