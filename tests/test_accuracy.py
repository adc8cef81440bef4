"""The real model on real text: what quantization costs. The README measures on more text."""

from __future__ import annotations

import pytest

from jax_anyprec.models import Quantization, load_gguf, weight_bytes
from jax_anyprec.models.evaluate import Evaluator, choose_windows, encode_texts
from jax_anyprec.models.wikipedia import read_articles

CONTEXT = 512


@pytest.fixture(scope="module")
def evaluator(smollm2_path, wikipedia_path) -> Evaluator:
    loaded = load_gguf(smollm2_path, quantization=None)
    texts = (article.text for article in read_articles(wikipedia_path))
    tokens = encode_texts(texts, loaded.tokenizer.encode)
    return Evaluator(loaded.model, choose_windows(tokens, CONTEXT, CONTEXT))


def test_weights_of_the_file_are_exact_and_packed(evaluator, smollm2_path):
    model = load_gguf(smollm2_path, quantization=Quantization(activations=None)).model
    size = weight_bytes(model)
    assert size.bits_per_linear_weight == 5
    assert size.embedding < 0.3 * 4 * 49152 * 576
    result = evaluator(model)
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
    result = evaluator(load_gguf(smollm2_path, quantization=Quantization(**options)).model)
    # Half a percent, as far as so little text can tell.
    assert result.ratio < 1.005 + 2 * result.ratio_error
    assert result.kl < 0.01
    assert result.top1 > 0.93
