"""Perplexity, divergence and agreement against float64 sums over all logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_gguf as tiny

from jax_anyprec.models import Quantization, load_gguf
from jax_anyprec.models.evaluate import CHUNK, Evaluator, choose_windows, encode_texts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_llama(
        tmp_path_factory.mktemp("gguf") / "tiny.gguf",
        metadata={"llama.context_length": 2 * CHUNK},
    )


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_gguf(checkpoint, quantization=None, dtype=jnp.float32).model


@pytest.fixture(scope="module")
def coarse(checkpoint):
    """The model at 2 bits, far from the float one."""
    return load_gguf(checkpoint, quantization=Quantization(2, None), dtype=jnp.float32).model


def random_windows(count: int, context: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, tiny.VOCAB, (count, context))


def log_softmax(logits) -> np.ndarray:
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def log_probabilities(model, coarse):
    """Of both models on the longest windows; those of shorter ones are the first."""
    windows = random_windows(2, CHUNK + 2)
    return [log_softmax(jax.jit(m)(windows)) for m in (model, coarse)]


@pytest.mark.parametrize("context", [2, CHUNK + 1, CHUNK + 2])
def test_against_float64(model, coarse, log_probabilities, context):
    windows = random_windows(2, CHUNK + 2)[:, :context]
    result = Evaluator(model, windows)(coarse)
    log_p, log_q = (log[:, : context - 1] for log in log_probabilities)
    targets = windows[:, 1:, None]
    assert result.tokens == 2 * (context - 1)
    for log, perplexity in ((log_q, result.perplexity), (log_p, result.reference_perplexity)):
        loss = -np.take_along_axis(log, targets, -1).mean()
        assert perplexity == pytest.approx(np.exp(loss), rel=1e-4)
    change = -np.take_along_axis(log_q - log_p, targets, -1)
    assert result.ratio == pytest.approx(np.exp(change.mean()), rel=1e-4)
    error = change.std() / np.sqrt(change.size) * result.ratio
    assert result.ratio_error == pytest.approx(error, rel=1e-3)
    assert result.kl == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=1e-3)
    assert result.kl > 0.05
    assert result.top1 == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).mean())


def test_reference_agrees_with_itself(model):
    result = Evaluator(model, random_windows(1, 64))(model)
    assert result.perplexity == pytest.approx(result.reference_perplexity, rel=1e-6)
    assert result.kl == pytest.approx(0, abs=1e-6)
    assert result.top1 == 1


def test_progress(model):
    reports: list[tuple[int, int]] = []
    evaluator = Evaluator(model, random_windows(3, 8), lambda *x: reports.append(x))
    evaluator(model, lambda *x: reports.append(x))
    assert reports == [(1, 3), (2, 3), (3, 3)] * 2


@pytest.mark.parametrize(
    ("windows", "error", "message"),
    [
        (np.zeros(8, int), ValueError, r"int32\[windows, 2 or more\], got shape \(8,\)"),
        (np.zeros((0, 8), int), ValueError, r"got shape \(0, 8\)"),
        (np.zeros((1, 1), int), ValueError, r"got shape \(1, 1\)"),
        (np.zeros((1, 8)), TypeError, "windows must be integers, got float64"),
        (np.zeros((1, 2 * CHUNK + 1), int), ValueError, "context holds 256"),
        (np.full((1, 8), tiny.VOCAB), ValueError, r"ids in 0\.\.319, got 320"),
        (np.full((1, 8), -1), ValueError, r"ids in 0\.\.319, got -1"),
    ],
)
def test_bad_windows(model, windows, error, message):
    with pytest.raises(error, match=message):
        Evaluator(model, windows)


def test_models_of_other_vocabularies(model, tmp_path):
    weights = tiny.random_weights()
    weights["token_embd.weight"] = np.tile(weights["token_embd.weight"], (2, 1))
    path = tiny.write_llama(tmp_path / "wide.gguf", weights=weights)
    wide = load_gguf(path, quantization=None, dtype=jnp.float32).model
    with pytest.raises(ValueError, match="vocabulary of 640, the reference of 320"):
        Evaluator(model, random_windows(1, 8))(wide)


def test_windows_are_evenly_spaced():
    np.testing.assert_array_equal(choose_windows(range(8), 9, 4), [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert choose_windows(range(100), 12, 4)[:, 0].tolist() == [0, 48, 96]
    assert choose_windows(range(100), 4, 4)[:, 0].tolist() == [0]


@pytest.mark.parametrize(
    ("total", "context", "message"),
    [
        (3, 4, "at least one context of 4, got 3"),
        (20, 4, "the text has 11 tokens, fewer than 20"),
        (8, 1, "context must be at least 2 tokens, got 1"),
    ],
)
def test_windows_that_do_not_fit(total, context, message):
    with pytest.raises(ValueError, match=message):
        choose_windows(range(11), total, context)


def test_texts_are_encoded_with_an_empty_line_after_each():
    encode = lambda text: list(text.encode())  # noqa: E731
    assert bytes(encode_texts(["ab", "c"], encode)) == b"ab\n\nc\n\n"
    assert encode_texts([], encode) == []
