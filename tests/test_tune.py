"""Tuning of packed models: what it changes, what it leaves, and that others' inputs gain by it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_anyprec as ap
from jax_anyprec.calibrate import Tuning, kl_divergence, relative_error, tune
from jax_anyprec.calibrate.tune import numbers
from jax_anyprec.nnx.packed import Packed
from jax_anyprec.quantize import DISTORTION

LOW = ap.Quantization(weights=2, activations=None, group_size=32, scale_dtype="float16")


class Model(nnx.Module):
    """A norm and two blocks, one of them with biases."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm = nnx.RMSNorm(64, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(64, 40, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = self.norm(x)
        for block in self.blocks:
            x = x + nnx.silu(block(x))
        return self.head(x)


def batches(count, rows=128):
    rng = np.random.default_rng(3)
    mix = rng.normal(size=(64, 64)) / 8
    return [jnp.asarray(rng.normal(size=(rows, 64)) @ mix, jnp.float32) for _ in range(count)]


def packed(model):
    return [x for _, x in nnx.iter_graph(model) if isinstance(x, Packed)]


def leaves(model):
    return jax.tree.leaves(nnx.state(model))


@pytest.mark.parametrize(
    ("quantization", "loss"),
    [
        (LOW, relative_error),
        (LOW, kl_divergence),
        (dataclasses.replace(LOW, rotate=True, group_size=None), relative_error),
        (dataclasses.replace(LOW, activations=8), relative_error),
    ],
    ids=["groups", "KL", "rotated", "A8"],
)
def test_other_inputs_gain(quantization, loss):
    *data, other = batches(25)
    model = ap.quantize_model(Model(), quantization)
    planes = [np.asarray(x.get_value().planes) for x in packed(model)]
    dtypes = {path: x.dtype for path, x in numbers(model).items()}
    before, progress = float(loss(model(other), Model()(other))), []
    losses = tune(
        model,
        Model(),
        Tuning(data, loss=loss, rate=0.03),
        progress=lambda *step: progress.append(step),
    )
    assert float(loss(model(other), Model()(other))) < 0.95 * before
    assert losses[-1] < losses[0]
    assert len(losses) == 24
    assert progress == [(i, 24) for i in range(1, 25)]
    assert {path: x.dtype for path, x in numbers(model).items()} == dtypes
    for variable, kept in zip(packed(model), planes, strict=True):
        np.testing.assert_array_equal(variable.get_value().planes, kept)


def test_what_is_tuned():
    model = ap.quantize_model(Model(), {"head": None, "**": LOW})
    assert {path: x.shape for path, x in numbers(model).items()} == {
        "norm/scale": (64,),
        "blocks/0/bias": (64,),
        "blocks/0/kernel/scales": (64, 2),
        "blocks/1/bias": (64,),
        "blocks/1/kernel/scales": (64, 2),
    }


def test_offsets_are_tuned_by_what_a_group_spans():
    """Adam's first step is the rate times that: of scales a part, of offsets half the range."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 4, (32, 64)).astype(np.uint8)
    scales, offsets = (rng.uniform(0.5, 1, (32, 2)).astype(np.float32) for _ in range(2))
    weight = ap.QuantizedTensor.from_codes(codes, scales, offsets, bits=2)
    model = ap.nnx.QuantLinear.from_tensor(weight)
    x = batches(1)[0]
    tune(model, nnx.Linear(64, 32, rngs=nnx.Rngs(0)), Tuning([x], rate=1e-3))
    found, error = numbers(model), DISTORTION[2] ** 0.5
    moved = np.asarray(found["kernel/scales"]) - scales
    np.testing.assert_allclose(np.abs(moved), 1e-3 * error * scales, rtol=1e-2)
    moved = np.asarray(found["kernel/offsets"]) - offsets
    np.testing.assert_allclose(np.abs(moved), 3e-3 * error * scales, rtol=1e-2)


def test_a_rate_of_0_changes_nothing():
    model, same = (ap.quantize_model(Model(), LOW) for _ in range(2))
    tune(model, Model(), Tuning(batches(2), rate=0.0))
    for a, b in zip(leaves(model), leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)


def test_losses():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 5, 7)).astype(np.float32)

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    p, q = softmax(b.astype(np.float64)), softmax(a.astype(np.float64))
    kl = (p * np.log(p / q)).sum(-1).mean()
    np.testing.assert_allclose(kl_divergence(jnp.asarray(a), jnp.asarray(b)), kl, rtol=1e-5)
    error = ((a - b) ** 2).sum() / (b**2).sum()
    np.testing.assert_allclose(relative_error(jnp.asarray(a), jnp.asarray(b)), error, rtol=1e-5)
    assert float(relative_error(jnp.zeros(3), jnp.zeros(3))) == 0


def test_calibrations_tune_at_the_end_go_on_and_load(tmp_path):
    """What is kept, gone on with and loaded is, bit for bit, what is made at once."""
    data, tuning = batches(4, 512), Tuning(rate=0.03)
    plain = ap.calibrate_model(Model(), LOW, data).model
    at_once = ap.calibrate_model(Model(), LOW, data, tuning=tuning).model
    assert relative_error(at_once(data[0]), Model()(data[0])) < relative_error(
        plain(data[0]), Model()(data[0])
    )

    def stop(done, total):
        assert total == 2 + 4
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ap.calibrate_model(Model(), LOW, data, tuning=tuning, store=tmp_path, progress=stop)
    models = [
        ap.calibrate_model(Model(), LOW, data, tuning=tuning, store=tmp_path).model
        for _ in range(2)
    ]
    for model in (*models, ap.calibrate.load_calibrated(Model(), tmp_path)):
        for a, b in zip(leaves(model), leaves(at_once), strict=True):
            np.testing.assert_array_equal(a, b)
    for other in (None, Tuning(rate=0.02), Tuning(rate=0.03, batches=data[:2])):
        with pytest.raises(ValueError, match="other"):
            ap.calibrate_model(Model(), LOW, data, tuning=other, store=tmp_path)
    ap.save(tmp_path / "tuned.safetensors", {"norm/scale": jnp.ones(64)})
    with pytest.raises(ap.CheckpointError, match="of another model"):
        ap.calibrate.load_calibrated(Model(), tmp_path)
    with pytest.raises(ap.CheckpointError, match="of another model"):
        ap.calibrate_model(Model(), LOW, data, tuning=tuning, store=tmp_path)


def test_tuning_goes_on_where_it_was(tmp_path):
    """What was kept of the steps is not done again, and the result is the same bit for bit."""
    data, tuning = batches(4, 512), Tuning(batches(20), rate=0.03)
    at_once = ap.calibrate_model(Model(), LOW, data, tuning=tuning).model
    steps = []

    def stop(done, total):
        assert total == 2 + 20
        steps.append(done)
        if done == 2 + 19:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ap.calibrate_model(Model(), LOW, data, tuning=tuning, store=tmp_path, progress=stop)
    unfinished = tmp_path / "unfinished-tuned.safetensors"
    assert unfinished.exists()
    with pytest.raises(KeyboardInterrupt):
        ap.calibrate_model(Model(), LOW, data, tuning=tuning, store=tmp_path, progress=stop)
    assert steps == [*range(1, 22), 1, 2, 2 + 17, 2 + 18, 2 + 19]
    model = ap.calibrate_model(Model(), LOW, data, tuning=tuning, store=tmp_path).model
    for a, b in zip(leaves(model), leaves(at_once), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not unfinished.exists()
    (tmp_path / "tuned.safetensors").unlink()
    ap.save(unfinished, {"norm/scale": jnp.ones(64)})
    with pytest.raises(ap.CheckpointError):
        ap.calibrate_model(Model(), LOW, data, tuning=tuning, store=tmp_path)


def test_bad_input():
    model = ap.quantize_model(Model(), LOW)
    before = [np.asarray(x) for x in leaves(model)]
    with pytest.raises(ValueError, match=r"Tuning\.batches must hold at least one"):
        Tuning([])
    with pytest.raises(ValueError, match=r"Tuning\.batches must hold at least one"):
        tune(model, Model(), Tuning())
    with pytest.raises(ValueError, match=r"Tuning\.rate must be .*, got 1\.5"):
        Tuning(rate=1.5)
    with pytest.raises(ValueError, match="model must have packed layers"):
        tune(Model(), Model(), Tuning(batches(1)))
    paths = ("blocks/0", "blocks/1", "head")
    with pytest.raises(ValueError, match="fixed must leave a packed layer to be tuned"):
        tune(model, Model(), Tuning(batches(1)), fixed=paths)
    bad = batches(3)
    bad[1] = bad[1].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"Tuning\.loss must be finite, got nan for batch 1"):
        tune(model, Model(), Tuning(bad))
    for a, b in zip(leaves(model), before, strict=True):
        np.testing.assert_array_equal(a, b)
