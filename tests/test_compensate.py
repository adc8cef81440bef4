"""Products of low rank beside packed layers: the best of their rank, and where they are put."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_calibrate import Model, batches, inputs, leaves, relative

import jax_anyprec as ap
from jax_anyprec.calibrate import compensate, put_factors
from jax_anyprec.calibrate.compensate import DAMPING
from jax_anyprec.models import weight_bytes

LOW = ap.Quantization(weights=2, activations=None, group_size=32, scale_dtype="float16")


class One(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(96, 64, use_bias=False, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(x)


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_factors_are_the_best_of_their_rank(rank):
    """No others of this rank bring outputs nearer, by the theorem of Eckart and Young, in NumPy."""
    rng = np.random.default_rng(rank)
    x = inputs(rng, 1024, 96, rank=200)
    model, reference = ap.quantize_model(One(), LOW), One()
    error = np.asarray(reference.layer.kernel[...] - model.layer.kernel.get_value().dequantize())
    bits = 16 * rank * (96 + 64) / (96 * 64)
    # Rows shared out over batches, with a bit more than it takes.
    found = compensate(model, reference, list(x.reshape(4, 256, 96)), bits * 1.001)
    a, b = (np.asarray(each, np.float64) for each in found["layer"])
    assert (a.shape, b.shape) == ((96, rank), (rank, 64))
    own = x.astype(np.float64).T @ x
    own += np.eye(96) * DAMPING * np.trace(own) / 96
    seen = np.linalg.cholesky(own).T
    least = (np.linalg.svd(seen @ error, compute_uv=False)[rank:] ** 2).sum()
    assert np.square(seen @ (error - a @ b)).sum() < least * 1.001
    wanted = x @ np.asarray(reference.layer.kernel[...] - error + a @ b)
    np.testing.assert_allclose(jax.jit(lambda x: model(x))(x), wanted, rtol=0.01, atol=0.01)


def test_ranks_go_where_they_save_most():
    """The layer with the outputs of few directions gets more of them."""

    class Two(nnx.Module):
        def __init__(self):
            self.thin, self.even = (nnx.Linear(64, 64, rngs=nnx.Rngs(i)) for i in range(2))
            self.other = self.even  # a second reference

        def __call__(self, x):
            return self.thin(x[..., :64]), self.even(x[..., 64:])

    rng = np.random.default_rng(0)
    x = np.concatenate([inputs(rng, 512, 64, rank=4), inputs(rng, 512, 64)], axis=1)
    model = ap.quantize_model(Two(), LOW)
    found = compensate(model, Two(), [x], 1.5)
    ranks = {path: a.shape[1] for path, (a, _) in found.items()}
    assert sum(16 * rank * 128 for rank in ranks.values()) <= 1.5 * 2 * 64 * 64
    assert ranks["thin"] != ranks["even"]
    assert isinstance(model.even, nnx.LoRA)
    assert model.other is model.even
    size = weight_bytes(model)
    assert size.bits_per_linear_weight == pytest.approx(2.5 + 128 * 16 * sum(ranks.values()) / 8192)


def test_models_gain_and_are_kept(tmp_path):
    data = batches()
    exact, model = Model()(data[-1]), ap.quantize_model(Model(), LOW)
    rounded = relative(model(data[-1]), exact)
    steps = []
    found = compensate(model, Model(), data[:-1], 1.0, progress=lambda *step: steps.append(step))
    assert steps == [(i, 10) for i in range(1, 11)]
    assert relative(model(data[-1]), exact) < 0.9 * rounded
    ap.save(tmp_path / "factors.safetensors", found)
    other = ap.quantize_model(Model(), LOW)
    put_factors(other, ap.load(tmp_path / "factors.safetensors"))
    for a, b in zip(leaves(model), leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bad_input():
    model, data = ap.quantize_model(One(), LOW), [np.ones((8, 96), np.float32)]
    with pytest.raises(ValueError, match="bits must be above 0, got 0"):
        compensate(model, One(), data, 0)
    with pytest.raises(ValueError, match="got 1 such layers and 0 batches"):
        compensate(model, One(), [], 1.0)
    with pytest.raises(ValueError, match="model has no QuantLinear 'other'"):
        put_factors(model, {"other": (jnp.zeros((96, 2)), jnp.zeros((2, 64)))})
    with pytest.raises(ValueError, match=r"a and b must be \(96, rank\) and \(rank, 64\)"):
        put_factors(model, {"layer": (jnp.zeros((96, 2)), jnp.zeros((3, 64)))})
