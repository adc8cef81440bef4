"""The Llama model against a NumPy float64 forward, and loading it from GGUF files."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_gguf as tiny
from flax import nnx

import jax_anyprec as ap
from jax_anyprec.gguf import GGUFError, GGUFFile
from jax_anyprec.models import (
    Cache,
    Llama,
    LlamaConfig,
    Quantization,
    load_gguf,
    pack_embedding,
    weight_bytes,
)
from jax_anyprec.models.attention import QUERY_BLOCK, attend, attend_causally

FLOAT32_ERROR = 2e-4
"""Of logits near 1: a few hundred float32 roundings on the way, each 6e-8, with room to grow."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def oracle(file: GGUFFile, tokens: np.ndarray) -> np.ndarray:
    """Logits ``float64[B, S, vocab]``, straight from the definitions, one head at a time."""

    def weight(name: str) -> np.ndarray:
        return file.floats(f"{name}.weight").astype(np.float64)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + tiny.NORM_EPS) * weight(name)

    def rotate(x: np.ndarray) -> np.ndarray:
        # Pairs of neighbours as complex numbers, turned by position * theta**(-2 i / D).
        turns = tiny.ROPE_THETA ** (-np.arange(0, tiny.HEAD_DIM, 2) / tiny.HEAD_DIM)
        angles = np.outer(np.arange(x.shape[1]), turns)
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    d, seen = tiny.HEAD_DIM, np.tril(np.ones((tokens.shape[1],) * 2, bool))
    x = weight("token_embd")[tokens]
    for layer in range(tiny.LAYERS):
        blk = f"blk.{layer}"
        h = norm(x, f"{blk}.attn_norm")
        q, k, v = (h @ weight(f"{blk}.attn_{n}").T for n in "qkv")
        heads = []
        for i in range(tiny.HEADS):
            j = i // (tiny.HEADS // tiny.KV_HEADS)
            qi, kj = rotate(q[..., i * d : i * d + d]), rotate(k[..., j * d : j * d + d])
            scores = np.where(seen, qi @ kj.swapaxes(1, 2) / np.sqrt(d), -np.inf)
            heads.append(softmax(scores) @ v[..., j * d : j * d + d])
        x = x + np.concatenate(heads, -1) @ weight(f"{blk}.attn_output").T
        h = norm(x, f"{blk}.ffn_norm")
        gate = h @ weight(f"{blk}.ffn_gate").T
        up = h @ weight(f"{blk}.ffn_up").T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weight(f"{blk}.ffn_down").T
    head = "output" if "output.weight" in file.tensors else "token_embd"
    return norm(x, "output_norm") @ weight(head).T


def random_tokens(batch: int, size: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, tiny.VOCAB, (batch, size))


def forward(model: Llama, tokens: np.ndarray) -> np.ndarray:
    """Logits without a cache, jitted."""
    graph, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, tokens))


def with_cache(model: Llama, tokens: np.ndarray, prompt: int, size: int) -> np.ndarray:
    """Logits with `prompt` tokens at once and the others one by one."""
    graph, state = nnx.split(model)

    @jax.jit
    def extend(state: Any, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        model = nnx.merge(graph, state)
        x, cache = model.hidden(tokens, cache)
        return model.logits(x), cache

    batch, total = tokens.shape
    cache = Cache.zeros(model.config, batch, size, model.dtype)
    outputs = []
    for part in [tokens[:, :prompt], *(tokens[:, i : i + 1] for i in range(prompt, total))]:
        logits, cache = extend(state, part, cache)
        outputs.append(logits)
    assert cache.length == total
    return np.concatenate(outputs, axis=1)


@pytest.mark.parametrize("tied", [True, False])
def test_float_model_is_the_oracle(tmp_path, tied):
    path = tiny.write_llama(tmp_path / "m.gguf", linear=tiny.QuantType.F32, tied=tied)
    loaded = load_gguf(path, quantization=None, dtype=jnp.float32)
    tokens = random_tokens(3, 17)
    expected = oracle(GGUFFile(path), tokens)
    np.testing.assert_allclose(forward(loaded.model, tokens), expected, rtol=0, atol=FLOAT32_ERROR)
    cached = with_cache(loaded.model, tokens, prompt=9, size=32)
    np.testing.assert_allclose(cached, expected, rtol=0, atol=FLOAT32_ERROR)
    assert loaded.config == LlamaConfig(
        vocab_size=tiny.VOCAB,
        num_layers=tiny.LAYERS,
        hidden_size=tiny.HIDDEN,
        intermediate_size=tiny.INNER,
        num_heads=tiny.HEADS,
        num_kv_heads=tiny.KV_HEADS,
        head_dim=tiny.HEAD_DIM,
        context_length=tiny.CONTEXT,
        rope_theta=tiny.ROPE_THETA,
        norm_eps=float(np.float32(tiny.NORM_EPS)),
        tied_embeddings=tied,
    )
    assert (loaded.name, loaded.quantization) == ("tiny", None)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_packed_model_with_float_activations_is_the_oracle(tmp_path, kind):
    kind = tiny.QuantType[kind]
    path = tiny.write_llama(tmp_path / "m.gguf", linear=kind, embedding=kind, tied=False)
    loaded = load_gguf(path, quantization=Quantization(activations=None), dtype=jnp.float32)
    tokens = random_tokens(2, 11)
    expected = oracle(GGUFFile(path), tokens)
    np.testing.assert_allclose(forward(loaded.model, tokens), expected, rtol=0, atol=FLOAT32_ERROR)


def test_quantized_activations_stay_close(checkpoint):
    tokens = random_tokens(2, 19)
    expected = oracle(GGUFFile(checkpoint), tokens)
    model = load_gguf(checkpoint, dtype=jnp.float32).model
    logits = forward(model, tokens)
    assert relative_error(logits, expected) < 0.02
    np.testing.assert_allclose(with_cache(model, tokens, 7, 19), logits, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"weights": 8}, 0.03),
        ({"weights": 6, "group_size": 32, "activations": 6}, 0.15),
        ({"weights": 8, "act_scales": "token"}, 0.04),
    ],
)
def test_requantized_models_stay_close(checkpoint, options, limit):
    model = load_gguf(checkpoint, quantization=Quantization(**options), dtype=jnp.float32).model
    tokens = random_tokens(2, 19)
    assert relative_error(forward(model, tokens), oracle(GGUFFile(checkpoint), tokens)) < limit


def test_rotated_model_stays_close():
    config = LlamaConfig(64, 1, 64, 64, 2, 2, 32, 32)
    plain = Llama(config, rngs=nnx.Rngs(0))
    rotated = Quantization(weights=8, rotate=True, act_scales="token")
    model = Llama(config, quantization=rotated, rngs=nnx.Rngs(0))
    assert model.layers[0].feed_forward.down.kernel.get_value().rotation == ap.Rotation(64)
    tokens = np.arange(20)[None] % 64
    assert relative_error(forward(model, tokens), forward(plain, tokens)) < 0.03


def relative_error(actual: Any, expected: Any) -> float:
    actual = np.asarray(actual, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def test_bfloat16_model(checkpoint):
    for quantization in (None, Quantization()):
        model = load_gguf(checkpoint, quantization=quantization, dtype=jnp.bfloat16).model
        tokens = random_tokens(2, 8)
        logits = forward(model, tokens)
        assert logits.dtype == np.float32
        assert relative_error(logits, oracle(GGUFFile(checkpoint), tokens)) < 0.05
        x, cache = jax.eval_shape(
            model.hidden, tokens, Cache.zeros(model.config, 2, 8, model.dtype)
        )
        assert x.dtype == cache.keys[0].dtype == jnp.bfloat16


def test_packed_weights_stay_packed(checkpoint):
    packed = weight_bytes(load_gguf(checkpoint).model)
    linears = [s for n, s in tiny.weight_shapes().items() if len(s) == 2 and n[:3] == "blk"]
    weights = sum(n * k for n, k in linears)
    assert packed.linear_weights == weights
    # 4 bits, a float16 scale and a float16 offset in groups of 32.
    assert packed.linear == weights * 5 // 8
    assert packed.bits_per_linear_weight == 5
    assert packed.embedding == tiny.VOCAB * tiny.HIDDEN * 9 // 8
    assert packed.other == 5 * tiny.HIDDEN * 4
    assert packed.total == packed.linear + packed.embedding + packed.other
    plain = weight_bytes(load_gguf(checkpoint, quantization=None, dtype=jnp.float32).model)
    assert plain.bits_per_linear_weight == 32
    assert plain.embedding == tiny.VOCAB * tiny.HIDDEN * 4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Q8_0", "F32"])
def test_embeddings_of_float_models_are_packed_without_loss(tmp_path, kind, tied):
    kind = tiny.QuantType[kind]
    path = tiny.write_llama(tmp_path / "m.gguf", linear=kind, embedding=kind, tied=tied)
    model = load_gguf(path, quantization=None, dtype=jnp.float32).model
    tokens = random_tokens(2, 11)
    expected = forward(model, tokens)
    pack_embedding(model, path)
    size = 9 if kind == tiny.QuantType.Q8_0 else 32
    assert weight_bytes(model).embedding == tiny.VOCAB * tiny.HIDDEN * size // 8
    np.testing.assert_allclose(forward(model, tokens), expected, rtol=0, atol=FLOAT32_ERROR)


@pytest.mark.parametrize(("activations", "head"), [(None, None), (8, 8), (4, 8)])
def test_packed_embeddings_round_features_where_layers_do(checkpoint, activations, head):
    model = load_gguf(checkpoint, quantization=None, dtype=jnp.float32).model
    ap.quantize_model(model, ap.Quantization(weights=4, activations=activations))
    pack_embedding(model, checkpoint)
    assert model.embed.activations == head


def test_progress_counts_all_bytes(checkpoint):
    calls: list[tuple[int, int]] = []
    load_gguf(checkpoint, progress=lambda done, total: calls.append((done, total)))
    total = GGUFFile(checkpoint).summary().nbytes
    assert calls[-1] == (total, total)
    assert len(calls) == len(tiny.weight_shapes())
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_eager_and_abstract_calls_agree_with_jit(checkpoint):
    model = load_gguf(checkpoint, dtype=jnp.float32).model
    tokens = random_tokens(2, 6)
    graph, state = nnx.split(model)
    abstract = jax.eval_shape(lambda state, x: nnx.merge(graph, state)(x), state, tokens)
    assert abstract.shape == (2, 6, tiny.VOCAB)
    logits = forward(model, tokens)
    np.testing.assert_allclose(model(tokens), logits, rtol=0, atol=FLOAT32_ERROR)


BROKEN = {
    "architecture": ({"general.architecture": "qwen2"}, "architecture 'qwen2', only 'llama'"),
    "missing key": ({"llama.block_count": None}, "no metadata key 'llama.block_count'"),
    "wrong type": ({"llama.block_count": "2"}, "'llama.block_count' must be int, got str"),
    "more layers": ({"llama.block_count": 3}, r"lacks tensors \(9\): blk.2.attn_k"),
    "fewer layers": ({"llama.block_count": 1}, r"has unknown tensors \(9\): blk.1.attn_k"),
    "absurd layers": ({"llama.block_count": 2**31}, "claims 2147483648 layers"),
    "width": ({"llama.feed_forward_length": 64}, r"ffn_gate.weight must have shape \(64, 64\)"),
    "absurd width": ({"llama.feed_forward_length": 2**32 - 1}, "must have shape"),
    "no heads": ({"llama.attention.head_count": 0}, "num_heads must be positive"),
    "kv heads": ({"llama.attention.head_count_kv": 3}, "num_kv_heads must divide"),
    "rope": ({"llama.rope.dimension_count": 8}, "rope.dimension_count must be the head size 16"),
    "scaling": ({"llama.rope.scaling.type": "yarn"}, "scales its rotary embeddings"),
    "experts": ({"llama.expert_count": 8}, "has experts"),
    "tokenizer": ({"tokenizer.ggml.model": "llama"}, "tokenizer of model 'llama', only 'gpt2'"),
    "vocabulary": ({"tokenizer.ggml.tokens": ["a"]}, "has 1 tokens but 320 token types"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_unsupported_checkpoints_have_clear_errors(tmp_path, case):
    metadata, message = BROKEN[case]
    path = tiny.write_llama(tmp_path / "broken.gguf", metadata=metadata)
    with pytest.raises(GGUFError, match=message) as caught:
        load_gguf(path)
    assert "broken.gguf" in str(caught.value)


def test_more_tokens_than_embeddings(tmp_path):
    weights = tiny.random_weights()
    weights["token_embd.weight"] = weights["token_embd.weight"][:300]
    path = tiny.write_llama(tmp_path / "m.gguf", weights=weights)
    with pytest.raises(GGUFError, match="has 320 tokens, but an embedding for only 300"):
        load_gguf(path)


def test_bad_options():
    with pytest.raises(ValueError, match="group_size, rotate and scales need"):
        Quantization(group_size=32)
    config = LlamaConfig(64, 1, 64, 128, 2, 1, 32, 32)
    with pytest.raises(ValueError, match="weights must be set"):
        Llama(config, quantization=Quantization(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="head_dim must be even, got 5"):
        dataclasses.replace(config, head_dim=5)
    with pytest.raises(ValueError, match="num_kv_heads must divide num_heads = 2, got 3"):
        dataclasses.replace(config, num_kv_heads=3)
    with pytest.raises(ValueError, match="num_layers must be positive, got 0"):
        dataclasses.replace(config, num_layers=0)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no GGUF file"):
        load_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("start", "size", "length"),
    [
        (0, 1, 1),
        (0, 1, 64),
        (40, 1, 64),
        (0, QUERY_BLOCK, QUERY_BLOCK),
        (5, 200, 300),
        (0, 300, 301),
    ],
)
def test_blocks_of_queries_see_what_all_at_once_see(start: int, size: int, length: int) -> None:
    rng = np.random.default_rng(0)
    q = rng.normal(size=(6, size, 16)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, length, 16)).astype(np.float32)
    positions = start + jnp.arange(size)
    visible = positions[:, None] >= jnp.arange(length)
    expected = attend(q, k, v, visible)
    found = jax.jit(attend_causally)(q, k, v, positions)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
