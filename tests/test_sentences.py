"""Sentence embeddings: of MiniLM those of PyTorch and near human judgement; broken folders.

What PyTorch computes comes from tests/make_minilm_reference.py.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats
from tokenizers import Tokenizer

from jax_anyprec.models import (
    HuggingFaceError,
    SentenceEncoder,
    load_huggingface,
    load_sentence_encoder,
    weight_bytes,
)
from jax_anyprec.models.sentences import mean_embedding

DATA = Path(__file__).parent / "data"
TINY = DATA / "huggingface" / "bert"


@pytest.fixture(scope="module")
def reference() -> tuple[list[str], np.ndarray]:
    """Sentences, the last of which are long, and their embeddings."""
    stored = np.load(DATA / "minilm.npz")
    return stored["sentences"].tolist(), stored["embeddings"]


@pytest.fixture(scope="module")
def encoder(minilm_path) -> SentenceEncoder:
    return load_sentence_encoder(minilm_path, dtype=np.float32)


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A folder with a tokenizer of words, "w2" to "w95", and a random BERT of 24 positions."""
    folder = shutil.copytree(TINY, tmp_path / "tiny")
    words = {f"w{i}": i for i in range(96)}
    (folder / "tokenizer.json").write_text(tokenizer(words))
    return folder


def tokenizer(words: dict[str, int]) -> str:
    """tokenizer.json of words between spaces; a text gets w0 before it and w1 behind."""
    special = [{"SpecialToken": {"id": f"w{i}", "type_id": 0}} for i in range(2)]
    single = [special[0], {"Sequence": {"id": "A", "type_id": 0}}, special[1]]
    tokens = {f"w{i}": {"id": f"w{i}", "ids": [i], "tokens": [f"w{i}"]} for i in range(2)}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": single,
                "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": tokens,
            },
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "w2"},
        }
    )


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 - cosine, for each row."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return 1 - (a * b).sum(axis=-1) / lengths


def test_embeddings_of_minilm_are_those_of_pytorch(encoder, reference):
    """All to a cosine of 1e-5; 2e-7, float32's own precision, was found."""
    sentences, expected = reference
    embeddings = encoder.encode(sentences)
    assert distances(embeddings, expected).max() < 1e-5
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=-1), 1, rtol=1e-6)


def test_order_and_company_do_not_matter(encoder, reference):
    """A sentence is padded as the longest of its batch needs, which changes the order of sums."""
    sentences, expected = reference
    chosen = [5, 20, 5]
    embeddings = encoder.encode([sentences[i] for i in chosen])
    assert distances(embeddings, expected[chosen]).max() < 1e-5
    np.testing.assert_array_equal(embeddings[0], embeddings[2])
    assert encoder.encode([]).shape == (0, 384)


def test_long_sentences_are_cut_as_tokenizers_does(encoder, minilm_path, reference):
    truncating = Tokenizer.from_file(str(minilm_path / "tokenizer.json"))
    truncating.no_padding()
    truncating.enable_truncation(encoder.max_tokens)
    lengths = set()
    for sentence in reference[0]:
        ids = truncating.encode(sentence).ids
        assert encoder._tokens(sentence) == ids
        lengths.add(len(ids))
    assert max(lengths) == encoder.max_tokens == 256


def test_minilm_quantized_as_in_the_docs(minilm_path, reference, capsys):
    page = (Path(__file__).parents[1] / "docs" / "encoders.md").read_text("utf-8")
    (block,) = re.findall(r'^```python title="minilm"\n(.*?)^```', page, re.MULTILINE | re.DOTALL)
    values: dict[str, Any] = {}
    exec(compile(block, "docs/encoders.md", "exec"), values)
    assert float(capsys.readouterr().out) == pytest.approx(0.7, abs=0.1)
    sentences, expected = reference
    found = distances(values["encoder"].encode(sentences[:8]), expected[:8])
    assert 1e-3 < found.mean() < 0.06
    size = weight_bytes(values["encoder"].model)
    assert size.linear_weights == 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert size.bits_per_linear_weight == 5  # a float32 scale for every 32


def test_minilm_agrees_with_people(encoder, lee_path):
    """A linear correlation of 0.656 over 1,225 pairs, which PyTorch's embeddings have too."""
    texts = (lee_path / "lee.cor").read_text(encoding="latin1").strip().split("\n")
    judged = np.loadtxt(lee_path / "similarities0-1.txt")
    embeddings = encoder.encode(texts)
    pairs = np.triu_indices(len(texts), 1)
    correlation = stats.pearsonr((embeddings @ embeddings.T)[pairs], judged[pairs]).statistic
    assert correlation == pytest.approx(0.6564, abs=2e-4)


def test_mean_embedding_is_the_definition():
    random = np.random.default_rng(0)
    features = random.normal(size=(3, 5, 8)).astype(np.float32)
    mask = np.arange(5) < np.array([[5], [3], [1]])
    expected = np.stack(
        [x[m].astype(np.float64).mean(0) for x, m in zip(features, mask, strict=True)]
    )
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    features[~mask] = np.nan  # padding leaves no trace, whatever it holds
    result = jax.jit(mean_embedding)(features, mask)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_a_tiny_folder(tiny):
    """Cut at as many tokens as there are positions; batches of one length share a program."""
    encoder = load_sentence_encoder(tiny)
    assert encoder.max_tokens == 24
    text = " ".join(f"w{i}" for i in range(3, 60))
    assert encoder._tokens(text) == [0, *range(3, 25), 1]
    embeddings = encoder.encode([text, "w3", "w3 w4"])
    features = encoder.model(np.array([[0, 3, 1]]))
    assert distances(embeddings[1:2], np.asarray(features.mean(axis=1))).max() < 1e-6


def test_one_string_is_no_list(tiny):
    with pytest.raises(TypeError, match="sentences must be a list of strings, got one string"):
        load_sentence_encoder(tiny).encode("w3 w4")


def test_limits_of_an_encoder(tiny):
    loaded = load_huggingface(tiny)
    for limit in (1, 25):
        with pytest.raises(ValueError, match=f"max_tokens must be in 2..24, .* got {limit}"):
            SentenceEncoder(loaded.model, loaded.tokenizer, max_tokens=limit)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "tiny: tiny has no tokenizer"),
        ("tokenizer.json", {f"w{i}": i for i in range(97)}, "the tokenizer has 97 tokens, but"),
        ("sentence_bert_config.json", {"max_seq_length": 25}, "max_tokens must be in 2..24"),
        ("sentence_bert_config.json", {"max_seq_length": "9"}, "'max_seq_length' must be int"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True},
            "'pooling_mode_mean_tokens' must be True, got False",
        ),
        (
            "1_Pooling/config.json",
            {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
            "'pooling_mode_max_tokens' must be False, got True",
        ),
        ("1_Pooling/config.json", {"pooling_mode": "cls"}, "'pooling_mode' must be 'mean'"),
        ("config.json", {"model_type": "gpt2"}, "'model_type' must be 'bert', got 'gpt2'"),
    ],
)
def test_folders_that_are_refused(tiny, file, content, message):
    path = tiny / file
    path.parent.mkdir(exist_ok=True)
    if content is None:
        path.unlink()
    else:
        path.write_text(tokenizer(content) if file == "tokenizer.json" else json.dumps(content))
    with pytest.raises(HuggingFaceError, match=message):
        load_sentence_encoder(tiny)
