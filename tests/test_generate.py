"""Generation: against the model without a cache, number of compiled programs, sampling, errors."""

from __future__ import annotations

import functools
import itertools
import logging
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_gguf as tiny
from flax import nnx

from jax_anyprec.models import Cache, Quantization, generate, load_gguf
from jax_anyprec.models.generate import Sampler, bucket, compile_step, most_likely, nucleus

PROMPT = [5, 17, 300, 4, 4, 260, 9]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_gguf(checkpoint, quantization=None, dtype=jnp.float32).model


@pytest.fixture(scope="module")
def packed(checkpoint):
    return load_gguf(checkpoint, quantization=Quantization(), dtype=jnp.float32).model


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, state, tokens):
    return nnx.merge(graph, state)(tokens)


def greedy(model, prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation, each token from a full forward of a fixed size."""
    graph, state = nnx.split(model)
    tokens = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(forward(graph, state, padded)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("size", [1, 31, 32, 33])
def test_greedy_is_the_full_forward(model, size):
    prompt = [(7 * i + size) % tiny.VOCAB for i in range(size)]
    assert list(generate(model, prompt, max_tokens=12)) == greedy(model, prompt, 12)


@pytest.mark.parametrize("size", [31, 32, 33, 64, 97])
def test_long_prompts_are_read_in_chunks(model, size, monkeypatch):
    prompt = [(5 * i) % tiny.VOCAB for i in range(size)]
    expected = list(generate(model, prompt, max_tokens=5))
    monkeypatch.setattr(sys.modules["jax_anyprec.models.generate"], "CHUNK", 32)
    assert list(generate(model, prompt, max_tokens=5)) == expected


def test_packed_model_generates_as_its_full_forward(packed):
    assert list(generate(packed, PROMPT, max_tokens=8)) == greedy(packed, PROMPT, 8)


def test_stop_tokens_end_the_text(model):
    tokens = list(generate(model, PROMPT, max_tokens=10))
    stop = tokens[4]
    expected = tokens[: tokens.index(stop)]
    assert list(generate(model, PROMPT, max_tokens=10, stop_tokens=[stop])) == expected


def test_context_ends_the_text(model):
    prompt = [1] * (tiny.CONTEXT - 3)
    assert len(list(generate(model, prompt, max_tokens=100))) == 3
    assert len(list(generate(model, PROMPT, max_tokens=1))) == 1


def test_first_token_needs_no_second(model):
    tokens = generate(model, PROMPT, max_tokens=50)
    assert next(tokens) == greedy(model, PROMPT, 1)[0]
    tokens.close()


def test_nothing_is_compiled_after_the_second_token(packed, caplog):
    # The first token comes from the step over the prompt, the second from that over one token.
    tokens = generate(packed, PROMPT, max_tokens=20, temperature=0.9, top_k=20, top_p=0.9)
    list(itertools.islice(tokens, 2))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        assert len(list(tokens)) == 18
        assert not caplog.records
        # Another text, seed, temperature and length of the same buckets: the same programs.
        again = generate(packed, [9, 8, 7], max_tokens=25, temperature=0.5, top_k=20, top_p=0.5)
        assert len(list(again)) == 25
        assert not [record for record in caplog.records if "step" in record.message]


def test_step_updates_the_cache_in_place(packed):
    graph, state = nnx.split(packed)
    weights, tree = jax.tree.flatten(state)
    step = compile_step(graph, tree)
    sampler, one = Sampler(jax.random.key(0)), np.int32(1)
    prompt = np.asarray([PROMPT + [0] * 25], np.int32)
    cache = Cache.zeros(packed.config, 1, 64, packed.dtype)
    token, cache = step(weights, prompt, np.int32(len(PROMPT)), cache, sampler)
    compiled = step.lower(weights, token, one, cache, sampler).compile().as_text()
    assert not re.search(rf"f32\[{tiny.KV_HEADS},64,{tiny.HEAD_DIM}\]\S* copy\(", compiled)
    before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((cache.keys, cache.values))]
    old = cache
    for _ in range(3):
        token, cache = step(weights, token, one, cache, sampler)
    after = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((cache.keys, cache.values))]
    assert before == after
    assert all(x.is_deleted() for x in jax.tree.leaves((old.keys, old.values)))
    assert cache.length == len(PROMPT) + 3


def test_seeds_repeat(model):
    def run(seed: int) -> list[int]:
        return list(generate(model, PROMPT, max_tokens=12, temperature=1.5, seed=seed))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_top_k_of_one_and_tiny_top_p_are_greedy(model):
    expected = list(generate(model, PROMPT, max_tokens=6))
    assert list(generate(model, PROMPT, max_tokens=6, temperature=2.0, top_k=1)) == expected
    assert list(generate(model, PROMPT, max_tokens=6, temperature=2.0, top_p=1e-6)) == expected


def draws(count: int, logits: np.ndarray, **options) -> np.ndarray:
    """How often each token is sampled."""
    sampler = Sampler(jax.random.key(0), **options)
    tokens = jax.vmap(sampler, (None, 0))(jnp.asarray(logits, jnp.float32), jnp.arange(count))
    return np.bincount(tokens, minlength=logits.size)


def test_sampled_frequencies():
    logits = np.log([0.4, 0.1, 0.3, 0.15, 0.05])
    count = 20_000
    for options, kept in (
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 3}, [0, 2, 3]),
        ({"top_p": np.float32(0.75)}, [0, 2, 3]),
        ({"top_p": np.float32(0.65)}, [0, 2]),
        ({"top_k": 2, "top_p": np.float32(0.9)}, [0, 2]),
        ({"top_k": 50}, [0, 1, 2, 3, 4]),
    ):
        weights = np.zeros(5)
        weights[kept] = np.exp(logits)[kept] ** (1 / 0.8)
        weights /= weights.sum()
        if "top_p" in options:  # top_p counts probabilities after the temperature
            weights = np.where(reference_nucleus(logits, 0.8, **options), np.exp(logits / 0.8), 0)
            weights /= weights.sum()
        frequency = draws(count, logits, temperature=np.float32(0.8), **options) / count
        error = 5 * np.sqrt(weights * (1 - weights) / count)
        assert (np.abs(frequency - weights) <= error).all(), options


def reference_nucleus(
    logits: np.ndarray, temperature: float, top_p: float, top_k: int | None = None
) -> np.ndarray:
    """Which tokens may be sampled, by sorting."""
    order = np.argsort(-logits, kind="stable")[:top_k]
    p = np.exp(logits[order] / temperature)
    p /= p.sum()
    kept = np.zeros(logits.size, bool)
    kept[order[np.cumsum(p) - p < top_p]] = True
    return kept


def test_nucleus_is_the_sorted_one():
    rng = np.random.default_rng(0)
    for top_p in (1e-6, 0.1, 0.5, 0.9, 0.99):
        logits = rng.normal(0, 3, 1000).astype(np.float32)
        kept = np.isfinite(nucleus(jnp.asarray(logits), np.float32(top_p)))
        np.testing.assert_array_equal(kept, reference_nucleus(logits, 1, top_p))


@pytest.mark.parametrize(
    "logits",
    [
        np.random.default_rng(0).normal(size=1000),
        [3.0],
        [1, 5, 2, 5, 5],
        [-np.inf, -np.inf],
        [-np.inf, 2, np.inf, 3, np.inf],
    ],
)
def test_most_likely_is_the_first_largest(logits):
    found = jax.jit(most_likely)(np.asarray(logits, np.float32))
    assert found.dtype == np.int32
    assert found == np.argmax(np.asarray(logits, np.float32))


def test_buckets():
    assert [bucket(size) for size in (1, 32, 33, 64, 65)] == [32, 32, 64, 64, 128]


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "tokens must be a list of at least one id"),
        ([[1, 2]], {}, "tokens must be a list of at least one id"),
        ([1] * tiny.CONTEXT, {}, "the prompt has 128 tokens; the model's context holds 128"),
        ([1] * 1000, {}, "the prompt has 1000 tokens; the model's context holds 128"),
        ([3, tiny.VOCAB], {}, r"tokens must be in 0..319, got 3..320"),
        ([-1], {}, r"tokens must be in 0..319, got -1..-1"),
        ([1], {"max_tokens": 0}, "max_tokens must be positive, got 0"),
        ([1], {"temperature": -1.0}, "temperature must be 0 or larger, got -1"),
        ([1], {"temperature": float("nan")}, "temperature must be 0 or larger, got nan"),
        ([1], {"top_k": 0}, "top_k must be positive or None, got 0"),
        ([1], {"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0"),
        ([1], {"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_bad_arguments(model, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, tokens, **options)


def test_tokens_must_be_integers(model):
    with pytest.raises(TypeError, match="tokens must be integers, got float64"):
        generate(model, [1.5])


@pytest.mark.parametrize("quantization", [None, Quantization()])
def test_capital_of_france(smollm2_path, quantization):
    loaded = load_gguf(smollm2_path, quantization=quantization)
    prompt = loaded.tokenizer.encode("The capital of France is")
    tokens = generate(loaded.model, prompt, max_tokens=3)
    assert loaded.tokenizer.decode(tokens).startswith(" Paris")
