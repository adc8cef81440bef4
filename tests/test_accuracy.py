"""The real model on real text: what quantization costs. The README measures on more text."""

from __future__ import annotations

import pytest

from jax_anyprec.models import Quantization, load_gguf, weight_bytes
from jax_anyprec.models.evaluate import Evaluator, choose_windows, encode_texts
from jax_anyprec.models.wikipedia import read_articles

TOKENS, CONTEXT = 1024, 512


@pytest.fixture(scope="module")
def evaluator(smollm2_path, wikipedia_path) -> Evaluator:
    loaded = load_gguf(smollm2_path, quantization=None)
    texts = (article.text for article in read_articles(wikipedia_path))
    tokens = encode_texts(texts, loaded.tokenizer.encode)
    return Evaluator(loaded.model, choose_windows(tokens, TOKENS, CONTEXT))


def evaluate(evaluator: Evaluator, path, **options):
    return evaluator(load_gguf(path, quantization=Quantization(**options)).model)


def test_weights_of_the_file_are_exact(evaluator, smollm2_path):
    result = evaluate(evaluator, smollm2_path, activations=None)
    assert result.ratio == pytest.approx(1, abs=1e-3)
    assert result.kl < 1e-4
    assert 15 < result.reference_perplexity < 30


@pytest.mark.parametrize(
    "options",
    [
        {"activations": 8},
        {"weights": 8, "activations": 8, "rotate": True, "act_scales": "token"},
    ],
    ids=["file-8", "8-8-rotated-token"],
)
def test_8_bit_activations_cost_little(evaluator, smollm2_path, options):
    result = evaluate(evaluator, smollm2_path, **options)
    # Half a percent, as far as so little text can tell.
    assert result.ratio < 1.005 + 2 * result.ratio_error
    assert result.kl < 0.01
    assert result.top1 > 0.93


def test_resident_weights_are_packed(smollm2_path):
    size = weight_bytes(load_gguf(smollm2_path).model)
    assert size.bits_per_linear_weight == 5
    assert size.embedding < 0.3 * 4 * 49152 * 576
