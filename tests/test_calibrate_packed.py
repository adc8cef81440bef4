"""Weights that are packed already: a choice of budgets, and taken bit for bit by calibrations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_anyprec as ap
from jax_anyprec.calibrate.allocate import Choice, Costs

RULE = ap.Quantization(weights=3, activations=None, group_size=32, scale_dtype="float16")
GRID = dataclasses.replace(RULE, weights=4, offsets=True, scales="absmax")


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(2)])
        self.out = nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = x + nnx.silu(block(x))
        return self.out(x)


def from_file():
    """A float model whose second block and head lie on a grid, and their packed weights."""
    model = Model()
    packed = {}
    for path, layer in (("blocks/1", model.blocks[1]), ("out", model.out)):
        packed[path] = GRID.pack(layer.kernel[...])
        layer.kernel.set_value(packed[path].dequantize())
    return model, packed


def batches():
    x = np.random.default_rng(0).normal(size=(2, 256, 64)).astype(np.float32)
    return [jnp.asarray(each) for each in x]


def planes(layer):
    return layer.kernel.get_value().restore()


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def costs(activations=None, **options):
    model, packed = from_file()
    rules = dataclasses.replace(RULE, activations=activations, act_scales="token")
    return ap.calibrate.measure_costs(model, rules, batches(), packed=packed, **options)


def test_they_are_a_choice_that_loses_nothing():
    found = costs(activations=8)
    by_path = dict(zip(found.paths, found.choices, strict=True))
    tensors = from_file()[1]
    for path, choices in by_path.items():
        there = [choice for choice in choices if choice.packed is not None]
        assert len(there) == (path in tensors)
        for choice in there:
            assert choice.loss == 0
            assert choice.nbytes == tensors[path].nbytes
            held = choice.quantization
            assert (held.weights, held.group_size, held.offsets) == (4, 32, True)
            # Outliers are not spread by a rotation here: a scale a token would not do.
            assert (held.activations, held.act_scales) == (8, "group")
    allocation = found.allocate(8.0)
    assert set(allocation.packed) == set(tensors)
    assert str(allocation).count("as packed") == 2
    assert not found.allocate(1.6).packed


def test_they_are_taken_where_they_are_worth_it():
    """Others make up for what layers before them lose, so a little less loss is not enough."""

    def choice(nbytes, loss, packed=None):
        return Choice(RULE, nbytes, loss, packed)

    _, packed = from_file()
    costs = [choice(10, 1.0), choice(20, 0.5)]
    for loss, taken in ((0.41, False), (0.39, True)):
        table = (*costs, choice(20, loss, packed["out"])), (choice(20, 0.0),)
        found = Costs(("a", "b"), table, 80).allocate(4.0)
        assert bool(found.packed) == taken
        assert found.loss == (loss if taken else 0.5)
    only = Costs(("a",), ((choice(20, 0.5), choice(10, 0.6, packed["out"])),), 80)
    assert only.allocate(1.5).packed


def test_coarse_activations_need_other_weights():
    assert not costs(activations=6).allocate(9.0).packed


def test_they_cost_what_they_lose():
    """Packed weights that are not those of the model, as of another quantizer, are no gift."""
    model, _ = from_file()
    exact, data = nnx.clone(model), batches()
    coarse = dataclasses.replace(RULE, weights=1).pack(model.out.kernel[...])
    found = ap.calibrate.measure_costs(model, RULE, data, bits=(8,), packed={"out": coarse})
    eight, packed = found.choices[found.paths.index("out")]
    assert packed.packed is coarse
    assert eight.loss < 0.01 * packed.loss
    # By default half the squared error of the output, and this is the last layer.
    model.out.kernel.set_value(coarse.dequantize())
    lost = np.mean([0.5 * ((model(x) - exact(x)) ** 2).sum(-1).mean() for x in data])
    assert 0.7 < packed.loss / lost < 1.3


def test_they_are_taken_bit_for_bit(tmp_path):
    model, packed = from_file()
    exact, data = nnx.clone(model), batches()
    report = ap.calibrate_model(model, RULE, data, packed=packed, store=tmp_path)
    assert_same(planes(model.blocks[1]), packed["blocks/1"])
    assert_same(planes(model.out), packed["out"])
    assert [layer.path for layer in report.layers if layer.error is None] == ["blocks/1", "out"]
    assert str(report).count("as it was packed") == 2
    assert all(0 < layer.error < 0.2 for layer in report.layers if layer.path not in packed)
    # The layers between are calibrated on what these give.
    alone = ap.calibrate_model(from_file()[0], RULE, data).model
    lost = [jnp.linalg.norm(each(data[0]) - exact(data[0])) for each in (model, alone)]
    assert lost[0] < lost[1]
    loaded = ap.calibrate.load_calibrated(from_file()[0], tmp_path)
    assert_same(nnx.state(loaded), nnx.state(model))
    again = ap.calibrate_model(from_file()[0], RULE, data, packed=packed, store=tmp_path)
    assert again.layers == report.layers
    with pytest.raises(ValueError, match="holds a calibration of another model"):
        ap.calibrate_model(from_file()[0], RULE, data, store=tmp_path)


def test_tuning_leaves_them_as_they_are():
    model, packed = from_file()
    untuned = ap.calibrate_model(from_file()[0], RULE, batches(), packed=packed).model
    tuning = ap.calibrate.Tuning(batches(), rate=0.1)
    ap.calibrate_model(model, RULE, batches(), packed=packed, tuning=tuning)
    assert_same(planes(model.blocks[1]), packed["blocks/1"])
    assert_same(planes(model.out), packed["out"])
    assert (planes(model.blocks[0]).scales != planes(untuned.blocks[0]).scales).any()


def test_a_model_that_loses_nothing_is_not_tuned():
    model, packed = from_file()
    rules = dict.fromkeys(packed, RULE) | {"**": None}
    before = nnx.clone(model)
    steps = []
    tuning = ap.calibrate.Tuning(batches(), rate=0.1)
    ap.calibrate_model(
        model, rules, batches(), packed=packed, tuning=tuning,
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert steps == [(1, 2), (2, 2)]
    for path in ("blocks/1", "out"):
        assert packed[path].scales.dtype == jnp.float16
    np.testing.assert_array_equal(model.out.bias[...], before.out.bias[...])
    np.testing.assert_allclose(model(batches()[0]), before(batches()[0]), rtol=1e-4, atol=1e-4)


def test_bad_input():
    model, packed = from_file()
    data = batches()

    def fails(match, packed, **options):
        with pytest.raises(ValueError, match=match):
            ap.calibrate_model(model, RULE, data, packed=packed, **options)
        assert isinstance(model.out, nnx.Linear)

    fails("'other', which is no layer that the rules quantize", {"other": packed["out"]})
    fails(
        r"packed\['blocks/0'\] must be \(64, 64\), as its layer is, got \(64, 32\)",
        {"blocks/0": packed["out"]},
    )
    fails("can't be given with links", packed, links=[ap.calibrate.Link("out", ("blocks/0",))])
    nested = ap.calibrate.Method(nested=(2,))
    fails("can't be given with links", packed, method=nested)
    with pytest.raises(ValueError, match="'other', which is no layer"):
        ap.calibrate.measure_costs(model, RULE, data, packed={"other": packed["out"]})
