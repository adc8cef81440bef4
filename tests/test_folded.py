"""The benchmark of folded rotations: a folded model computes what it did, and is rotated inside."""

import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_gguf as tiny
from flax import nnx

from benchmarks.folded import fold, folded_rules, orthogonal
from jax_anyprec.models import Llama, LlamaConfig, load_gguf


@pytest.mark.parametrize("size", [1, 2, 9, 16, 64, 576])
def test_channels_are_mixed_alike(size):
    matrix = orthogonal(size)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-5)
    assert np.abs(matrix).max() <= np.sqrt(2 / size) + 1e-6


def test_folded_models_compute_the_same(tmp_path):
    def load():
        path = tiny.write_llama(tmp_path / "tiny.gguf")
        return load_gguf(path, quantization=None, dtype=jnp.float32).model

    model, folded = load(), load()
    fold(folded)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, tiny.VOCAB, (2, 9)))
    np.testing.assert_allclose(folded(tokens), model(tokens), atol=2e-4)
    inside = nnx.state(folded.layers[0].attention)
    assert not np.allclose(
        inside["output"]["kernel"][...], model.layers[0].attention.output.kernel[...], atol=1e-2
    )


def test_only_what_comes_as_it_was_is_rotated():
    """An inner size of 128 has rotations, and a hidden one of 64."""
    config = LlamaConfig(
        vocab_size=8, num_layers=1, hidden_size=64, intermediate_size=128, num_heads=1,
        num_kv_heads=1, head_dim=64, context_length=8,
    )  # fmt: skip
    rules = folded_rules(Llama(config, rngs=nnx.Rngs(0)), 4, None)
    assert {path.rpartition("/")[2] for path, each in rules if each.rotate} == {"down"}
